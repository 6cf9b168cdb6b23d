"""The library on a CUDA device, imitated on the CPU: the rules of `support.fakecuda`, and every method under them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import make_batch
from support import fakecuda
from transformers import Qwen3Config, Qwen3ForCausalLM

from tokencredit import TokenBatch, TokenCreditError, assign_credit, get_pipeline
from tokencredit.collect.attention.entropies import attention_entropies, tap_entropies
from tokencredit.collect.exact.score import node_logprobs
from tokencredit.collect.exact.trie import build_trie
from tokencredit.collect.exact.values import exact_credit
from tokencredit.collect.head.logprobs import head_logprobs
from tokencredit.collect.logprobs import token_logprobs
from tokencredit.diagnostics.summary import credit_metrics, credit_sums
from tokencredit.lab import sampler
from tokencredit.methods.table import PRESETS
from tokencredit.seeds import generator


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    fakecuda.require()


def test_tensors_of_two_devices_are_refused() -> None:
    with fakecuda.session() as stats:
        ours = fakecuda.cuda(torch.ones(2, 3))
        for operation in (
            lambda: ours + torch.ones(2, 3),
            lambda: torch.ones(2, 3).index_add_(0, fakecuda.cuda(torch.tensor([0])), torch.ones(1, 3)),
            lambda: torch.ones(3)[fakecuda.cuda(torch.tensor([0]))],
            lambda: torch.where(torch.ones(2, 3, dtype=torch.bool), ours, 0.0),
            lambda: torch.nn.functional.embedding(torch.tensor([0]), ours),
        ):
            with pytest.raises(fakecuda.DeviceFault, match="tensors of two devices"):
                operation()
    assert stats.faults.total() == 5
    with fakecuda.session(strict=False) as lenient:
        assert fakecuda.cpu(fakecuda.cuda(torch.ones(2)) + torch.ones(2)).tolist() == [2.0, 2.0]
    assert lenient.faults.total() == 1


def test_what_cuda_allows_runs_and_has_the_values_of_the_cpu() -> None:
    values = torch.arange(6.0).view(2, 3)
    with fakecuda.session():
        ours = fakecuda.cuda(values)
        assert ours.device.type == "cuda" and ours.is_cuda
        got = [
            ours * torch.tensor(2.0),  # a CPU tensor without dimensions
            ours[torch.tensor([1])],  # a CPU index
            ours[[1]],
            ours[:, [0, 2]],
            ours.new_tensor([1.0, 2.0]),
            torch.zeros(2, device=ours.device),
            torch.as_tensor([1, 2], device="cuda"),
            ours.clone().add_(1.0).mul_(2.0),
        ]
        assert all(item.device.type == "cuda" for item in got)
        assert ours.cpu().device.type == "cpu" and ours.to("cpu").sum().item() == 15.0
    wanted = [
        *(values * 2, values[1:], values[1:], values[:, [0, 2]], torch.tensor([1.0, 2.0]), torch.zeros(2)),
        *(torch.tensor([1, 2]), (values + 1) * 2),
    ]
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(fakecuda.cpu(one), other)


def test_the_device_has_a_random_stream_of_its_own() -> None:
    with fakecuda.session():
        host, device = torch.get_rng_state(), torch.cuda.get_rng_state()
        torch.rand(3, device="cuda")
        assert torch.equal(torch.get_rng_state(), host)
        assert not torch.equal(torch.cuda.get_rng_state(), device)
        with torch.random.fork_rng(devices=["cuda:0"]):
            kept = torch.cuda.get_rng_state()
            torch.manual_seed(3)  # seeds every device
            first = torch.rand(3, device="cuda")
        assert torch.equal(torch.cuda.get_rng_state(), kept)
        seeded = torch.Generator(device="cuda")
        seeded.manual_seed(3)
        assert torch.equal(torch.rand(3, device="cuda", generator=seeded), first)
        with pytest.raises(fakecuda.DeviceFault, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(fakecuda.DeviceFault, match="generator"):
            torch.rand(3, generator=seeded)


def test_waits_and_launches_are_counted_with_their_line() -> None:
    with fakecuda.session() as stats:
        ours = fakecuda.cuda(torch.arange(4.0))
        (ours * 2).view(2, 2)
        assert (stats.kernels, stats.bytes, stats.syncs) == (1, 32, 0)
        assert ours.sum().item() == 6.0
        ours[ours > 1]
        ours.cpu()
        ours.tolist()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(ours)
    assert {name for name, _ in stats.sync_at} == {
        *("_local_scalar_dense", "boolean index", "copy between host and device", "tolist")
    }
    assert all(line.startswith("test_pretend_cuda.py:") for _, line in stats.sync_at)


def test_nothing_of_a_session_stays() -> None:
    before = (torch.tensor, torch.as_tensor, torch.Generator, torch.cuda.device_count())
    with fakecuda.session(), fakecuda.session():
        assert torch.cuda.device_count() == 1
        assert isinstance(generator("test"), torch.Generator)
    assert (torch.tensor, torch.as_tensor, torch.Generator, torch.cuda.device_count()) == before
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        torch.zeros(2, device="cuda")


def test_tied_weights_stay_tied() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)])
    model[1].weight = model[0].weight
    with fakecuda.session():
        moved = fakecuda.move_module(model)
        assert moved[0].weight is moved[1].weight
        assert moved[0].weight.is_cuda and isinstance(moved[0].weight, torch.nn.Parameter)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_gives_the_numbers_of_the_cpu(name: str) -> None:
    batch, pipeline = make_batch(seed=1), get_pipeline(name)
    expected = assign_credit(pipeline, batch, generator=generator("test"))
    with fakecuda.session():
        on_device = fakecuda.cuda(batch)
        credit = assign_credit(pipeline, on_device, generator=generator("test"))
        metrics = credit_metrics(on_device, credit, on_device.rewards)
    assert credit.is_cuda
    assert torch.equal(fakecuda.cpu(credit), expected)
    assert metrics == pytest.approx(credit_metrics(batch, expected, batch.rewards), nan_ok=True)


GROUP_METHODS = ("grpo", "dr_grpo", "hapo", "hapo_balanced", "surprisal", "entropy_reduction", "fipo", "opd")


@pytest.mark.parametrize("name", GROUP_METHODS)
def test_a_micro_batch_waits_once(name: str) -> None:
    whole = make_batch(seed=1, host_advantages=True)
    whole = whole.rows(whole.counted.nonzero()[:, 0])
    with fakecuda.session() as stats:
        fields = fakecuda.cuda(whole.tensors())
        stats.syncs, started = 0, stats.kernels
        batch = TokenBatch(**fields, progress=0.25, step=20)
        credit = assign_credit(name, batch)
        waiting = dict(stats.sync_at)
        pending = credit_sums(batch, credit, batch.host_advantages)
        assert stats.syncs == 1, (waiting, stats.sync_at)
        assert stats.kernels - started < 800, stats.ops.most_common(10)
        metrics = pending.numbers()
        assert stats.syncs == 2
    expected = assign_credit(name, whole)
    assert metrics == pytest.approx(credit_metrics(whole, expected, whole.host_advantages))


def test_launches_do_not_grow_with_the_columns() -> None:
    counts: dict[str, list[int]] = {}
    for width in (100, 1600):
        batch = make_batch(seed=2, response=width, groups=(4, 4))
        long = torch.rand(8, width, generator=generator("test")) < 0.9
        batch = replace(batch, response_mask=long)
        for name in ("fipo", "success_trie", "opd_confidence"):
            with fakecuda.session() as stats:
                on_device = fakecuda.cuda(batch)
                stats.kernels = 0
                assign_credit(CONFIDENCE if name == "opd_confidence" else name, on_device)
                counts.setdefault(name, []).append(stats.kernels)
    for name, (short, wide) in counts.items():
        assert wide - short <= 40, (name, short, wide)  # four more doublings, of five launches each


CONFIDENCE = ["teacher_log_ratio", "teacher_confidence"]


def test_a_batch_with_rows_that_do_not_count_is_computed_again() -> None:
    batch = make_batch(seed=1, scored=torch.arange(11) != 4)
    rewards = torch.where(batch.scored, batch.rewards, torch.nan)
    for name in ("hapo", "empg", "clip_cov"):
        with fakecuda.session():
            on_device = replace(fakecuda.cuda(batch), rewards=fakecuda.cuda(rewards))
            credit = assign_credit(name, on_device, generator=generator("test"))
        assert torch.equal(fakecuda.cpu(credit), assign_credit(name, batch, generator=generator("test")))


def test_what_cannot_be_read_is_refused_at_the_one_look() -> None:
    batch = make_batch(seed=1)
    with fakecuda.session():
        on_device = fakecuda.cuda(batch)
        for name, value in (("rewards", torch.nan), ("entropies", torch.inf), ("entropies", -1.0)):
            broken = getattr(batch, name).clone()
            broken[batch.counted] = value
            with pytest.raises(TokenCreditError, match=f"`{name}` must be"):
                assign_credit("hapo", replace(on_device, **{name: fakecuda.cuda(broken)}))

        def overflowing(advantages: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
            return advantages * 1e300 * 1e300

        with pytest.raises(TokenCreditError, match="overflowing gave"):
            assign_credit(["group_normalized", overflowing], on_device)


def test_a_batch_is_checked_where_it_lies() -> None:
    batch = make_batch()
    broken = torch.where(batch.response_mask, float("nan"), 0.0)
    with fakecuda.session():
        on_device = fakecuda.cuda(batch)
        with pytest.raises(TokenCreditError, match="entropies"):
            assign_credit("hapo", replace(on_device, entropies=fakecuda.cuda(broken)))


PROMPTS, EOS = [[2, 3, 4], [5, 4, 3]], 1


def tiny_model() -> Qwen3ForCausalLM:
    """A random model with grouped heads, eager attention and a head of its own."""
    shape = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(
        **shape, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=None, eos_token_id=EOS
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).eval()


def responses(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Everything that a pass of ours measures on responses of three tokens, on the device of `ids`."""
    mask = torch.ones_like(ids)
    with torch.no_grad(), tap_entropies(model, 3) as tapped:
        model(input_ids=ids, attention_mask=mask)
    hidden = model.get_input_embeddings()(ids)[:, :3].reshape(-1, 16).detach()
    return [
        *token_logprobs(model, ids, mask, 3, 3),
        attention_entropies(model, ids, mask, 3, 3),
        *tapped,
        *head_logprobs(hidden, model.lm_head.weight.detach(), ids[:, 3:].flatten()),
    ]


