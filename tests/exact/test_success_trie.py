"""Our own estimator, worked by hand."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from exact_setup import ACCEPTED, EOS, PROMPTS, probability, tiny_credit, tiny_model

from tokencredit import TokenBatch, assign_credit, get_pipeline
from tokencredit.batch.reduce import LOCAL
from tokencredit.collect.exact.gradient import advantage_weights, exact_weights
from tokencredit.collect.exact.trie import build_trie
from tokencredit.methods.success_trie import success_trie


def batch_of(rows: list[list[int]], probs: list[list[float]], rewards: list[float], groups: list[int]) -> TokenBatch:
    width = max(map(len, rows))
    return TokenBatch(
        response_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        response_mask=torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows]),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        group_ids=torch.tensor(groups),
        old_logprobs=torch.tensor(
            [[math.log(p) for p in row] + [0.0] * (width - len(row)) for row in probs], dtype=torch.float64
        ),
    )


def test_a_fork_by_hand() -> None:
    batch = batch_of([[1, 2], [1, 3]], [[0.5, 0.5], [0.5, 0.5]], [1.0, 0.0], [0, 0])
    # prefix "1": both ways on were found, ½ each, so V̂ = ½ is proven; ω = 2·½ / (1 − ¼) = 4/3, one accepted passes: ⅔
    # the whole response: V̂ = 1, P = ¼, ω = 2·¼ / (1 − ¾²) = .5/.4375 = 8/7
    expected = torch.tensor([[2 / 3, 8 / 7], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(success_trie(batch), expected)


def test_what_nobody_found_by_hand() -> None:
    batch = batch_of([[1, 2, 4], [3]], [[0.5, 1.0, 0.5], [0.5]], [1.0, 0.0], [0, 0])
    # h(124) = 2·¼·¾² / (1 − ¾²) = 9/14, h(3) = 2·½·½² / (1 − ½²) = ⅓; ρ(prompt) = (9/14)/(9/14 + ⅓) = 27/41
    # κ = 1: ρ(1) = (9/14 + 27/41)/(9/14 + 1) = 747/943, ρ(12) = (9/14 + 747/943)/(23/14) = 18945/21689
    # half of what follows "1" and "12" is proven to succeed, the other half is unknown: V̂ = ½ + ½ρ
    first, second = (1 + 747 / 943) / 2, (1 + 18945 / 21689) / 2
    expected = torch.tensor([[4 / 3 * first, 4 / 3 * second, 8 / 7], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(success_trie(batch, kappa=1.0), expected)
    # without shrinkage every response below the fork is taken to succeed
    expected = torch.tensor([[4 / 3, 4 / 3, 8 / 7], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(success_trie(batch, kappa=0.0), expected)


@pytest.mark.parametrize("kappa", [0.0, 1.0, 16.0, 1e6])
def test_values_are_exact_where_every_response_was_found(kappa: float) -> None:
    # "1" is followed by 1, 2, 3 with ½, ¼, ¼; "2" ends. Accepted: 11 and 13, so V(1) = ¾ whatever is trusted
    rows, probs = [[1, 1], [1, 2], [1, 3], [2]], [[0.8, 0.5], [0.8, 0.25], [0.8, 0.25], [0.2]]
    found = success_trie(batch_of(rows, probs, [1.0, 0.0, 1.0, 0.0], [0] * 4), kappa=kappa)
    # P(1) = .8, G = 4: ω = 3.2 / (1 − .2⁴) = 3.2/.9984, shared by two accepted responses
    assert found[0, 0].item() == found[2, 0].item() == pytest.approx(3.2 / 0.9984 * 0.75 / 2, rel=1e-12)
    # P = .4: ω = 1.6 / (1 − .6⁴) = 1.6/.8704; P = .2: ω = .8 / (1 − .8⁴) = .8/.5904
    assert found[0, 1].item() == pytest.approx(1.6 / 0.8704, rel=1e-12)
    assert found[2, 1].item() == pytest.approx(0.8 / 0.5904, rel=1e-12)


def test_long_responses_do_not_underflow() -> None:
    # 400 tokens of probability 1e-3 (π = 1e-1200) and a last one of ½: half of what follows is proven
    batch = batch_of([[1] * 400 + [2], [3]], [[1e-3] * 400 + [0.5], [0.5]], [1.0, 0.0], [0, 0])
    found = success_trie(batch, kappa=1e9)[0]
    # h(long) = 1, h(3) = ⅓ (above): ρ = ¾ everywhere; in front of the last token V̂ = ½ + ½·¾, at the first ω = 1.0005
    assert found[399].item() == pytest.approx(0.875, rel=1e-6) and found[400].item() == pytest.approx(1.0)
    assert found[0].item() == pytest.approx(0.75 * 0.002 / (1 - 0.999**2), rel=1e-6)


def test_copies_share_the_credit_of_one() -> None:
    batch = batch_of([[1], [1]], [[0.5], [0.5]], [1.0, 1.0], [0, 0])
    # ω = 2·½ / (1 − ¼) = 4/3, shared by two copies
    torch.testing.assert_close(success_trie(batch), torch.full((2, 1), 2 / 3, dtype=torch.float64))


def test_rare_responses_count_once() -> None:
    batch = batch_of([[1], [2]], [[1e-30], [0.5]], [1.0, 0.0], [0, 0])
    assert float(success_trie(batch)[0, 0]) == pytest.approx(1.0)


def test_groups_do_not_share_prefixes() -> None:
    batch = batch_of([[1], [1]], [[0.5], [0.5]], [1.0, 1.0], [0, 1])
    # each is a group of one: ω = ½ / ½ = 1
    torch.testing.assert_close(success_trie(batch), torch.ones(2, 1, dtype=torch.float64))


def test_exact_where_every_response_is_found() -> None:
    """With all accepted responses and one failure for the rest of the mass, κ = 0: the weights P(s)V(s), up to ω."""
    prompt, texts = 1, [ACCEPTED[1][0], [EOS]]  # one accepted response of three letters; the failure leaves at once
    probs = []
    for text in texts:
        whole = [probability(tiny_model(), PROMPTS[prompt], text[: k + 1]) for k in range(len(text))]
        probs.append([b / a for a, b in zip([1.0, *whole[:-1]], whole, strict=True)])
    batch = batch_of(texts, probs, [1.0, 0.0], [0, 0])
    advantages = success_trie(batch, kappa=0.0)
    trie = build_trie([[] for _ in range(prompt)] + [texts])
    found = advantage_weights(trie, [advantages], prompt)[0]
    credit = tiny_credit()
    span = credit.trie.spans[prompt]
    exact = exact_weights(credit.trie, credit.nodes)[span.start : span.stop]
    reached = torch.tensor([math.prod(probs[0][: k + 1]) for k in range(4)], dtype=torch.float64)
    weight = 2 * reached / (1 - (1 - reached) ** 2)
    # P(s) V(s) = P(c) for every prefix of the one accepted response c; ours has ω(s) V̂(s) with V̂ = 1
    torch.testing.assert_close(exact, torch.full((4,), float(reached[-1]), dtype=torch.float64))
    torch.testing.assert_close(found[:4], weight)


def test_the_preset_is_the_estimator() -> None:
    batch = batch_of([[1, 2], [1, 3]], [[0.5, 0.5], [0.5, 0.5]], [1.0, 0.0], [0, 0])
    torch.testing.assert_close(assign_credit(get_pipeline("success_trie"), batch), success_trie(batch).float())


class Handed:
    """A reducer of one process that counts the numbers it is handed."""

    numbers = 0

    def total(self, local: torch.Tensor) -> torch.Tensor:
        self.numbers += local.numel()
        return local

    maximum = total

    def labels(self, group_ids: torch.Tensor) -> torch.Tensor:
        return self.total(group_ids.unique())


def test_prefixes_of_groups_that_lie_on_one_process_stay_there() -> None:
    rng = torch.Generator().manual_seed(0)
    rows, width = 24, 200
    batch = TokenBatch(
        response_ids=torch.randint(0, 3, (rows, width), generator=rng),
        response_mask=torch.ones(rows, width, dtype=torch.bool),
        rewards=(torch.rand(rows, generator=rng) < 0.5).double(),
        group_ids=torch.arange(rows) // 4,
        old_logprobs=torch.rand(rows, width, generator=rng, dtype=torch.float64).log(),
        reducer=(reducer := Handed()),
    )
    found = success_trie(batch)
    assert reducer.numbers < 5 * rows < rows * width  # labels and sizes of groups and of whole responses
    assert torch.equal(found, success_trie(replace(batch, reducer=LOCAL)))


@pytest.mark.parametrize(("size", "on_x"), [(2, 0.363), (3, 0.365), (4, 0.373)])
def test_both_ends_of_a_fork_in_expectation(size: int, on_x: float) -> None:
    """x (.8), then a (.5, accepted) or b; else y. P V is .4 on x, .4 on a: x falls short, a does not."""
    kinds = [([1, 2], [0.8, 0.5], 1.0, 0.4), ([1, 3], [0.8, 0.5], 0.0, 0.4), ([4], [0.2], 0.0, 0.2)]
    expected = torch.zeros(2, dtype=torch.float64)
    for drawn in product(kinds, repeat=size):
        rows, probs, rewards, chances = zip(*drawn, strict=True)
        credit = success_trie(batch_of(list(rows), list(probs), list(rewards), [0] * size))
        wide = torch.nn.functional.pad(credit, (0, 2 - credit.shape[1]))
        expected += math.prod(chances) * wide.sum(0) / size
    assert expected[0].item() == pytest.approx(on_x, abs=6e-4)
    assert expected[1].item() == pytest.approx(0.4, rel=1e-9)


def test_what_counts_as_accepted_can_be_set() -> None:
    rows, probs = [[1, 2], [1, 3]], [[0.5, 0.5], [0.5, 0.5]]
    shaped = success_trie(batch_of(rows, probs, [1.1, 0.1], [0, 0]), threshold=0.5)
    torch.testing.assert_close(shaped, success_trie(batch_of(rows, probs, [1.0, 0.0], [0, 0])))
