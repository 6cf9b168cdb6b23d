"""Credit inside verl's actor loss, for methods that need the policy which is being updated (`credit.timing=update`).

The driver hands `credit_loss` to the actor workers (`set_loss_fn`). It sees one micro-batch on its device, so methods
that pool responses are refused beforehand, and no collective is called.
"""

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from tokencredit.adapters.verl.batch import SOURCES, nested_like, one_per_response, padded
from tokencredit.adapters.verl.rows import SCHEDULE, read_schedule, scored_rows
from tokencredit.batch.records import TokenBatch
from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.assign import assign_credit


def credit_loss(
    config: Any,
    model_output: dict[str, Any],
    data: TensorDict,
    dp_group: Any = None,
    *,
    credit: Any,
    names: Mapping[str, str],
) -> tuple[Tensor, dict[str, Any]]:
    """verl's `ppo_loss` on the advantages of `credit`; `data` itself is used again by later epochs and stays.

    `names` are verl's names of the fields that `credit` reads (`verl_batch.stored_names`).
    """
    current = no_padding_2_padding(model_output["log_probs"], data).detach()
    batch = micro_batch(names, data, current)
    changed = data.copy()
    changed["advantages"] = nested_like(assign_credit(credit, batch), data["response_mask"])
    return ppo_loss(config, model_output, changed, dp_group)


def micro_batch(names: Mapping[str, str], data: TensorDict, current: Tensor) -> TokenBatch:
    """The rows of one micro-batch; every row is a group of its own, no method here looks at groups."""
    width = current.shape[1]
    mask = padded(data["response_mask"], width).bool()
    present = set(data.keys())
    for name, stored in names.items():
        if stored not in present:
            raise TokenCreditError(f"verl's loss got no `{stored}` for `{name}`", hint=SOURCES[name][1])
    fields: dict[str, Any] = {name: padded(data[stored], width).float() for name, stored in names.items()}
    return TokenBatch(
        response_ids=padded(data["responses"], width),
        response_mask=mask,
        rewards=padded(data["rm_scores"], width).float().sum(1),
        group_ids=torch.arange(mask.shape[0], device=mask.device),
        host_advantages=one_per_response(padded(data["advantages"], width), mask),
        current_logprobs=current.float(),
        scored=scored_rows(mask),
        **read_schedule(tensordict_utils.get_non_tensor_data(data, SCHEDULE, default=None)),
        **fields,
    )
