"""Attention entropies from queries and keys: values by hand, blocks, GQA, windows, soft-caps, sinks, the kernel."""

import math

import pytest
import torch

from tokencredit.collect.attention import rows as attention_rows
from tokencredit.collect.attention import short as attention_short
from tokencredit.collect.attention.rhythms import head_maps
from tokencredit.collect.attention.rows import Visibility, head_entropies, row_statistics

# Two heads, four tokens, two dimensions, scale 1/√2.
QUERY = torch.tensor([[[[1, 0], [0, 1], [1, 1], [2, 0]], [[0, 1], [1, 0], [1, -1], [-1, 2]]]], dtype=torch.float32)
KEY = torch.tensor([[[[1, 0], [0, 1], [1, 1], [-1, 1]], [[0, 1], [2, 0], [1, 1], [0, -1]]]], dtype=torch.float32)
SCALE = 1 / math.sqrt(2)
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()

# keys, visible, Ê of the mean row, mean of the heads' Ê, number of visible keys
GOLDEN = {
    "as given": (KEY, CAUSAL, [0, 0.831098, 0.924700, 0.722377], [0, 0.814075, 0.812743, 0.705749], [1, 2, 3, 4]),
    "both heads read one key head": (
        KEY[:, :1],
        CAUSAL,
        [0, 1, 0.956245, 0.989942],
        [0, 0.915170, 0.904693, 0.764569],
        [1, 2, 3, 4],
    ),
    "window of two": (
        KEY,
        CAUSAL & ~CAUSAL.tril(-2),
        [0, 0.831098, 0.986878, 0.407179],
        [0, 0.814075, 0.814075, 0.400750],
        [1, 2, 2, 2],
    ),
    "key 0 is padding": (
        KEY,
        CAUSAL & (torch.arange(4) > 0),
        [0, 0, 0.986878, 0.594433],
        [0, 0, 0.814075, 0.583286],
        [0, 1, 2, 3],
    ),
}


