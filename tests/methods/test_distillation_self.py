"""Golden values of DASD, its controls and its baselines; the fixture has mean |δ| = 2, so that scale errors show."""

import math

import pytest
import torch

from tokencredit import TokenBatch, assign_credit, get_pipeline
from tokencredit.errors import TokenCreditError
from tokencredit.methods.distillation.dasd import bonus_direction, scaled_gap
from tokencredit.methods.distillation.log_ratio import teacher_gap

NAN = math.nan
ENTROPIES = [0.0, 0.1, 0.2, 1.0, 2.0]
GAPS = [1.0, -1.0, 2.0, -5.0, 1.0]
REAL = [0.001, 0.002, 0.004, 0.006, 0.009, 0.05, 0.2, 0.5, 0.9, 1.6]


def batch_of(gaps, entropies, *, chosen=None, **fields) -> TokenBatch:
    gap = torch.tensor(gaps, dtype=torch.float32)
    mask = torch.ones_like(gap, dtype=torch.bool) if chosen is None else torch.tensor(chosen, dtype=torch.bool)
    rows = gap.shape[0]
    values = {
        "response_ids": torch.arange(gap.numel()).reshape(gap.shape),
        "response_mask": mask,
        "rewards": torch.ones(rows),
        "group_ids": torch.arange(rows),
        "old_logprobs": -gap.clamp_min(0.0),
        "teacher_logprobs": gap.clamp_max(0.0),
        "entropies": None if entropies is None else torch.tensor(entropies, dtype=torch.float32),
        "host_advantages": torch.zeros(rows),
    }
    return TokenBatch(**(values | fields))


def five(**fields) -> TokenBatch:
    return batch_of([GAPS], [ENTROPIES], **fields)


def bonus(batch: TokenBatch, **options) -> torch.Tensor:
    """β = 1 and no verifier: what remains is the bonus."""
    return assign_credit(get_pipeline("dasd", **({"beta": 1.0} | options)), batch)[0]


def check(actual: torch.Tensor, expected, tolerance: float = 6e-5) -> None:
    """The specification prints four decimals."""
    torch.testing.assert_close(actual.double(), torch.tensor(expected).double(), rtol=0, atol=tolerance)


def test_router() -> None:
    # τ = Q_.8 = 1.2, σ = mean |H − 0.66| = 0.672: tanh(1.2 / 0.672) = 0.9453
    check(bonus_direction(five())[0], [0.9453, 0.9270, 0.9030, 0.2891, -0.8307])
    check(bonus_direction(five(), tail="bottom")[0], [0.1185, -0.0298, -0.1767, -0.8785, -0.9934])
    # σ = median |H − 0.2| = 0.2
    check(bonus_direction(five(), deviation="median")[0], [1.0, 1.0, 0.9999, 0.7616, -0.9993])


def test_router_on_entropies_of_the_usual_shape() -> None:
    batch = batch_of([[0.0] * 10], [REAL])
    top = [0.89, 0.89, 0.89, 0.89, 0.89, 0.865, 0.736, 0.196, -0.660, -0.987]
    check(bonus_direction(batch)[0], top, 4e-3)
    bottom = [0.006, 0.004, -0.001, -0.006, -0.013, -0.114, -0.452, -0.843, -0.977, -0.999]
    check(bonus_direction(batch, tail="bottom")[0], bottom, 6e-4)


