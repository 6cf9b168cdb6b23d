"""Golden values of on-policy distillation and IW-OPD, by hand or from the papers' equations."""

import math
import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tokencredit import TokenBatch, assign_credit, get_pipeline
from tokencredit.errors import TokenCreditError
from tokencredit.methods.distillation.discrepancy import discrepancy_weights, mass_multiplier
from tokencredit.methods.distillation.log_ratio import teacher_gap

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer, _jsd_divergence
from trl.experimental.sdpo.loss_utils import compute_sampled_token_self_distillation_loss

NAN = math.nan


def batch_of(gaps, *, chosen=None, student=None, **fields) -> TokenBatch:
    """Rows of gaps; `chosen` marks holes and padding; without `student` the greater log-prob of both is 0."""
    gap = torch.tensor(gaps, dtype=torch.float32)
    mask = torch.ones_like(gap, dtype=torch.bool) if chosen is None else torch.tensor(chosen, dtype=torch.bool)
    old = -gap.clamp_min(0.0) if student is None else torch.tensor(student)
    rows = gap.shape[0]
    values = {
        "response_ids": torch.arange(gap.numel()).reshape(gap.shape),
        "response_mask": mask,
        "rewards": torch.zeros(rows),
        "group_ids": torch.arange(rows),
        "old_logprobs": old,
        "teacher_logprobs": old + gap,
    }
    return TokenBatch(**(values | fields))


def weights_of(gaps, **options) -> torch.Tensor:
    return discrepancy_weights(batch_of([gaps]), **options)[0]


def check(actual: torch.Tensor, expected, tolerance: float = 6e-5) -> None:
    """The specification prints four decimals."""
    torch.testing.assert_close(actual.double(), torch.tensor(expected).double(), rtol=0, atol=tolerance)


def test_log_ratio_is_teacher_minus_student() -> None:
    # −1 − (−1.2) = 0.2,  −0.5 − (−0.2) = −0.3
    batch = batch_of([[0.2, -0.3]], student=[[-1.2, -0.2]])
    check(assign_credit("opd", batch), [[0.2, -0.3]], 1e-6)


@pytest.mark.parametrize(
    ("lam", "expected"),
    # λ (T − ref) − (S − ref): T − ref = (0.5, −0.1), S − ref = (0.3, 0.2)
    [(0.0, [-0.3, -0.2]), (1.0, [0.2, -0.3]), (1.25, [0.325, -0.325])],
)
def test_exopd_extrapolates_from_the_reference(lam: float, expected: list[float]) -> None:
    batch = batch_of([[0.2, -0.3]], student=[[-1.2, -0.2]], ref_logprobs=torch.tensor([[-1.5, -0.4]]))
    check(assign_credit([{"teacher_log_ratio": {"lam": lam}}], batch)[0], expected, 1e-6)


def test_reference_is_required_only_for_exopd() -> None:
    assert get_pipeline("opd").requires == {"teacher_logprobs", "old_logprobs"}
    assert get_pipeline("exopd").requires == {"teacher_logprobs", "old_logprobs", "ref_logprobs"}
    with pytest.raises(TokenCreditError, match="ref_logprobs"):
        assign_credit("exopd", batch_of([[0.2]]))
    # λ = 1 takes its own branch: a reference of NaN is never read.
    batch = batch_of([[0.2]], chosen=[[True]], ref_logprobs=torch.tensor([[1e30]]))
    check(assign_credit("opd", batch), [[0.2]], 1e-6)


def test_expected_gradient_is_that_of_the_reverse_kl() -> None:
    student, teacher = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    gaps = (teacher.log() - student.log())[:, None]
    advantages = assign_credit("opd", batch_of(gaps.tolist(), student=student.log()[:, None].tolist()))[:, 0]
    # Σ_v p(v) A(v) ∇_z ln p(v),  ∇_z ln p(v) = e_v − p
    expected = (student[:, None] * advantages[:, None] * (torch.eye(3) - student)).sum(0)
    check(expected, [-0.4215, 0.2721, 0.1495])
    logits = student.log().clone().requires_grad_()
    p = logits.softmax(0)
    (p * (p.log() - teacher.log())).sum().backward()
    check(expected, (-logits.grad).tolist(), 1e-6)
    assert (student * advantages).sum() < 0  # −KL


