"""Schedules and subsets by attention entropy, and the other rules on attention, against values worked by hand."""

from dataclasses import replace

import pytest
import torch

from tokencredit.batch.records import TokenBatch
from tokencredit.errors import TokenCreditError
from tokencredit.methods.attention.anchors import keep_attention
from tokencredit.methods.attention.rhythm import answer_attention, attention_rhythm
from tokencredit.methods.attention.schedules import attention_gate, attention_schedule, attention_tilt, rank_quantiles
from tokencredit.methods.controls import position_matched_shuffle
from tokencredit.methods.position import keep_positions
from tokencredit.methods.selection import lowest_or_highest
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import get_pipeline

ENTROPIES = [0.30, 0.85, 0.10, 0.55, 0.55, 0.95, 0.40, 0.20, 0.70, 0.60]
# ranks 3, 9, 1, 5.5, 5.5, 10, 4, 2, 8, 7
NINE_Q = [2, 8, 0, 4.5, 4.5, 9, 3, 1, 7, 6]


def batch_of(values: list[list[float]], field: str = "attention_entropies", **fields: object) -> TokenBatch:
    longest = max(len(row) for row in values)
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in values])
    padded = torch.tensor([row + [float("nan")] * (longest - len(row)) for row in values], dtype=torch.float64)
    given = {
        "response_ids": torch.arange(mask.numel()).view(mask.shape),
        "response_mask": mask,
        "rewards": torch.ones(len(values)),
        "group_ids": torch.zeros(len(values), dtype=torch.long),
        field: padded,
    }
    return TokenBatch(**(given | fields))  # type: ignore[arg-type]


def ones(batch: TokenBatch) -> torch.Tensor:
    return torch.ones(batch.response_mask.shape, dtype=torch.float64)


def test_rank_quantiles_average_ties() -> None:
    x = torch.tensor([ENTROPIES], dtype=torch.float64)
    quantiles = rank_quantiles(x, torch.ones(1, 10, dtype=torch.bool))
    torch.testing.assert_close(9 * quantiles, torch.tensor([NINE_Q], dtype=torch.float64))
    assert rank_quantiles(x[:, :1], torch.ones(1, 1, dtype=torch.bool)).item() == 0.5


def test_schedule_at_the_start_the_middle_and_the_end() -> None:
    expected = torch.tensor([[1.277778, 0.611111, 1.5, 1, 1, 0.5, 1.166667, 1.388889, 0.722222, 0.833333]]).double()
    for progress, wanted in ((0.0, expected), (1.0, 2 - expected), (0.25, (1 + expected) / 2)):
        batch = batch_of([ENTROPIES], progress=progress)
        torch.testing.assert_close(attention_schedule(ones(batch), batch), wanted, rtol=0, atol=1e-6)
    middle = batch_of([ENTROPIES], progress=0.5)
    assert torch.equal(attention_schedule(ones(middle), middle), ones(middle))


def test_tilt() -> None:
    expected = [0.784534, 1.331333, 0.647282, 0.997722, 0.997722, 1.465702, 0.863716, 0.712611, 1.152519, 1.046861]
    batch = batch_of([ENTROPIES], progress=1.0)
    torch.testing.assert_close(attention_tilt(ones(batch), batch), torch.tensor([expected]).double(), rtol=0, atol=1e-6)