def test_scaled_gap() -> None:
    check(scaled_gap(teacher_gap(five()), five(), "mean_abs")[0], [0.5, -0.5, 1.0, -2.5, 0.5])
    # population std of δ = √6.24
    check(scaled_gap(teacher_gap(five()), five(), "std")[0], [gap / math.sqrt(6.24) for gap in GAPS])
    two = batch_of([GAPS, [4.0] * 5], [ENTROPIES, ENTROPIES])
    check(scaled_gap(teacher_gap(two), two, "batch_mean_abs")[0], [gap / 3.0 for gap in GAPS])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # router · sigmoid(|δ̄| − 1) · δ̄: 0.9453 · 0.3775 · 0.5 = 0.1784
        ({}, [0.1784, -0.1750, 0.4515, -0.5910, -0.1568]),
        ({"tail": "bottom"}, [0.0224, 0.0056, -0.0883, 1.7955, -0.1875]),
        ({"gap_scale": "std"}, [0.1341, -0.1315, 0.3256, -0.4233, -0.1179]),
        ({"gap_scale": "zscore"}, [0.2076, -0.0710, 0.4253, -0.3720, -0.1824]),
        ({"gap_scale": "none"}, [0.4727, -0.4635, 1.3203, -1.4197, -0.4154]),
        ({"sigmoid": False}, [0.4727, -0.4635, 0.9030, -0.7228, -0.4154]),
        ({"cap": 0.2}, [0.1784, -0.1750, 0.2, -0.2, -0.1568]),
        ({"pull": "conformity"}, [0.1888, -0.1888, 0.5, -2.0439, 0.1888]),
        ({"pull": "novelty"}, [-0.1888, 0.1888, -0.5, 2.0439, -0.1888]),
        ({"pull": "flipped"}, [-0.1784, 0.1750, -0.4515, 0.5910, 0.1568]),
        ({"pull": "flip_low"}, [-0.1784, 0.1750, -0.4515, 0.5910, -0.1568]),
        ({"pull": "flip_high"}, [0.1784, -0.1750, 0.4515, -0.5910, 0.1568]),
        ({"pull": "attract_only"}, [0.1784, -0.1750, 0.4515, -0.5910, 0.0]),
        ({"pull": "repel_only"}, [0.0, 0.0, 0.0, 0.0, -0.1568]),
        ({"pull": "sign"}, [0.1888, -0.1888, 0.5, -2.0439, -0.1888]),
        ({"skip_first": 2}, [0.0, 0.0, 0.4515, -0.5910, -0.1568]),
        # Σ|ωδ̄| = 1.5527 over ΣH = 3.3: 0.4705 H
        ({"pull": "entropy_bonus"}, [0.0, 0.0471, 0.0941, 0.4705, 0.9410]),
    ],
)
def test_bonus(options: dict, expected: list[float]) -> None:
    check(bonus(five(), **options), expected)


def test_bonus_rides_on_the_verifiers_advantage() -> None:
    for sign, expected in (
        (1.0, [1.0178, 0.9825, 1.0451, 0.9409, 0.9843]),
        (-1.0, [-0.9822, -1.0175, -0.9549, -1.0591, -1.0157]),
    ):
        check(assign_credit("dasd", five(host_advantages=torch.tensor([sign])))[0], expected)


def test_ranks_can_route() -> None:
    # positions 0 … 4: τ = 3.2, σ = 1.2: tanh((3.2 − t) / 1.2)
    expected = [math.tanh((3.2 - t) / 1.2) for t in range(5)]
    check(bonus_direction(five(), "position")[0], expected)
    # −ln π = 3, 1, 2, 5, 4: ranks 2, 0, 1, 4, 3
    batch = five(old_logprobs=-torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0]]))
    check(bonus_direction(batch, "surprisal")[0], [expected[rank] for rank in (2, 0, 1, 4, 3)])
    holes = batch_of(
        [[0.0, NAN, 0.0, 0.0]],
        [[0.0, NAN, 0.0, 0.0]],
        chosen=[[True, False, True, True]],
        old_logprobs=-torch.tensor([[3.0, NAN, 1.0, 2.0]]),
    )  # ranks 2, 0, 1: τ = 1.6, σ = 2/3
    check(bonus_direction(holes, "surprisal")[0], [math.tanh(-0.6), 0.0, math.tanh(2.4), math.tanh(0.9)])


def test_an_unchosen_token_moves_nothing() -> None:
    for junk in (NAN, 7.0):
        batch = batch_of(
            [[*GAPS[:2], junk, *GAPS[2:]]],
            [[*ENTROPIES[:2], junk, *ENTROPIES[2:]]],
            chosen=[[True, True, False, True, True, True]],
        )
        check(bonus(batch), [0.1784, -0.1750, 0.0, 0.4515, -0.5910, -0.1568])


@pytest.mark.parametrize(
    "batch",
    [
        batch_of([[0.0] * 5], [ENTROPIES]),  # the teacher is the student
        batch_of([GAPS], [[0.7] * 5]),  # one entropy everywhere
        batch_of([[3.0]], [[0.4]]),  # one token
    ],
)
def test_no_bonus_without_a_difference(batch: TokenBatch) -> None:
    check(bonus(batch), [0.0] * batch.response_mask.shape[1], 1e-9)


