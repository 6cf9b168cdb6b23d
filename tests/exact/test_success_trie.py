"""Our own estimator, worked by hand."""

import math

import pytest
import torch
from exact_setup import ACCEPTED, EOS, PROMPTS, probability, tiny_credit, tiny_model

from tokencredit import TokenBatch, assign_credit, get_pipeline
from tokencredit.collect.exact_gradient import advantage_weights, exact_weights
from tokencredit.collect.exact_trie import build_trie
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
    # both responses have P = ¼, so ω = 2·¼ / (1 − ¾²) = .5/.4375 = 8/7; V̂ of the prompt is ½
    # prefix "1": V̂ = (8/7 + 1·½)/(16/7 + 1) = ½, ω = 2·½ / (1 − ¼) = 4/3, one accepted response passes: ⅔
    # the whole response: V̂ = 1, ω = 8/7
    expected = torch.tensor([[2 / 3, 8 / 7], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(success_trie(batch), expected)


def test_shrinkage_by_hand() -> None:
    batch = batch_of([[1, 2, 4], [3]], [[0.5, 1.0, 0.5], [0.5]], [1.0, 0.0], [0, 0])
    # ω(124) = 8/7 (P = ¼), ω(3) = 4/3 (P = ½); V̂(prompt) = (8/7)/(8/7 + 4/3) = 6/13
    # V̂(1) = (8/7 + κ·6/13)/(8/7 + κ): κ = 1: (104 + 42)/(91) / (15/7) = 146/195; V̂(12) = (8/7 + 146/195)/(15/7)
    first = 146 / 195
    second = (8 / 7 + first) / (15 / 7)
    expected = torch.tensor([[4 / 3 * first, 4 / 3 * second, 8 / 7], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(success_trie(batch), expected)
    # without shrinkage every prefix below the fork is known to succeed
    expected = torch.tensor([[4 / 3, 4 / 3, 8 / 7], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(success_trie(batch, kappa=0.0), expected)


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