def test_local_projection_of_the_derivation() -> None:
    student, teacher = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6])
    tilted = student * (teacher / student).sqrt()
    q = tilted / tilted.sum()
    check(q, [0.2570, 0.3448, 0.3982])
    rho = (q * (q / student).log()).sum()
    check(rho, 0.1511)
    check((q * (q / teacher).log()).sum(), 0.1274)
    # KL(q‖π_T) = ρ + E_q[ln π_θ/π_T]
    check(rho + (q * (student / teacher).log()).sum(), 0.1274)


@pytest.mark.parametrize(
    ("gaps", "options", "expected"),
    [
        # d = (1, 0, 2, 1), D = 4: before = 0, 1, 1, 3
        ([1, 0, -2, -1], {}, [1.5, 1.375, 1.375, 1.125]),
        # D = 3 without the last
        ([1, 0, -2, -1], {"denominator": "drop_last"}, [1.5, 4 / 3, 4 / 3, 1.0]),
        # D = −2: before / D = 0, −½, −½, ½
        ([1, 0, -2, -1], {"discrepancy": "signed"}, [1.5, 1.5, 1.5, 1.25]),
        ([1, 0, -2, -1], {"renorm": "unit_mass"}, [1.1163, 1.0233, 1.0233, 0.8372]),
        ([1, 0, -2, -1], {"at_least_one": False}, [1.0, 0.75, 0.75, 0.25]),
        ([-1, 0.5, -2, -0.5], {}, [1.5, 1.375, 1.3125, 1.0625]),
        ([-1, 0.5, -2, -0.5], {"discrepancy": "signed"}, [1.5, 1.3333, 1.4167, 1.0833]),
        ([1, -1], {}, [1.5, 1.25]),
        ([-1, 1], {}, [1.5, 1.25]),
        ([1, -1], {"discrepancy": "signed"}, [1.5, 1.0]),
        ([-1, 1], {"discrepancy": "signed"}, [1.5, 1.5]),
        ([0.2, -0.3, 0.5], {}, [1.5, 1.4, 1.25]),
        ([0.2, -0.3, 0.5], {"gamma": 1.0}, [2.0, 1.8, 1.5]),
        ([0.7] * 5, {}, [1.5, 1.4, 1.3, 1.2, 1.1]),
        ([0.7] * 5, {"denominator": "drop_last"}, [1.5, 1.375, 1.25, 1.125, 1.0]),
        ([0, 0, 0], {}, [1.5, 1.5, 1.5]),
        ([0, 0, 0], {"renorm": "unit_mass"}, [1.5, 1.5, 1.5]),
        ([0.3], {}, [1.5]),
        ([0.3, 0.9], {"denominator": "drop_last"}, [1.5, 1.0]),
    ],
)
def test_weights(gaps: list[float], options: dict, expected: list[float]) -> None:
    check(weights_of([float(gap) for gap in gaps], **options), expected)


def test_weights_multiply_the_advantage() -> None:
    # w = (1.5, 1.375, 1.375, 1.125)
    check(assign_credit("iw_opd", batch_of([[1.0, 0.0, -2.0, -1.0]])), [[1.5, 0.0, -2.75, -1.125]], 1e-6)


def test_holes_and_padding_leave_the_chosen_tokens_alone() -> None:
    batch = batch_of([[1.0, NAN, 0.0, -2.0, -1.0, NAN]], chosen=[[True, False, True, True, True, False]])
    check(assign_credit("iw_opd", batch), [[1.5, 0.0, 0.0, -2.75, -1.125, 0.0]], 1e-6)