def test_laws_of_the_bonus() -> None:
    generator = torch.Generator().manual_seed(0)
    gaps, entropies = torch.randn(1, 12, generator=generator), torch.rand(1, 12, generator=generator)
    base = bonus(batch_of(gaps.tolist(), entropies.tolist()))
    check(bonus(batch_of((-gaps).tolist(), entropies.tolist())), (-base).tolist(), 1e-6)
    check(bonus(batch_of((7 * gaps).tolist(), entropies.tolist())), base.tolist(), 1e-5)
    check(bonus(batch_of(gaps.tolist(), (3 * entropies + 1).tolist())), base.tolist(), 1e-5)
    bound = scaled_gap(gaps.double(), batch_of(gaps.tolist(), entropies.tolist()), "mean_abs")[0].abs()
    assert bool((base.abs() <= bound + 1e-9).all())
    batch = five()
    assert torch.equal(assign_credit(get_pipeline("dasd", beta=0.0), batch), assign_credit("grpo", batch))


def test_who_gets_the_bonus() -> None:
    rows = {"rewards": torch.tensor([1.0, 0.0, 1.0, 1.0]), "group_ids": torch.tensor([0, 0, 1, 1])}
    batch = batch_of([GAPS] * 4, [ENTROPIES] * 4, **rows)

    def paid(**options) -> list[bool]:
        return (assign_credit(get_pipeline("dasd", **options), batch) != 0).any(1).tolist()

    assert paid() == [True] * 4
    assert paid(responses="correct") == [True, False, True, True]
    assert paid(zero_spread="drop") == [True, True, False, False]
    assert get_pipeline("dasd").scope == "response"
    assert get_pipeline("dasd", zero_spread="drop").scope == "group"
    assert get_pipeline("dasd", gap_scale="batch_mean_abs").scope == "batch"


def test_what_the_directions_need() -> None:
    assert get_pipeline("dasd").requires == {"teacher_logprobs", "old_logprobs", "entropies"}
    assert get_pipeline("dasd_conformity").requires == {"teacher_logprobs", "old_logprobs"}
    check(assign_credit("dasd_novelty", batch_of([GAPS], None))[0], [-0.0189, 0.0189, -0.05, 0.2044, -0.0189])
    with pytest.raises(TokenCreditError, match="entropies"):
        assign_credit("dasd", batch_of([GAPS], None))
    with pytest.raises(TokenCreditError, match="must be one of"):
        get_pipeline("dasd", pull="sideways")


@pytest.mark.parametrize("shuffle", ["router", "gap"])
def test_permuted_controls_keep_the_histogram(shuffle: str) -> None:
    batch = batch_of([[*GAPS, NAN]], [[*ENTROPIES, NAN]], chosen=[[True] * 5 + [False]])
    steps = [
        "group_normalized",
        {"randomly_directed_self_distillation": {"beta": 1.0, "sigmoid": False, "shuffle": shuffle}},
    ]
    got = assign_credit(steps, batch, generator=torch.Generator().manual_seed(1))[0]
    router = bonus_direction(batch)[0, :5]
    gap = scaled_gap(teacher_gap(batch), batch, "mean_abs")[0, :5]
    moved, still = (router, gap) if shuffle == "router" else (gap, router)
    check((got[:5] / still).sort().values, moved.sort().values.tolist(), 1e-5)
    assert float((got[:5] / still - moved).abs().max()) > 0.1
    assert float(got[5]) == 0.0


