"""On-policy distillation as credit: the teacher's log-ratio, and the teacher's confidence along the prefix.

The gap is ln π_T − ln π_θ of the sampled token, in nats, at the sampling temperature, detached: never an objective.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokencredit.batch.masked import chosen, compact, spread
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.selection import share_of
from tokencredit.methods.spec import Alias, MethodSpec, Rows, at

GAP = frozenset({"teacher_logprobs", "old_logprobs"})
IW_OPD = "arXiv:2606.22600"
TILE = 256  # tokens of `teacher_confidence` at a time: bounds its windows to [batch, TILE, window]
ROOM = 1 << 27  # numbers in the windows that a GPU sorts at once
FEW = 16  # of the largest values of a window: up to here they are carried along, above they are selected anew


def teacher_log_ratio(batch: TokenBatch, *, lam: float = 1.0) -> Float[Tensor, "batch response"]:
    """On-policy distillation: how much more the teacher likes the sampled token than the student does.

        A_t = λ (ln π_T − ln π_ref) − (ln π_θ − ln π_ref)        λ = 1:  A_t = ln π_T − ln π_θ, whatever the reference

    On samples of the student E[A] = −KL(π_θ‖π_T) ≤ 0 and E[A ∇ln π_θ] = −∇KL(π_θ‖π_T) at each prefix: return-to-go is
    dropped. Rewards are not read. λ = 0 is a pull back to the reference.

    Paper: OPD as a policy gradient with λ = 1; ExOPD (arXiv:2602.12125) with λ = 1.25, its reference the student's
    first weights.
    """
    student = chosen(batch.require("old_logprobs"), batch.response_mask)
    teacher = chosen(batch.require("teacher_logprobs"), batch.response_mask)
    if lam == 1.0:
        return teacher - student
    reference = chosen(batch.require("ref_logprobs"), batch.response_mask)
    return lam * (teacher - reference) - (student - reference)


def ratio_fields(given: Mapping[str, Any]) -> frozenset[str]:
    """What `teacher_log_ratio` reads: the reference only where λ is not one."""
    return GAP if given["lam"] == 1.0 else GAP | {"ref_logprobs"}


def teacher_gap(batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """ln π_T − ln π_θ of the sampled token in float64, 0 outside the mask; the signal of every method here."""
    return teacher_log_ratio(batch)


def teacher_confidence(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    window: int = 64,
    q: float = 0.9,
    alpha: float = 1.0,
    w_min: float = 0.0,
) -> Float[Tensor, "batch response"]:
    """Less credit where the teacher was surprised by the last tokens of the prefix.

        Q_t = mean of the ⌊(1 − q) n⌋ largest −ln π_T among the n ≤ `window` tokens before t (at least one)
        w_t = max(exp(−α Q_t), w_min),   w_1 = 1,   Â′_t = w_t Â_t

    The student is not read. α = 0 is the identity.

    Source: the release of arXiv:2606.22600, a variant that its paper does not evaluate.
    """
    mask = batch.response_mask
    surprise = compact((-chosen(batch.require("teacher_logprobs"), mask)).clamp_min(0.0), mask)
    worst = _worst_means(surprise, window, q)
    weights = torch.exp(-alpha * worst).clamp_min(w_min)
    weights = torch.cat((torch.ones_like(weights[:, :1]), weights[:, 1:]), 1)
    return chosen(advantages, mask) * spread(weights, mask)


def _worst_means(surprise: Float[Tensor, "batch response"], window: int, q: float) -> Float[Tensor, "batch response"]:
    """Q of every token; where the windows are full and few values count, in time that does not grow with the window."""
    width, on_cpu = surprise.shape[1], surprise.device.type == "cpu"
    few = int(_wanted(torch.tensor(window), q))
    # The first token with a full window; a GPU selects anew, in few launches.
    full = window if on_cpu and few <= FEW and window < width else width
    tile = TILE if on_cpu else max(TILE, ROOM // max(1, len(surprise) * window))
    parts = [_worst_mean(surprise[:, :full], start, tile, window, q) for start in range(0, full, tile)]
    if full < width:
        parts.append(_full_windows(surprise[:, :-1], window, few).clamp_min(0.0) / few)
    return torch.cat(parts, 1) if parts else surprise


def _full_windows(x: Float[Tensor, "batch response"], window: int, few: int) -> Float[Tensor, "batch starts"]:
    """Sum of the `few` largest of x_p … x_{p + window − 1}, for every p that leaves a whole window.

    In blocks of `window` places each window is the end of one block and the beginning of the next; the largest values
    of both are carried along, and two falling lists a, b hold theirs among max(a_i, b_{few − 1 − i}).
    """
    rows, width = x.shape
    blocks = -(-width // window)
    padded = torch.nn.functional.pad(x, (0, blocks * window - width), value=-torch.inf)
    places = padded.view(rows, blocks, window).permute(2, 0, 1).contiguous()
    ends = _carried(places.flip(0), few).flip(1).permute(0, 2, 3, 1).reshape(few, rows, blocks * window)
    begins = _carried(places, few)
    begins[:, -1] = -torch.inf  # where a window is one block, its end is all of it
    begins = begins.permute(0, 2, 3, 1).reshape(few, rows, blocks * window)
    count = width - window + 1
    return torch.maximum(ends[..., :count], begins.flip(0)[..., window - 1 : window - 1 + count]).sum(0)


def _carried(places: Float[Tensor, "window batch block"], few: int) -> Float[Tensor, "few window batch block"]:
    """The `few` largest values up to each place, falling."""
    largest = [torch.full_like(places[0], -torch.inf) for _ in range(few)]
    found = places.new_empty(few, *places.shape)
    for place, value in enumerate(places):
        for number in range(few):
            largest[number], value = torch.maximum(largest[number], value), torch.minimum(largest[number], value)
            found[number, place] = largest[number]
    return found


def _wanted(seen: Int[Tensor, "*tile"], q: float) -> Int[Tensor, "*tile"]:
    """How many of the tokens seen count: ⌊(1 − q) · seen⌋, at least one."""
    return share_of(1.0 - q, seen).floor().long().clamp_min(1)


def _worst_mean(
    surprise: Float[Tensor, "batch response"], start: int, tile: int, window: int, q: float
) -> Float[Tensor, "batch tile"]:
    """Q of the tokens start … start + tile − 1."""
    stop = min(start + tile, surprise.shape[1])
    first = start - window
    left = surprise[:, max(first, 0) : max(stop - 1, 0)]
    left = torch.nn.functional.pad(left, (max(-first, 0), 0), value=-torch.inf)
    seen = torch.arange(start, stop, device=surprise.device).clamp(max=window)
    wanted = _wanted(seen, q)
    largest = (
        left.unfold(1, window, 1)
        .topk(int(_wanted(torch.tensor(min(stop - 1, window)), q)), dim=2)
        .values.clamp_min(0.0)
    )
    total = largest.cumsum(2).gather(2, (wanted - 1).expand(surprise.shape[0], -1)[..., None])[..., 0]
    return total / wanted


ROWS = Rows(
    MethodSpec(
        teacher_log_ratio,
        "OPD; ExOPD arXiv:2602.12125",
        requires=ratio_fields,
        domains={"lam": "[0, inf)"},
        ignores_reward=True,
    ),
    MethodSpec(
        teacher_confidence,
        IW_OPD,
        requires=frozenset({"teacher_logprobs"}),
        scope="response",
        domains={"window": "[1, inf)", "q": "[0, 1]", "alpha": "[0, inf)", "w_min": "[0, 1]"},
        limits=(at(alpha=0.0),),
        keeps_sign=True,
    ),
    presets={
        "opd": ["teacher_log_ratio"],
        "exopd": [{"teacher_log_ratio": {"lam": 1.25}}],
        "opd_confidence": ["teacher_log_ratio", "teacher_confidence"],
    },
    aliases={
        # Sampled forms: the teacher's prompt and weights make the difference (see docs/teachers.md).
        "opsd": Alias(of="opd", differs="OPSD (arXiv:2601.18734): the teacher is the base model, shown the solution."),
        "sdpo": Alias(
            of="opd",
            differs="SDPO (arXiv:2601.20802): the teacher is a moving average, shown another correct response.",
        ),
        "sdft": Alias(
            of="opd", differs="SDFT (arXiv:2601.19897): the teacher is the initial policy, shown a demonstration."
        ),
    },
)