def test_collectors_give_the_numbers_of_the_cpu() -> None:
    ids = torch.tensor([[2, 3, 4, 5, 6, 1], [5, 4, 3, 2, 7, 1]])
    model = tiny_model()
    expected = responses(model, ids)
    with fakecuda.session():
        measured = responses(fakecuda.move_module(model), fakecuda.cuda(ids))
    assert len(measured) == len(expected) == 6
    for one, other in zip(measured, expected, strict=True):
        torch.testing.assert_close(fakecuda.cpu(one), other)


def test_the_sampler_of_the_lab_draws_the_tokens_of_the_cpu() -> None:
    def drawn(model: torch.nn.Module, ids: torch.Tensor) -> sampler.Samples:
        options = {"max_new_tokens": 5, "eos_token_id": EOS, "generator": generator("test"), "num_return": 3}
        return sampler.sample(model, ids, torch.ones_like(ids), **options)

    model, ids = tiny_model(), torch.tensor(PROMPTS)
    expected = drawn(model, ids)
    with fakecuda.session():
        measured = drawn(fakecuda.move_module(model), fakecuda.cuda(ids))
    assert torch.equal(fakecuda.cpu(measured.ids), expected.ids)
    torch.testing.assert_close(fakecuda.cpu(measured.logprobs), expected.logprobs)