@pytest.mark.parametrize(
    ("name", "options", "sign", "expected"),
    [
        # w = e^{±δ} clipped to [0.8, 1.2], half of it: 1 ± 0.1
        ("rlsd", {}, 1.0, [1.1, 0.9, 1.1, 0.9, 1.1]),
        ("rlsd", {}, -1.0, [-0.9, -1.1, -0.9, -1.1, -0.9]),
        # min(w, clip w) for A = 1: small w is not clipped: ½ + ½ e^{−1} = 0.6839
        ("rlsd", {"form": "minimum"}, 1.0, [1.1, 0.6839, 1.1, 0.5034, 1.1]),
        # A = −1: w = e^{−δ}: large w is not clipped: −(½ + ½ e) = −1.8591
        ("rlsd", {"form": "minimum"}, -1.0, [-0.9, -1.8591, -0.9, -74.7066, -0.9]),
        ("rlsd", {"form": "released"}, 1.0, [1.1, 0.9, 1.1, 0.9, 1.1]),  # the names of older configs
        ("rlsd", {"form": "paper"}, 1.0, [1.1, 0.6839, 1.1, 0.5034, 1.1]),
        ("rlrt", {}, 1.0, [0.6839, 1.5, 0.5677, 1.5, 0.6839]),
        ("antisd", {}, 1.0, [0.8450, 1.0950, 0.6416, 1.1716, 0.8450]),
        ("grpo_sd", {"lam": 0.5}, 1.0, [1.5, 0.5, 2.0, -1.5, 1.5]),
    ],
)
def test_baselines(name: str, options: dict, sign: float, expected: list[float]) -> None:
    batch = five(host_advantages=torch.tensor([sign]), step=0)
    check(assign_credit(get_pipeline(name, **options), batch)[0], expected)


def test_srpo_lets_wrong_responses_learn_where_the_teacher_is_sure() -> None:
    # H = .1, .5, 2: e^{−H} = .9048 .6065 .1353, mean .5489, weights 1.6485 1.1050 .2466; the last token is no one's.
    fields = {
        "chosen": [[True, True, True, False]] * 3,
        "host_advantages": torch.tensor([-1.0, 1.0, -0.5]),
        "rewards": torch.tensor([0.0, 1.0, 0.0]),
        "teacher_entropies": torch.tensor([[0.1, 0.5, 2.0, NAN]] * 3),
    }
    batch = batch_of([[2.0, -1.0, 1.0, NAN], [2.0, -1.0, 1.0, NAN], [0.0, 0.0, 0.0, NAN]], None, **fields)
    got = assign_credit("srpo", batch)
    check(got[0], [3.2970, -1.1050, 0.2466, 0.0], 1e-4)
    check(got[1], [1.0, 1.0, 1.0, 0.0])  # right: the verifier's
    check(got[2], [-0.5, -0.5, -0.5, 0.0])  # scored under its own prompt: no teacher
    check(assign_credit(get_pipeline("srpo", beta=0.0), batch)[0], [2.0, -1.0, 1.0, 0.0])


@pytest.mark.parametrize(("h_warm", "on"), [(None, True), (0.2, True), (0.215, True), (0.216, False), (5.0, False)])
def test_antisd_pauses_while_the_teachers_entropy_is_low(h_warm: float | None, on: bool) -> None:
    # The median of 0, .1, .2, 1, 2 is .2; .93 · .215 = .19995, .93 · .216 = .20088
    batch = five(host_advantages=torch.tensor([1.0]), teacher_entropies=torch.tensor([ENTROPIES]))
    expected = [0.8450, 1.0950, 0.6416, 1.1716, 0.8450] if on else [1.0] * 5
    check(assign_credit(get_pipeline("antisd", h_warm=h_warm), batch)[0], expected)


def test_the_teachers_entropies_are_asked_for_only_where_they_are_read() -> None:
    assert "teacher_entropies" not in get_pipeline("antisd").requires
    assert "teacher_entropies" in get_pipeline("antisd", h_warm=1.0).requires
    with pytest.raises(TokenCreditError, match="needs `teacher_entropies`"):
        assign_credit("srpo", five(host_advantages=torch.tensor([1.0])))


def test_rlrt_leaves_wrong_responses_alone() -> None:
    batch = five(host_advantages=torch.tensor([-1.0]), rewards=torch.tensor([0.0]))
    check(assign_credit("rlrt", batch)[0], [-1.0] * 5)


@pytest.mark.parametrize(("progress", "share"), [(0.05, 0.25), (0.1, 0.5), (0.55, 0.25), (1.0, 0.0)])
def test_rlsd_schedule(progress: float, share: float) -> None:
    # λ: 0 → 0.5 over the first tenth, then to 0 over the rest; δ = 1, A = 1: 1 + 0.2 λ
    batch = five(host_advantages=torch.tensor([1.0]), progress=progress)
    credit = assign_credit(get_pipeline("rlsd", warmup=0.1, decay_steps=None), batch)
    assert float(credit[0, 0]) == pytest.approx(1 + 0.2 * share, abs=1e-6)