def test_laws_of_the_weight() -> None:
    gaps = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    batch = batch_of(gaps.tolist())
    weights = discrepancy_weights(batch)
    assert bool(((weights >= 1) & (weights <= 1.5)).all())
    assert bool((weights[:, 1:] <= weights[:, :-1]).all())
    check(weights[:, 0], [1.5] * 6, 0)
    # Σ w d / Σ d = 1 + γ/2 (1 + Σd² / (Σd)²)
    d = gaps.abs().double()
    expected = 1 + 0.25 * (1 + d.square().sum(1) / d.sum(1).square())
    torch.testing.assert_close(mass_multiplier(weights, teacher_gap(batch))[:, 0], expected, rtol=0, atol=1e-6)
    check(
        mass_multiplier(weights_of([1.0, 0.0, -2.0, -1.0])[None], torch.tensor([[1.0, 0, -2, -1]]).double()),
        [[1.34375]],
    )
    for scale in (-3.0, 0.01):
        torch.testing.assert_close(discrepancy_weights(batch_of((gaps * scale).tolist())), weights, rtol=0, atol=1e-5)


def test_unit_mass_keeps_the_mass_of_every_rollout() -> None:
    batch = batch_of(torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).tolist())
    plain, scaled = assign_credit("opd", batch), assign_credit("iw_opd_unit_mass", batch)
    torch.testing.assert_close(scaled.abs().sum(1), plain.abs().sum(1))


def test_gamma_zero_is_the_identity_bit_for_bit() -> None:
    batch = batch_of([[0.1, -0.7, 0.3]])
    assert torch.equal(assign_credit(get_pipeline("iw_opd", gamma=0.0), batch), assign_credit("opd", batch))
    with pytest.raises(TokenCreditError, match=r"`gamma` of prefix_discrepancy must be in \[0, inf\), got -0.1"):
        get_pipeline("iw_opd", gamma=-0.1)


def test_exopd_weights_come_from_the_raw_gap() -> None:
    batch = batch_of([[0.2, -0.3]], student=[[-1.2, -0.2]], ref_logprobs=torch.tensor([[-1.5, -0.4]]))
    # d = (0.2, 0.3): w = (1.5, 1 + ½ · 0.6) = (1.5, 1.3), times A¹·²⁵ = (0.325, −0.325)
    check(assign_credit("iw_exopd", batch), [[0.4875, -0.4225]])
    # w λ (T − ref) − (S − ref) = 1.5 · 1.25 · 0.5 − 0.3,  1.3 · 1.25 · (−0.1) − 0.2
    check(assign_credit("iw_exopd_lambda", batch), [[0.6375, -0.3625]])


def test_reordered_weights() -> None:
    generator = torch.Generator().manual_seed(3)
    batch = batch_of([[1.0, 0.0, -2.0, -1.0], [2.0, 2.0, 2.0, 2.0]])
    own = discrepancy_weights(batch)
    # the weights of the even gap: 1.5, 1.375, 1.25, 1.125
    check(own[1], [1.5, 1.375, 1.25, 1.125])

    def reordered(order: str) -> torch.Tensor:
        pipeline = [{"reordered_discrepancy": {"order": order}}]
        steps = ["group_centered", *pipeline]
        gaps = (batch.teacher_logprobs - batch.old_logprobs).tolist()
        ones = batch_of(gaps, rewards=torch.tensor([1.0, 0.0]), group_ids=torch.zeros(2).long())
        return assign_credit(steps, ones, generator=generator) / torch.tensor([[0.5], [-0.5]])

    check(reordered("reversed"), (2.5 - own).tolist())
    check(reordered("borrowed"), own.flip(0).tolist())
    # Σ w d / Σ d: (1.5 · 1 + 1.375 · 2 + 1.125 · 1) / 4 = 1.34375;  mean of the even row 1.3125
    check(reordered("constant"), [[1.34375] * 4, [1.3125] * 4])
    shuffled = reordered("shuffled")
    check(shuffled.sort(1).values, own.sort(1).values.tolist())
    assert not torch.equal(shuffled, own.float())


