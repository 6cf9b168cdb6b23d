"""The exact gradient and the gradients of methods, against plain autograd and finite differences."""

from collections.abc import Iterator

import pytest
import torch
from exact_setup import ACCEPTED, EOS, PROMPTS, sampled, tiny_credit, tiny_model
from torch import Tensor

from tokencredit.collect.exact import score as exact_score
from tokencredit.collect.exact.gradient import (
    advantage_weights,
    exact_weights,
    score_gradients,
    span_of,
    trainable,
)
from tokencredit.collect.exact.trie import build_trie
from tokencredit.collect.exact.values import exact_credit


def flat(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def logprob(prompt: list[int], response: list[int]) -> Tensor:
    """ln π of each token of one response by a plain forward."""
    ids = torch.tensor([[*prompt, *response]])
    table = tiny_model()(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return table.gather(1, torch.tensor(response)[:, None]).squeeze(1)


def exact_gradient(prompt: int) -> Tensor:
    credit = tiny_credit()
    span = credit.trie.spans[prompt]
    weights = exact_weights(credit.trie, credit.nodes)[span.start : span.stop]
    return score_gradients(tiny_model(), PROMPTS[prompt], credit.trie, prompt, weights[None])[0]


@pytest.fixture(params=["packed", "rows"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "rows":
        monkeypatch.setattr(exact_score, "can_pack", lambda *args: False)
    yield


@pytest.mark.usefixtures("either_way")
def test_exact_gradient_is_autograd_of_the_success_probability() -> None:
    for prompt in (0, 1, 3):
        value = torch.stack([logprob(PROMPTS[prompt], c).sum().exp() for c in ACCEPTED[prompt]]).sum()
        expected = flat(torch.autograd.grad(value, trainable(tiny_model())))
        torch.testing.assert_close(exact_gradient(prompt), expected, rtol=1e-9, atol=1e-12)


def test_exact_gradient_is_the_finite_difference_of_the_value() -> None:
    gradient = exact_gradient(0)
    parameters = trainable(tiny_model())
    rng = torch.Generator().manual_seed(5)
    for _ in range(5):
        shift = torch.randn(gradient.numel(), generator=rng, dtype=torch.float64)
        pieces = shift.split([parameter.numel() for parameter in parameters])
        values = []
        for sign in (1e-5, -2e-5, 1e-5):  # there, back past the start, and home
            with torch.no_grad():
                for parameter, piece in zip(parameters, pieces, strict=True):
                    parameter.add_(sign * piece.view_as(parameter))
            moved = exact_credit(tiny_model(), PROMPTS[:1], ACCEPTED[:1], eos_token_id=EOS)
            values.append(float(moved.prompt_values[0]))
        # central difference with step 1e-5: its error is of order step² times the third derivative
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient @ shift), rel=1e-5, abs=1e-9)


@pytest.mark.usefixtures("either_way")
def test_gradients_of_methods_are_sums_of_advantage_times_score() -> None:
    texts = sampled(1, 6, seed=3)[0]
    trie = build_trie([texts])
    width = max(map(len, texts))
    rng = torch.Generator().manual_seed(6)
    advantages = [torch.randn(len(texts), width, generator=rng, dtype=torch.float64) for _ in range(3)]
    advantages.append(2.0 * advantages[0] - advantages[1])  # a combination: costs no backward
    found = score_gradients(tiny_model(), PROMPTS[0], trie, 0, advantage_weights(trie, advantages, 0))
    for row, item in zip(found, advantages, strict=True):
        loss = sum((item[k, : len(text)] * logprob(PROMPTS[0], text)).sum() for k, text in enumerate(texts))
        expected = flat(torch.autograd.grad(loss, trainable(tiny_model())))  # type: ignore[arg-type]
        torch.testing.assert_close(row, expected, rtol=1e-7, atol=1e-9)


def test_the_span_leaves_out_what_others_span() -> None:
    rng = torch.Generator().manual_seed(7)
    weights = torch.randn(2, 9, generator=rng, dtype=torch.float64)
    weights = torch.cat((weights, weights[:1] + weights[1:], 1e6 * weights[:1], torch.zeros(1, 9, dtype=torch.float64)))
    coordinates, basis = span_of(weights)
    assert basis.shape == (2, 9)
    torch.testing.assert_close(coordinates @ basis, weights, rtol=1e-9, atol=1e-9)
    assert span_of(torch.zeros(3, 9))[1].shape == (0, 9)


def test_mean_estimate_of_exact_advantages_is_the_exact_gradient() -> None:
    """E Σ_t A*_t ∇ ln π(y_t) = ∇V, summed over the states of the trie; outside it A* is 0."""
    credit = tiny_credit()
    prompt = 0
    total = torch.zeros_like(exact_gradient(prompt))
    from tokencredit.collect.exact.trie import reach

    passing = reach(credit.trie, credit.nodes.token_logprobs).exp()
    for node in [prompt, *credit.trie.spans[prompt]]:
        if not credit.trie.children[node]:
            continue
        ids: list[int] = []
        at = node
        while at >= credit.trie.prompts:
            ids.insert(0, int(credit.trie.token[at]))
            at = int(credit.trie.parent[at])
        logits = tiny_model()(input_ids=torch.tensor([PROMPTS[prompt] + ids])).logits[0, -1].log_softmax(-1)
        tokens, _, values = credit.children(node)
        q = torch.zeros_like(logits).index_put((tokens,), values)
        a = q - credit.nodes.values[node]
        objective = (logits.exp().detach() * a * logits).sum() * passing[node]
        total += flat(torch.autograd.grad(objective, trainable(tiny_model())))
    torch.testing.assert_close(total, exact_gradient(prompt), rtol=1e-8, atol=1e-11)
