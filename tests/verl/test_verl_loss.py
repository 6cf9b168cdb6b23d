"""Credit inside verl's actor loss, on nested micro-batches as its workers pass them, and through a Ray actor."""

from functools import partial
from typing import Any

import pytest
import ray
import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss
from verl_setup import build_trainer, credit_config, nested, rows_of, sampled, widths

from tokencredit import assign_credit
from tokencredit.adapters.verl.loss import credit_loss
from tokencredit.batch.records import TokenBatch
from tokencredit.errors import TokenCreditError

NAMES = {"old_logprobs": "old_log_probs"}


def actor_config() -> Any:
    config = credit_config("+credit=fipo", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4")
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def micro_batch(batch: TokenBatch) -> TensorDict:
    """What `update_actor` hands to the loss; the host's advantages are one number a response."""
    fields = rows_of(batch)
    assert batch.host_advantages is not None
    everywhere = torch.where(batch.response_mask, batch.host_advantages[:, None].expand(batch.response_mask.shape), 0.0)
    data = TensorDict(fields | {"advantages": nested(everywhere, widths(batch))}, batch_size=len(widths(batch)))
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=int(batch.response_mask.sum()), global_batch_size=10)
    return data


def model_output(batch: TokenBatch, logprobs: Tensor, data: TensorDict) -> dict[str, Tensor]:
    """Log-probs of prompt and response, flat, one place early, as the engine returns them."""
    flat = []
    for values, length, prompt in zip(logprobs, widths(batch), data["prompts"].unbind(), strict=True):
        flat += [torch.zeros(len(prompt) - 1), values[:length], torch.zeros(1)]
    return {"log_probs": torch.cat(flat)}


def batch_and_current(scale: float) -> tuple[TokenBatch, Tensor]:
    batch = sampled(seed=11, host_advantages=True)
    assert batch.old_logprobs is not None
    noise = torch.randn(batch.old_logprobs.shape, generator=torch.Generator().manual_seed(2))
    current = (batch.old_logprobs + scale * noise).requires_grad_()
    return TokenBatch(**batch.tensors() | {"current_logprobs": current.detach()}, progress=batch.progress), current


def loss_and_gradient(
    loss_function: Any, batch: TokenBatch, current: Tensor, data: TensorDict
) -> tuple[Tensor, Tensor]:
    loss, _ = loss_function(model_output=model_output(batch, current, data), data=data)
    (gradient,) = torch.autograd.grad(loss, current)
    return loss.detach(), gradient


def test_the_loss_is_verls_on_the_credit_of_the_pure_function() -> None:
    batch, current = batch_and_current(0.3)
    data = micro_batch(batch)
    ours = partial(credit_loss, config=actor_config(), credit="fipo", names=NAMES)
    found = loss_and_gradient(ours, batch, current, data)
    changed = data.copy()
    changed["advantages"] = nested(assign_credit("fipo", batch), widths(batch))
    expected = loss_and_gradient(partial(ppo_loss, config=actor_config()), batch, current, changed)
    stock = loss_and_gradient(partial(ppo_loss, config=actor_config()), batch, current, data)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert float((found[1] - stock[1]).abs().max()) > 1e-4


def test_the_first_update_of_a_batch_is_verls_own() -> None:
    batch, current = batch_and_current(0.0)
    data = micro_batch(batch)
    ours = partial(credit_loss, config=actor_config(), credit="fipo", names=NAMES)
    found = loss_and_gradient(ours, batch, current, data)
    stock = loss_and_gradient(partial(ppo_loss, config=actor_config()), batch, current, data)
    torch.testing.assert_close(found, stock, rtol=0, atol=0)


def test_the_micro_batch_is_left_as_it_was() -> None:
    batch, current = batch_and_current(0.3)
    data = micro_batch(batch)
    before = data["advantages"].values().clone()
    credit_loss(actor_config(), model_output(batch, current, data), data, credit="fipo", names=NAMES)
    assert torch.equal(data["advantages"].values(), before)


def test_a_field_that_the_worker_did_not_get_is_named() -> None:
    batch, current = batch_and_current(0.3)
    data = micro_batch(batch).exclude("entropy")
    names = NAMES | {"entropies": "entropy"}
    with pytest.raises(TokenCreditError, match=r"verl's loss got no `entropy`(.|\n)*bypass_mode=False"):
        credit_loss(actor_config(), model_output(batch, current, data), data, credit="fipo", names=names)


@ray.remote
class Actor:
    """Holds a loss function and calls it on a micro-batch, as verl's `TrainingWorker` does."""

    def set_loss_fn(self, loss_fn: Any) -> None:
        self.loss_fn = loss_fn

    def loss(self, output: dict[str, Tensor], data: TensorDict) -> float:
        loss, _ = self.loss_fn(model_output=output, data=data)
        return float(loss)


def test_the_trainer_hands_its_loss_to_the_actor_worker(store: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo.v1 import PPOTrainerSync

    remote = Actor.remote()

    class Workers:
        def set_loss_fn(self, loss_fn: Any) -> None:
            ray.get(remote.set_loss_fn.remote(loss_fn), timeout=200)

    def setup(trainer: Any) -> None:  # verl's own needs a GPU; what matters here is what comes after it
        trainer.actor_rollout_wg = Workers()

    monkeypatch.setattr(PPOTrainerSync, "_setup", setup)
    trainer = build_trainer(credit_config("+credit=fipo", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"))
    trainer._setup()
    batch, current = batch_and_current(0.3)
    data = micro_batch(batch)
    output = model_output(batch, current.detach(), data)
    local, _ = credit_loss(actor_config(), output, data, credit="fipo", names=NAMES)
    assert ray.get(remote.loss.remote(output, data), timeout=200) == pytest.approx(float(local), abs=1e-7)


def test_nan_in_an_actor_s_forward_reaches_the_driver_with_its_place(store: None) -> None:
    batch, current = batch_and_current(0.3)
    row, column = batch.response_mask.nonzero()[-1].tolist()
    broken = current.detach().clone()
    broken[row, column] = torch.nan
    data = micro_batch(batch)
    remote = Actor.remote()
    remote.set_loss_fn.remote(partial(credit_loss, config=actor_config(), credit="fipo", names=NAMES))
    with pytest.raises(TokenCreditError, match=f"`current_logprobs` must be finite(.)*row {row}, token {column}"):
        ray.get(remote.loss.remote(model_output(batch, broken, data), data), timeout=200)
