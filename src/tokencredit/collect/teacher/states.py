"""How far a teacher is from the student over the whole vocabulary, at the states that responses pass."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.collect.head.divergence import head_divergence
from tokencredit.collect.head.tiles import Readout
from tokencredit.collect.logprobs import check_media, pass_of
from tokencredit.collect.models import eval_mode, head_of
from tokencredit.collect.rollout import Sequences
from tokencredit.collect.teacher.score import packed_rows, used_widths

Prompts = Sequence[Sequence[int]]


@torch.no_grad()
def state_divergences(
    student: Any,
    teacher: Any,
    prompts: Prompts,
    response_ids: Int[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    *,
    teacher_prompts: Prompts | None = None,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> Float[Tensor, "batch response"]:
    """KL(π(·|s_t) ‖ ρ(·|s_t)) in nats at the state in front of each chosen token, 0 elsewhere; heads in tiles.

    On samples of the student the sum over a response estimates KL(π(·|x) ‖ ρ(·|x)) without bias, with less noise than
    ln π(y) − ln ρ(y). `teacher_prompts` are those of a teacher that sees more than the student.
    """
    teacher_prompts = prompts if teacher_prompts is None else teacher_prompts
    widths = used_widths(response_mask)
    result = torch.zeros(response_ids.shape, dtype=torch.float32, device=response_ids.device)
    order = sorted(range(len(prompts)), key=lambda row: widths[row])
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        used = [widths[row] for row in rows]
        heads = []
        for model, asked in ((student, prompts), (teacher, teacher_prompts)):
            few = packed_rows([asked[row] for row in rows], response_ids[rows], used, response_ids.device)
            heads.append(_states(model, few, temperature))
        (own, weight, readout), (other, other_weight, other_readout) = heads
        divergences = head_divergence(
            (own, weight), (other, other_weight), student_readout=readout, teacher_readout=other_readout
        )
        result[rows, : max(1, *used)] = divergences.view(len(rows), -1)[:, : result.shape[1]].to(result)
    return torch.where(response_mask, result, 0.0)


def _states(
    model: Any, sequences: Sequences, temperature: float
) -> tuple[Float[Tensor, "token hidden"], Float[Tensor, "vocab hidden"], Readout]:
    """Hidden states in front of each response token, and the head that reads them."""
    check_media(model, sequences)
    weight, readout = head_of(model, temperature)
    one = pass_of(sequences)
    with eval_mode(model):
        hidden = one.run(model).last_hidden_state
    states = one.states_before(hidden, sequences.prompt_length, sequences.response_length)
    return states.flatten(0, 1), weight.detach(), readout