def masked(mask: torch.Tensor) -> Visibility:
    return Visibility(lambda sequence, rows: mask[rows])


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("block", [1, 3, 128])
def test_golden_rows(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_rows, "BLOCK", block)
    monkeypatch.setattr(attention_rows, "LEAST", 1)
    key, mask, rows, entropies, counts = GOLDEN[name]
    visibilities = [masked(mask)] + ([Visibility()] if torch.equal(mask, CAUSAL) else [])
    for visibility in visibilities:
        first = row_statistics(QUERY, key, visibility, scale=SCALE)
        second = row_statistics(QUERY, key, visibility, scale=SCALE, heads="mean_entropy")
        torch.testing.assert_close(first.entropies, torch.tensor([rows]).float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(second.entropies, torch.tensor([entropies]).float(), rtol=0, atol=1e-6)
        assert first.counts.tolist() == [counts]


def test_row_three_by_hand() -> None:
    # heads 1.055832 and .900919 nats; mean row (.527494, …): sink .527494; E_rest/ln 3 = .655636/1.098612 = .596785
    nats = head_entropies(QUERY, KEY, Visibility(), scale=SCALE)
    torch.testing.assert_close(nats[0, :, 3], torch.tensor([1.055832, 0.900919]), rtol=0, atol=1e-6)
    found = row_statistics(QUERY, KEY, Visibility(), scale=SCALE, rows=slice(3, 4), drop_sink=1)
    torch.testing.assert_close(found.entropies, torch.tensor([[0.596785]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sink_mass, torch.tensor([[0.527494]]), rtol=0, atol=1e-6)
    # the sink mass itself is part of E: h_b(.527494) + .472506 · .655636 = 1.001427
    sink = torch.tensor(0.527494)
    whole = torch.special.entr(sink) + torch.special.entr(1 - sink) + (1 - sink) * 0.655636
    given = row_statistics(QUERY, KEY, Visibility(), scale=SCALE, rows=slice(3, 4)).entropies * math.log(4)
    torch.testing.assert_close(given[0, 0], whole, rtol=0, atol=2e-6)


def test_dropping_the_sink_of_each_head_is_another_number() -> None:
    # masking key 0 per head and renormalising each: the mean of the heads' entropies over ln 3
    found = row_statistics(QUERY, KEY, Visibility(), scale=SCALE, heads="mean_entropy", drop_sink=1)
    logits = (QUERY[0, :, 3] * SCALE)[:, None] @ KEY[0].transpose(1, 2)
    rest = torch.softmax(logits[:, 0, 1:], -1)
    wanted = torch.special.entr(rest).sum(-1).mean() / math.log(3)
    torch.testing.assert_close(found.entropies[0, 3], wanted)


def test_softcap_on_head_one() -> None:
    nats = head_entropies(QUERY[:, :1], KEY[:, :1], Visibility(), scale=SCALE, softcap=1.0)
    torch.testing.assert_close(nats[0, 0, 3], torch.tensor(1.206078), rtol=0, atol=1e-6)


def test_normaliser_of_the_whole_context() -> None:
    found = row_statistics(QUERY, KEY, Visibility(), scale=SCALE, context="total").entropies
    torch.testing.assert_close(found[0, 1], torch.tensor(0.576073 / math.log(4)), rtol=0, atol=1e-6)


def random_qk(seed: int = 0, sharp: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 6, 70, 32, generator=g) * sharp
    return query, torch.randn(2, 2, 70, 32, generator=g) + 3.0 * torch.randn(1, 2, 1, 32, generator=g)


def eager64(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    scores = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)


@pytest.mark.parametrize("sharp", [1.0, 4.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64(sharp: float, dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in random_qk(sharp=sharp))
    mask = torch.ones(70, 70, dtype=torch.bool).tril()
    probs = eager64(query, key, mask, 32**-0.5)
    heads = head_entropies(query, key, Visibility(), scale=32**-0.5)
    assert float((heads - torch.special.entr(probs).sum(-1)).abs().max()) < 1e-4
    found = row_statistics(query, key, Visibility(), scale=32**-0.5, rows=slice(30, 65)).entropies
    mean = torch.special.entr(probs.mean(1)).sum(-1) / torch.arange(1, 71).clamp_min(2).log()
    assert float((found - mean[:, 30:65]).abs().max()) < 1e-5


def test_keys_as_values_give_the_same_entropy() -> None:
    # H = lse − scale · q·Σ p k: an attention call with V := K, exact where scores are linear in k. An oracle only.
    query, key = random_qk(sharp=1.0)
    wide = key.repeat_interleave(3, 1).double()
    scores = (query.double() @ wide.mT * 32**-0.5).masked_fill(~torch.ones(70, 70).tril().bool(), -torch.inf)
    pulled = torch.nn.functional.scaled_dot_product_attention(query.double(), wide, wide, is_causal=True)
    identity = scores.logsumexp(-1) - 32**-0.5 * (query.double() * pulled).sum(-1)
    found = head_entropies(query, key, Visibility(), scale=32**-0.5)
    assert float((found - identity).abs().max()) < 1e-5


def test_shorter_queries_than_keys_see_up_to_the_diagonal() -> None:
    query, key = random_qk()
    whole = row_statistics(query, key, Visibility(), scale=0.2).entropies
    last = row_statistics(query[:, :, -5:], key, Visibility(), scale=0.2).entropies
    torch.testing.assert_close(last, whole[:, -5:])


def test_a_finite_bias_is_part_of_the_scores() -> None:
    query, key = random_qk()
    bias = -0.1 * (torch.arange(70)[:, None] - torch.arange(70)[None]).float()
    mask = torch.ones(70, 70, dtype=torch.bool).tril()
    visibility = Visibility(lambda sequence, rows: mask[rows], lambda sequence, rows: bias[rows])
    found = head_entropies(query, key, visibility, scale=0.2)
    scores = query.double() @ key.double().repeat_interleave(3, 1).mT * 0.2 + bias
    probs = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    assert float((found - torch.special.entr(probs).sum(-1)).abs().max()) < 1e-4


@pytest.mark.parametrize("heads", ["mean_rows", "mean_entropy"])
@pytest.mark.parametrize("drop", [0, 1])
@pytest.mark.parametrize("context", ["visible", "total"])
def test_many_short_sequences_at_once(heads: str, drop: int, context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    query, key = torch.randn(9, 6, 12, 8, generator=g) * 3, torch.randn(9, 2, 12, 8, generator=g)
    starts = torch.tensor([0, 3, 11, 5, 0, 1, 2, 7, 12])  # left padding; the last sees nothing
    seen = torch.ones(12, 12, dtype=torch.bool).tril() & (torch.arange(12) >= starts[:, None, None])
    bias = torch.randn(9, 12, 12, generator=g)
    padded = Visibility(
        lambda sequence, rows: seen[sequence, ..., rows, :], lambda sequence, rows: bias[sequence, ..., rows, :]
    )
    for visibility in (padded, Visibility()):
        options = {"scale": 0.4, "rows": slice(4, 11), "heads": heads, "drop_sink": drop, "context": context}
        found = []
        for scores in (0, 6 * 7 * 12 * 4, 1 << 19):  # row by row, four sequences at once, all at once
            monkeypatch.setattr(attention_short, "SCORES", scores)
            found.append(row_statistics(query, key, visibility, softcap=20.0, **options))
        for other in found[1:]:
            for one, two in zip(found[0], other, strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_distances_and_influences_by_hand() -> None:
    # rows (1), (.5, .5), (.2, .3, .5), (.4, .1, .1, .4): q = 1, k = ln of the last row's weights would not give all
    # rows, so each row is its own query with one dimension per key.
    rows = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.4, 0.1, 0.1, 0.4]])
    query = rows.clamp_min(1e-30).log()[None, None]
    maps = head_maps(query, torch.eye(4)[None, None], Visibility(), scale=1.0, rows=slice(0, 4))
    # Σ a · distance: 0, .5, .2·2 + .3 = .7, .4·3 + .1·2 + .1 = 1.5
    torch.testing.assert_close(maps.distances[0, 0], torch.tensor([0, 0.5, 0.7, 1.5]), rtol=0, atol=1e-6)


def test_influences_and_caps_against_the_whole_map() -> None:
    query, key = random_qk(sharp=1.0)
    rows = slice(12, 70)
    maps = head_maps(query, key, Visibility(), scale=0.2, rows=rows)
    probs = eager64(query, key, torch.ones(70, 70, dtype=torch.bool).tril(), 0.2)
    back = (torch.arange(70)[:, None] - torch.arange(70)[None]).clamp_min(0)
    torch.testing.assert_close(
        maps.distances.double(), (probs * back.clamp_max(10)).sum(-1)[:, :, rows], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(maps.reach.double(), (probs * back).sum(-1)[:, :, rows], rtol=1e-5, atol=1e-5)
    for s in (12, 40, 59, 60, 69):
        lookers = [t for t in range(12, 70) if s + 10 <= t <= s + 50]
        wanted = probs[:, :, lookers, s].mean(-1) if lookers else torch.zeros(2, 6, dtype=torch.float64)
        torch.testing.assert_close(maps.influences[:, :, s - 12].double(), wanted, rtol=1e-5, atol=1e-6)
