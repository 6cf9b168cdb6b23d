"""Signals that need hidden states, on verl: taken in the workers from the log-prob pass that verl runs anyway.

verl's FSDP engine sends each micro-batch through `forward_step`. Where the driver asks for signals in the meta data of
a batch, that call is tapped and its output gets one more column a signal, laid out like the log-probs beside it: verl
carries it to its data store. The adapter residual takes a second call with the adapter off; the log-probs of that call
are those of the reference, so verl's own reference pass is left out.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
import transfer_queue as tq
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.padding import response_from_nested

from tokencredit.collect.adapter_residual import StateTap, capture_states
from tokencredit.collect.attention.entropies import tap_spans
from tokencredit.errors import TokenCreditError

ASKED = "tokencredit_signals"  # in the meta data of a batch: JSON, the options of each signal that is wanted
REFERENCE = "ref_logprobs"  # a by-product of the residuals

Step = Callable[..., tuple[Any, dict[str, Any]]]


def install() -> None:
    """Let verl's FSDP engine answer; every worker process does it once, as it loads the plugin."""
    if not hasattr(FSDPEngineWithLMHead.forward_step, "tokencredit"):
        FSDPEngineWithLMHead.forward_step = answering(FSDPEngineWithLMHead.forward_step)


def answering(original: Step) -> Step:
    """`forward_step` that adds the signals a batch asks for, and is the original where none is asked for."""

    @functools.wraps(original)
    def forward_step(self: Any, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        asked = tensordict_utils.get_non_tensor_data(micro_batch, ASKED, default=None)
        if not asked or not forward_only:
            return original(self, micro_batch, loss_function, forward_only)
        quiet = micro_batch.copy()
        tensordict_utils.assign_non_tensor(quiet, calculate_entropy=False)
        return _tapped(
            self,
            lambda: original(self, micro_batch, loss_function, True),
            lambda: original(self, quiet, loss_function, True),
            micro_batch,
            json.loads(asked),
        )

    forward_step.tokencredit = True  # type: ignore[attr-defined]
    return forward_step


def _tapped(
    engine: Any, policy: Step, reference: Step, micro_batch: TensorDict, asked: Mapping[str, Mapping[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    """The policy's step, its output with a column for each signal."""
    parallel = getattr(engine, "ulysses_sequence_parallel_size", 1)
    if parallel > 1:
        raise TokenCreditError(
            f"{', '.join(sorted(asked))} need whole sequences in a worker, got ulysses_sequence_parallel_size="
            f"{parallel}",
            hint="set actor_rollout_ref.actor.ulysses_sequence_parallel_size=1",
        )
    ids = micro_batch["input_ids"]
    spans = _spans(ids, packed=bool(tensordict_utils.get_non_tensor_data(micro_batch, "use_remove_padding", True)))
    columns: dict[str, Tensor] = {}
    with ExitStack() as outer:
        states: StateTap | None = None
        if "adapter_residuals" in asked:
            states = outer.enter_context(capture_states(engine.module, None, **asked["adapter_residuals"]))
        with ExitStack() as inner:
            rows: list[Tensor] = []
            if "attention_entropies" in asked:
                rows = inner.enter_context(tap_spans(engine.module, spans, **asked["attention_entropies"]))
            loss, output = policy()
        if rows:
            columns["attention_entropies"] = rows[0]
        if states is not None:
            with engine.disable_adapter():
                columns[REFERENCE] = reference()[1]["model_output"]["log_probs"].values()
            columns["adapter_residuals"] = _flat(states.residuals(), spans)
    lengths = _offsets(ids)
    for name, values in columns.items():
        nested = torch.nested.nested_tensor_from_jagged(values.float(), lengths.to(values.device))
        output["model_output"][column(name)] = nested
    return loss, output


def column(name: str) -> str:
    """The column of a signal in a worker's output: of prompt and response, shifted as log-probs are."""
    return f"tokencredit_{name}"


def _spans(ids: Tensor, packed: bool) -> list[tuple[int, int, int]]:
    """(row, first, stop) of each sequence in what the model sees: one long row, or rows padded behind."""
    pairs = list(pairwise(_offsets(ids).tolist()))
    return [(0, a, b) for a, b in pairs] if packed else [(row, 0, b - a) for row, (a, b) in enumerate(pairs)]


def _offsets(nested: Any) -> Tensor:
    """Where each row begins in the flat values, and the end."""
    return nested.offsets()


def _flat(values: Float[Tensor, "row place"], spans: Sequence[tuple[int, int, int]]) -> Float[Tensor, " token"]:
    return torch.cat([values[row, first:stop] for row, first, stop in spans])


def ask(batch: KVBatchMeta, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Ask the workers for signals in the next pass over the batch."""
    batch.extra_info[ASKED] = json.dumps(options)


def ask_no_more(batch: KVBatchMeta) -> None:
    """Later passes over the same batch, of the reference or of a critic, are left alone."""
    batch.extra_info.pop(ASKED, None)


def keep_response(keys: Sequence[str], partition_id: str, names: Mapping[str, str]) -> None:
    """Cut the workers' columns to the responses and store them, `names[signal]` being the field's name."""
    wanted = [column(name) for name in names]
    data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=[*wanted, "response_mask"])
    for name in wanted:
        if name not in set(data.keys()):
            raise TokenCreditError(
                f"verl's workers stored no `{name}`",
                hint="the signals come from the FSDP engine (actor_rollout_ref.actor.strategy=fsdp or fsdp2); "
                "`tokencredit doctor` checks that the plugin loads in a Ray worker",
            )
    cut = {field: response_from_nested(data[column(name)], data["response_mask"]) for name, field in names.items()}
    tq.kv_batch_put(keys=list(keys), partition_id=partition_id, fields=TensorDict(cut, batch_size=len(keys)))