def test_borrowing_follows_the_share_of_the_way() -> None:
    # Row 0 has two tokens: it reads the four weights of row 1 at 1/4 and 3/4 of the way, its 2nd and 4th token.
    batch = batch_of([[1.0, 1.0, NAN, NAN], [1.0] * 4], chosen=[[True, True, False, False], [True] * 4])
    credit = assign_credit(
        ["teacher_log_ratio", {"reordered_discrepancy": {"order": "borrowed"}}], batch, generator=torch.Generator()
    )
    check(credit[0], [1.375, 1.125, 0.0, 0.0])
    check(credit[1], [1.5, 1.5, 1.25, 1.25])


def test_prefix_ratio() -> None:
    # α = 1: exponents 0, 1, 1, −1
    alone = batch_of([[1.0, 0.0, -2.0, -1.0]])
    check(assign_credit(["teacher_log_ratio", {"prefix_ratio": {"alpha": 1.0}}], alone), [[1.0, 0.0, -2.0, -1.0]])
    two = batch_of([[1.0, 0.0, -2.0, -1.0], [-1.0, -1.0, 0.5, 0.5]])
    got = assign_credit(["teacher_log_ratio", {"prefix_ratio": {"alpha": 0.5}}], two)
    ratios = torch.tensor([[1, 1.4621, 1.6351, 1.1244], [1, 0.5379, 0.3649, 0.8756]])
    check(got, (ratios * torch.tensor([[1, 0, -2, -1], [-1, -1, 0.5, 0.5]])).tolist(), 2e-4)
    blended = assign_credit(["teacher_log_ratio", {"prefix_ratio": {"alpha": 0.5, "blend": True}}], two)
    check(blended[1], [-1.5, -1.26895, 0.5912, 0.7189], 2e-4)  # (1 + ½ r̃) A


def test_prefix_ratio_divides_by_those_that_still_run() -> None:
    # Row 0 ends after one token: at its second token row 1 is alone, and its relative ratio is one.
    batch = batch_of([[1.0, NAN], [-1.0, 2.0]], chosen=[[True, False], [True, True]])
    check(assign_credit(["teacher_log_ratio", {"prefix_ratio": {"alpha": 1.0}}], batch), [[1.0, 0.0], [-1.0, 2.0]])
    extreme = batch_of([[-1e4, 1.0], [1e4, 1.0]])
    assert bool(torch.isfinite(assign_credit(["teacher_log_ratio", {"prefix_ratio": {"alpha": 1.0}}], extreme)).all())


def test_teacher_confidence() -> None:
    # The one worst of at most four earlier tokens: exp(−0.1), exp(−2), exp(−2), exp(−4)
    nll = [0.1, 2.0, 0.5, 4.0, 0.2]
    batch = batch_of([[1.0] * 5], teacher_logprobs=-torch.tensor([nll]), rewards=torch.tensor([1.0]))
    steps = ["signed_outcome", {"teacher_confidence": {}}]
    check(assign_credit(steps, batch)[0] / 0.1, [1.0, 0.9048, 0.1353, 0.1353, 0.0183])
    floored = ["signed_outcome", {"teacher_confidence": {"w_min": 0.1}}]
    check(assign_credit(floored, batch)[0, -1] / 0.1, 0.1)
    # window 2, the worst half of two = one: max of the last two
    short = ["signed_outcome", {"teacher_confidence": {"window": 2, "q": 0.5}}]
    check(assign_credit(short, batch)[0] / 0.1, [1.0, math.exp(-0.1), math.exp(-2), math.exp(-2), math.exp(-4)])