def test_generate_of_the_host_runs_on_the_device() -> None:
    model, ids = tiny_model(), torch.tensor(PROMPTS)
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    with fakecuda.session():
        moved = fakecuda.move_module(model)
        measured = moved.generate(input_ids=fakecuda.cuda(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(fakecuda.cpu(measured), expected)


def test_exact_values_of_a_model_on_the_device() -> None:
    accepted = [[[2, 3, EOS], [2, 4, EOS]], [[3, EOS]]]
    model = tiny_model()
    expected = exact_credit(model, PROMPTS, accepted, eos_token_id=EOS)
    with fakecuda.session():
        measured = exact_credit(fakecuda.move_module(model), PROMPTS, accepted, eos_token_id=EOS)
    torch.testing.assert_close(fakecuda.cpu(measured.prompt_values), expected.prompt_values)


@pytest.mark.parametrize("packed", [True, False])
def test_log_probs_of_a_trie_run_on_the_device(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trie = build_trie([[[2, 3, EOS], [2, 4, EOS]]])
    monkeypatch.setattr("tokencredit.collect.exact.score.fits_packed", lambda *_: packed)
    expected = node_logprobs(tiny_model(), PROMPTS[0], trie, 0)
    with fakecuda.session():
        measured = node_logprobs(fakecuda.move_module(tiny_model()), PROMPTS[0], trie, 0)
    torch.testing.assert_close(fakecuda.cpu(measured), expected)