def test_gate() -> None:
    expected = [1.281038, 0.505066, 1.287743, 1.181044, 1.181044, 0.429347, 1.266083, 1.286073, 0.670517, 0.912045]
    batch = batch_of([ENTROPIES], progress=0.5)
    torch.testing.assert_close(attention_gate(ones(batch), batch), torch.tensor([expected]).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("transform", [attention_schedule, attention_tilt, attention_gate])
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_schedules_have_mean_one_and_leave_equal_entropies_alone(transform: object, progress: float) -> None:
    batch = batch_of([ENTROPIES, [0.4, 0.1, 0.7], [0.2] * 4, [0.9], []], progress=progress)
    credit = transform(ones(batch), batch)  # type: ignore[operator]
    mean = credit.sum(1)[:4] / batch.response_mask.sum(1)[:4]
    torch.testing.assert_close(mean, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(credit[2, :4], torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("transform", [attention_schedule, attention_tilt, attention_gate])
def test_high_to_low_is_the_schedule_run_backwards(transform: object) -> None:
    early, late = batch_of([ENTROPIES], progress=0.125), batch_of([ENTROPIES], progress=0.875)
    forward = transform(ones(early), early)  # type: ignore[operator]
    backward = transform(ones(late), late, direction="high_to_low")  # type: ignore[operator]
    torch.testing.assert_close(forward, backward, rtol=0, atol=1e-12)


def test_named_directions() -> None:
    start, end = batch_of([ENTROPIES], progress=0.0), batch_of([ENTROPIES], progress=1.0)
    anchors = attention_schedule(ones(start), start)
    for batch in (start, end, replace(start, progress=None)):
        assert torch.equal(attention_schedule(ones(start), batch, direction="anchors"), anchors)
        explorers = attention_schedule(ones(start), batch, direction="explorers")
        torch.testing.assert_close(explorers, 2 - anchors, rtol=0, atol=1e-15)
    assert torch.equal(attention_schedule(ones(end), end, direction="low_to_uniform"), ones(end))
    assert torch.equal(attention_schedule(ones(start), start, direction="low_to_uniform"), anchors)


def test_without_progress_training_has_just_begun() -> None:
    batch = batch_of([ENTROPIES])
    start = replace(batch, progress=0.0)
    assert torch.equal(attention_schedule(ones(batch), batch), attention_schedule(ones(start), start))


def test_monotone_maps_of_the_signal_change_nothing() -> None:
    batch = batch_of([ENTROPIES], progress=0.1)
    mapped = replace(batch, attention_entropies=batch.attention_entropies.square() * 7 - 1)
    assert torch.equal(attention_schedule(ones(batch), batch), attention_schedule(ones(batch), mapped))
    assert torch.equal(keep_attention(ones(batch), batch), keep_attention(ones(batch), mapped))


def test_only_positive_credit_moves() -> None:
    batch = batch_of([ENTROPIES[:3], ENTROPIES[:3]], progress=0.0)
    signed = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 3)
    credit = attention_schedule(signed, batch, only="positive")
    # Ê = .30, .85, .10: q = ½, 1, 0, weights 1, ½, 3/2
    torch.testing.assert_close(credit, torch.tensor([[1.0, 0.5, 1.5], [-1.0, -1.0, -1.0]], dtype=torch.float64))


def test_anchors_and_explorers() -> None:
    batch = batch_of([ENTROPIES])
    low, high = keep_attention(ones(batch), batch), keep_attention(ones(batch), batch, side="high")
    assert low.nonzero()[:, 1].tolist() == [2, 7]
    assert high.nonzero()[:, 1].tolist() == [1, 5]


def test_short_responses_still_have_one_of_each() -> None:
    batch = batch_of([[0.5, 0.5, 0.5], [0.1], []])
    assert keep_attention(ones(batch), batch).tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert keep_attention(ones(batch), batch, side="high").tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_both_normalisers() -> None:
    # lengths 10 and 5, k = 2 + 1, token-mean loss with A = ρ = 1: "all" 3/15 = .2, "selected" 1
    batch = batch_of([ENTROPIES, ENTROPIES[:5]])
    for normalize, wanted in (("all", 0.2), ("selected", 1.0)):
        credit = keep_attention(ones(batch), batch, normalize=normalize)
        torch.testing.assert_close(credit.sum().item() / 15, wanted)


def test_the_predictive_control_ranks_the_policys_entropy() -> None:
    batch = batch_of([ENTROPIES], field="entropies")
    assert keep_attention(ones(batch), batch, entropy="predictive").nonzero()[:, 1].tolist() == [2, 7]
    assert get_pipeline("predictive_low").requires == frozenset({"entropies"})
    assert get_pipeline("anchors").requires == frozenset({"attention_entropies"})
    with pytest.raises(TokenCreditError, match="attention_entropies"):
        assign_credit(get_pipeline("anchors"), batch)


def test_halves_share_the_response() -> None:
    batch = batch_of([ENTROPIES[:5], ENTROPIES[:2]])
    front = keep_positions(ones(batch), batch, stop=0.5)
    back = keep_positions(ones(batch), batch, start=0.5)
    assert front.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]  # (t − 1)/n = 0, .2, .4, .6, .8 and 0, .5
    assert torch.equal(front + back, batch.response_mask.double())


def test_position_matched_shuffle_keeps_every_tenth() -> None:
    values = [[(row * 20 + t) / 100 for t in range(20)] for row in range(3)]
    batch = batch_of(values)
    generator = torch.Generator().manual_seed(5)
    shuffled = position_matched_shuffle(batch, generator=generator)
    for tenth in range(10):
        columns = slice(2 * tenth, 2 * tenth + 2)
        assert sorted(shuffled[:, columns].flatten().tolist()) == sorted(
            batch.attention_entropies[:, columns].flatten().tolist()
        )
    assert not torch.equal(shuffled, batch.attention_entropies)


def test_ties_go_by_position() -> None:
    equal = torch.full((1, 4), 0.5)
    mask = torch.tensor([[False, True, True, True]])
    assert lowest_or_highest(equal, mask, 0.34, "low").tolist() == [[False, True, False, False]]
    assert lowest_or_highest(equal, mask, 0.34, "high").tolist() == [[False, False, False, True]]


def rhythm_batch() -> TokenBatch:
    distances = [[3.0, 1.0, 1.2, 5.0, 5.0]]  # Δ = 2, .2, 3.8, 0, 0; median of distances 3, of Δ .2
    influences = torch.tensor([[0.1, 0.2, 0.9, 0.3, 0.8]], dtype=torch.float64)
    return batch_of(distances, field="attention_distances", attention_influences=influences)


def test_rhythm_local_and_global() -> None:
    batch = rhythm_batch()
    # top 40 % of five are two: Δ at 0 and 2; influence at 2 and 4
    local = attention_rhythm(ones(batch), batch, credit="local")
    assert local.tolist() == [[1.5, 1.0, 1.5, 1.0, 1.0]]
    assert attention_rhythm(ones(batch), batch, credit="global").tolist() == [[1.0, 1.0, 1.5, 1.0, 1.5]]
    assert torch.equal(attention_rhythm(-ones(batch), batch, credit="local"), -ones(batch))


def test_rhythm_coupled_hands_half_the_bonus_back() -> None:
    # token 2 is an anchor with distance 1.2 < 3, and Δ = 2 > .2 stands two places before it: it keeps 1.25, token 0
    # gets 1.25; token 4 has distance 5 and keeps 1.5
    batch = rhythm_batch()
    assert attention_rhythm(ones(batch), batch).tolist() == [[1.25, 1.0, 1.25, 1.0, 1.5]]


def test_answer_attention() -> None:
    # ln m = 0, 2: mean 1, std 1, z = −1, 1; σ(1) = .731059, σ(−1) = .268941 raised to .5; the answer token keeps 1
    batch = batch_of([[1.0, 7.38905609893065, 0.0]], field="importances")
    torch.testing.assert_close(
        answer_attention(ones(batch), batch), torch.tensor([[0.5, 0.731059, 1.0]]).double(), rtol=0, atol=1e-6
    )