def test_teacher_confidence_agrees_with_its_definition_over_tiles() -> None:
    nll = torch.rand(2, 300, generator=torch.Generator().manual_seed(4)) * 3
    batch = batch_of(nll.tolist(), teacher_logprobs=-nll, rewards=torch.ones(2))
    got = assign_credit(["signed_outcome", {"teacher_confidence": {"alpha": 0.5}}], batch) / 0.1
    for t in (1, 19, 20, 63, 64, 65, 255, 256, 257, 299):
        seen = nll[0, max(0, t - 64) : t].double().sort(descending=True).values
        worst = seen[: max(1, len(seen) // 10)].mean()
        check(got[0, t], math.exp(-0.5 * worst), 1e-5)


def test_positions() -> None:
    ones = torch.ones(1, 10)
    full = batch_of(ones.tolist())

    def kept(step: dict, batch: TokenBatch = full) -> list[float]:
        return assign_credit(["teacher_log_ratio", step], batch)[0].tolist()

    check(torch.tensor(kept({"position_decay": {"gamma": 0.5}})[:3]), [1.5, 1.45, 1.4])
    check(assign_credit("opd_decay", batch_of([[1.0] * 4])), [[1.5, 1.375, 1.25, 1.125]])
    assert kept({"prefix_mask": {"keep": 0.3}}) == [1.0] * 3 + [0.0] * 7
    assert kept({"suffix_mask": {"keep": 0.25}}) == [0.0] * 7 + [1.0] * 3  # ⌈2.5⌉
    assert kept({"middle_mask": {"keep": 0.3}}) == [0.0] * 3 + [1.0] * 3 + [0.0] * 4
    assert kept({"prefix_boost": {}}) == [1.5] * 3 + [1.0] * 7
    assert kept({"prefix_mask": {"keep": 0.01}}) == [1.0] + [0.0] * 9


@pytest.mark.parametrize(("progress", "count"), [(0.0, 3), (0.5, 7), (1.0, 10)])
def test_cosine_schedule_of_the_prefix(progress: float, count: int) -> None:
    # ⌈10 · (0.3 + 0.7 · ½ (1 − cos πp))⌉ = ⌈3⌉, ⌈6.5⌉, ⌈10⌉
    batch = batch_of([[1.0] * 10], progress=progress)
    boosted = assign_credit("opd_curriculum", batch)[0]
    assert boosted.tolist() == [1.5] * count + [1.0] * (10 - count)
    masked = assign_credit(["teacher_log_ratio", {"prefix_mask": {"schedule": "cosine"}}], batch)[0]
    assert masked.tolist() == [1.0] * count + [0.0] * (10 - count)


def test_constant_disagreement_is_position_decay() -> None:
    batch = batch_of([[-0.4] * 6], student=[[-1.0] * 6])
    torch.testing.assert_close(assign_credit("iw_opd", batch), assign_credit("opd_decay", batch), rtol=0, atol=1e-6)


def oracle(gamma: float = 0.5, temperature: float = 1.0) -> SimpleNamespace:
    """What TRL's IW-OPD loss reads from its trainer."""
    return SimpleNamespace(
        temperature=temperature,
        iw_opd_gamma=gamma,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )


@pytest.mark.parametrize(("gamma", "temperature"), [(0.5, 1.0), (1.0, 0.7), (0.0, 1.3)])
def test_trl_iw_opd_loss_and_gradient(gamma: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 6, 11, generator=generator, requires_grad=True)
    ids = torch.randint(0, 11, (3, 6), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    teacher = torch.randn(3, 6, 11, generator=generator).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    labels = torch.where(mask, ids, -100)
    theirs = IWOPDTrainer._compute_iw_opd_loss(oracle(gamma, temperature), logits, ids, labels, teacher)
    (their_gradient,) = torch.autograd.grad(theirs, logits)

    student = (logits / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    batch = batch_of(
        torch.zeros(3, 6).tolist(),
        chosen=mask.tolist(),
        response_ids=ids,
        old_logprobs=student.detach(),
        teacher_logprobs=teacher,
    )
    advantages = assign_credit(get_pipeline("iw_opd", gamma=gamma), batch)
    ours = -torch.where(mask, student * advantages, 0.0).sum() / mask.sum()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    (our_gradient,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-6)


def test_trl_golden_loss() -> None:
    # Uniform over 4: −ln π = ln 4. Row 0: w A = (0.3, −0.42, 0.625), row 1: 0.6; Σ = 1.105, over 4 tokens.
    batch = batch_of([[0.2, -0.3, 0.5], [0.4, 0.0, 0.0]], chosen=[[True] * 3, [True, False, False]])
    credit = assign_credit("iw_opd", batch)
    assert float(credit.sum() * math.log(4) / 4) == pytest.approx(0.382964, abs=1e-6)
    # seq-mean-token-mean: (0.505 / 3 + 0.6) / 2
    means = credit.sum(1) / batch.response_mask.sum(1)
    assert float(means.mean() * math.log(4)) == pytest.approx(0.532568, abs=1e-6)


def test_trl_sampled_token_distillation_loss() -> None:
    """TRL's self-distillation on sampled tokens is the gradient of `teacher_log_ratio`."""
    generator = torch.Generator().manual_seed(6)
    student = torch.randn(2, 4, 9, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 4, 9, generator=generator)
    ids = torch.randint(0, 9, (2, 4), generator=generator)
    theirs = compute_sampled_token_self_distillation_loss(student, teacher, ids, distillation_alpha=1.0)
    (their_gradient,) = torch.autograd.grad(theirs.sum(), student)

    def logprobs(logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]

    batch = batch_of(
        torch.zeros(2, 4).tolist(), old_logprobs=logprobs(student).detach(), teacher_logprobs=logprobs(teacher)
    )
    ours = -assign_credit("sdpo", batch) * logprobs(student)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    (our_gradient,) = torch.autograd.grad(ours.sum(), student)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-6)


def test_full_vocabulary_divergence_has_the_gradient_of_the_expected_credit() -> None:
    """TRL's distillation loss at β = 1 is the reverse KL over the vocabulary: the expectation of OPD's gradient."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(3, 5, generator=generator, requires_grad=True)
    teacher = torch.randn(3, 5, generator=generator).log_softmax(-1)
    (their_gradient,) = torch.autograd.grad(_jsd_divergence(logits.log_softmax(-1), teacher, 1.0).sum(), logits)
    student = logits.detach().log_softmax(-1)
    every = batch_of((teacher - student).T.tolist(), old_logprobs=student.T, teacher_logprobs=teacher.T)  # rows: tokens
    credit = assign_credit("opd", every).T  # [state, vocabulary]
    surrogate = (student.exp() * credit * logits.log_softmax(-1)).sum()
    (our_gradient,) = torch.autograd.grad(-surrogate, logits)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-6)


def test_mixtures_share_the_teacher() -> None:
    batch = batch_of([[0.2, -0.4], [0.6, 0.0]], rewards=torch.tensor([1.0, 0.0]), group_ids=torch.tensor([0, 0]))
    # Dr. GRPO: ±0.5
    check(assign_credit("0.5 * dr_grpo + 0.5 * opd", batch), [[0.35, 0.05], [0.05, -0.25]], 1e-6)


def test_teacher_confidence_takes_half_of_eighteen() -> None:
    # NLL 1 … 18 before the last of 19 tokens: the mean of the nine largest is 14
    nll = torch.arange(1.0, 20.0)[None]
    batch = batch_of([[1.0] * 19], teacher_logprobs=-nll, rewards=torch.tensor([1.0]))
    credit = assign_credit(["signed_outcome", {"teacher_confidence": {"q": 0.5, "alpha": 0.1}}], batch) / 0.1
    assert float(credit[0, -1]) == pytest.approx(math.exp(-1.4), rel=1e-6)


def test_a_teachers_log_prob_above_zero_is_certainty() -> None:
    above, zero = (torch.tensor([[p, -1.0, p, -2.0, p]]) for p in (1e-3, 0.0))
    for window in (1, 2, 64):
        step = {"teacher_confidence": {"window": window, "q": 0.0}}
        got = [
            assign_credit(["signed_outcome", step], batch_of([[0.0] * 5], teacher_logprobs=p)) for p in (above, zero)
        ]
        assert torch.equal(*got)
