"""The teacher's objective against brute force over all responses of two tokens, and against OPD's own update."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from tokencredit.collect.exact.gradient import score_gradients, trainable
from tokencredit.collect.exact.score import in_float64, node_logprobs
from tokencredit.collect.exact.trie import build_trie
from tokencredit.collect.teacher.objective import teacher_objective
from tokencredit.collect.teacher.states import state_divergences

PROMPT, OTHER_PROMPT = [0, 1, 0], [1, 1]
# Token 1 ends a response, three tokens at most: these are all.
RESPONSES = [[1], [0, 1], [0, 0, 1], [0, 0, 0]]
STATES = [[], [0], [0, 0]]


def toy(seed: int) -> Qwen3ForCausalLM:
    """A random model of two tokens in float64."""
    config = Qwen3Config(
        vocab_size=2,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    return in_float64(model.eval())


def table(model: Qwen3ForCausalLM, prompt: list[int]) -> Tensor:
    """ln π of both tokens at each state, [state, token], from one plain row a state."""
    rows = [model(input_ids=torch.tensor([prompt + state])).logits[0, -1].log_softmax(-1) for state in STATES]
    return torch.stack(rows)


def whole(own: Tensor, other: Tensor) -> Tensor:
    """Σ_y π(y) (ln π(y) − ln ρ(y)) over all responses."""
    logs = [sum(item[step, token] for step, token in enumerate(y)) for item in (own, other) for y in RESPONSES]
    ours, theirs = torch.stack(logs).view(2, -1)
    return (ours.exp() * (ours - theirs)).sum()


def local(own: Tensor, other: Tensor, reached: Tensor) -> Tensor:
    """Σ_s P(s) KL(s) with P from elsewhere."""
    return (reached * (own.exp() * (own - other)).sum(-1)).sum()


@torch.no_grad()
def slope(model: Qwen3ForCausalLM, along: Tensor, value: Callable[[], Tensor], step: float = 1e-5) -> float:
    """Central difference of `value` when the parameters move along a direction."""
    pieces = along.split([parameter.numel() for parameter in trainable(model)])

    def at(distance: float) -> float:
        for parameter, piece in zip(trainable(model), pieces, strict=True):
            parameter.add_(distance * piece.view_as(parameter))
        found = float(value())
        for parameter, piece in zip(trainable(model), pieces, strict=True):
            parameter.sub_(distance * piece.view_as(parameter))
        return found

    return (at(step) - at(-step)) / (2 * step)


def test_value_and_both_gradients_against_finite_differences() -> None:
    student, teacher = toy(0), toy(1)
    trie = build_trie([RESPONSES])
    found = teacher_objective(student, PROMPT, teacher, OTHER_PROMPT, trie, 0)
    other = table(teacher, OTHER_PROMPT).detach()
    own = table(student, PROMPT).detach()
    reached = torch.stack((own.new_ones(()), own[0, 0].exp(), (own[0, 0] + own[1, 0]).exp()))
    assert found.divergence == pytest.approx(float(whole(own, other)), rel=1e-9)
    assert found.divergence == pytest.approx(float(local(own, other, reached)), rel=1e-9)  # state by state
    assert found.visits == pytest.approx(float(reached.sum()), rel=1e-9)
    for seed in range(3):
        along = torch.randn(found.gradients.shape[1], generator=torch.Generator().manual_seed(seed)).double()
        by_sequence = slope(student, along, lambda: whole(table(student, PROMPT), other))
        by_state = slope(student, along, lambda: local(table(student, PROMPT), other, reached))
        assert float(found.gradients[1] @ along) == pytest.approx(by_sequence, rel=1e-6)
        assert float(found.gradients[0] @ along) == pytest.approx(by_state, rel=1e-6)
    assert not torch.allclose(found.gradients[0], found.gradients[1], rtol=0.1)


def test_opd_ascends_the_local_gradient() -> None:
    # E Σ_t A_t ∇ln π(y_t) over all responses, A = ln ρ − ln π: node weights P(node) · A.
    student, teacher = toy(0), toy(1)
    trie = build_trie([RESPONSES])
    found = teacher_objective(student, PROMPT, teacher, OTHER_PROMPT, trie, 0)
    own = node_logprobs(student, PROMPT, trie, 0).detach()
    gap = node_logprobs(teacher, OTHER_PROMPT, trie, 0).detach() - own
    above = {node: float(own[node - 1]) for node in range(1, 1 + len(own))}
    reach = torch.tensor([sum(above[at] for at in ancestors(trie, node)) for node in above], dtype=own.dtype).exp()
    update = score_gradients(student, PROMPT, trie, 0, (reach * gap)[None])[0]
    torch.testing.assert_close(update, -found.gradients[0], rtol=1e-9, atol=1e-10)


def ancestors(trie, node: int) -> list[int]:
    """The node and what is above it, the root left out."""
    return [] if node == 0 else [node, *ancestors(trie, int(trie.parent[node]))]


def test_a_teacher_that_is_the_student_and_an_empty_trie() -> None:
    student = toy(0)
    found = teacher_objective(student, PROMPT, student, PROMPT, build_trie([RESPONSES]), 0)
    assert found.divergence == pytest.approx(0.0, abs=1e-12)
    assert float(found.gradients.abs().max()) < 1e-9
    empty = teacher_objective(student, PROMPT, toy(1), PROMPT, build_trie([[]]), 0)
    assert empty.divergence == empty.visits == float(empty.gradients.abs().sum()) == 0.0


def test_divergences_at_the_states_of_responses() -> None:
    # Ragged prompts and responses; a hole is context but not a state that counts.
    student, teacher = toy(0), toy(1)
    ids = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 0]])
    mask = torch.tensor([[True, False, True], [True, True, False], [False, False, False]])
    prompts, others = [PROMPT, [1], [0]], [OTHER_PROMPT, [0, 1], [1]]
    found = state_divergences(student, teacher, prompts, ids, mask, teacher_prompts=others, batch_size=2)
    for row, column in mask.nonzero().tolist():
        sees = ids[row, :column].tolist()
        own, other = (
            model(input_ids=torch.tensor([asked[row] + sees])).logits[0, -1].log_softmax(-1).detach()
            for model, asked in ((student, prompts), (teacher, others))
        )
        assert float(found[row, column]) == pytest.approx(float((own.exp() * (own - other)).sum()), rel=1e-5)
    assert bool((found[~mask] == 0.0).all())