@pytest.mark.parametrize(
    ("step", "options", "share"),
    [
        (0, {}, 0.5),
        (10, {}, 0.4),
        (49, {}, 0.01),
        (50, {}, 0.0),
        (1000, {}, 0.0),
        (20, {"decay_steps": 40, "lam_end": 0.1}, 0.3),
        (400, {"decay_steps": 40, "lam_end": 0.1}, 0.1),
        (5, {"warmup": 0.2}, 0.25),
        (30, {"warmup": 0.2}, 0.25),
        (5, {"lam_end": None, "warmup": 0.2}, 0.25),
        (30, {"lam_end": None, "warmup": 0.2}, 0.5),
        (None, {"lam_end": None}, 0.5),
    ],
)
def test_rlsd_lets_go_of_the_teacher_over_fifty_steps(step: int | None, options: dict, share: float) -> None:
    batch = five(host_advantages=torch.tensor([1.0]), step=step, progress=0.9)
    credit = assign_credit(get_pipeline("rlsd", **options), batch)
    assert float(credit[0, 0]) == pytest.approx(1 + 0.2 * share, abs=1e-6)


def test_rlsd_asks_for_the_step_only_where_it_counts_steps() -> None:
    with pytest.raises(TokenCreditError, match="needs `step`"):
        assign_credit("rlsd", five(host_advantages=torch.tensor([1.0])))
    for options in ({"decay_steps": None}, {"lam_end": None}):
        assert "step" not in get_pipeline("rlsd", **options).requires


def test_srpo_averages_over_all_that_learn_from_the_teacher() -> None:
    # two wrong responses with a teacher, H = 0 and 0, ln 2: e^{−H} = 1, 1, ½, mean of the three .8333
    fields = {
        "chosen": [[True, False], [True, True], [True, True]],
        "host_advantages": torch.tensor([-1.0, -1.0, 1.0]),
        "rewards": torch.tensor([0.0, 0.0, 1.0]),
        "teacher_entropies": torch.tensor([[0.0, NAN], [0.0, math.log(2)], [5.0, 5.0]]),
    }
    batch = batch_of([[1.0, NAN], [1.0, 2.0], [1.0, 1.0]], None, **fields)
    got = assign_credit("srpo", batch)
    check(got, [[1.2, 0.0], [1.2, 1.2], [1.0, 1.0]], 1e-6)  # per response it would be 1, 1.3333, 1.3333


def test_a_format_reward_is_no_success_above_the_threshold() -> None:
    # .1 for the format, 1.1 for a right answer
    fields = {
        "rewards": torch.tensor([1.1, 0.1]),
        "host_advantages": torch.tensor([1.0, -1.0]),
        "teacher_entropies": torch.zeros(2, 2),
    }
    batch = batch_of([[1.0, -1.0], [1.0, -1.0]], [[0.1, 0.9], [0.1, 0.9]], **fields)
    plain = assign_credit("grpo", batch)
    for name, options, moved in (("rlrt", {}, 0), ("dasd", {"responses": "correct"}, 0), ("srpo", {}, 1)):
        found = assign_credit(get_pipeline(name, threshold=0.5, **options), batch)
        assert not torch.equal(found[moved], plain[moved]) and torch.equal(found[1 - moved], plain[1 - moved]), name
        # at 0 every well-formed response is correct
        found = assign_credit(get_pipeline(name, **options), batch)
        assert torch.equal(found[1], plain[1]) == (name == "srpo")


def test_strength_zero_is_grpo_bit_for_bit() -> None:
    batch = five(host_advantages=torch.tensor([0.7]))
    plain = assign_credit("grpo", batch)
    for name, options in (
        ("rlsd", {"lam": 0.0}),  # without a step: nothing moves
        ("rlsd", {"lam": 0.0, "lam_end": None}),
        ("rlrt", {"lam": 0.0}),
        ("antisd", {"g": 0.0}),
        ("grpo_sd", {"lam": 0.0}),
    ):
        assert torch.equal(assign_credit(get_pipeline(name, **options), batch), plain)
