"""The words and tables of a benchmark's results: the page and the terminal show the same."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

UNBOUNDED = ("expected_direction", "teacher_expected")  # estimates of cosines that noise can push out of [−1, 1]
NEGLIGIBLE = 5e-4  # share of the success that a bound on what is left out may have without being said
ROUNDING = 1e-6  # an estimate that is this far above 1 is 1

# Columns from the narrow table of a terminal to the page; with a teacher's objective others.
NARROW = ("direction", "direction_over_baseline", "expected_direction", "progress")
COLUMNS = (
    *("direction", "direction_over_baseline", "expected_direction", "signal_to_noise"),
    *("progress", "rank_correlation", "captured"),
)
TEACHER_NARROW = ("direction", "expected_direction", "teacher_direction", "teacher_sequence")
TEACHER = ("teacher_direction", "teacher_over_baseline", "teacher_expected", "teacher_sequence")
TEACHER_COLUMNS = ("direction", "expected_direction", *TEACHER, "signal_to_noise", "progress")
TOKENS = ("rank_correlation", "sign_agreement", "captured", "gini", "effective_tokens")

Cell = Mapping[str, Any]
Stored = Sequence[float | None]  # value, low and high as JSON has them; null where not defined


def has_objective(cell: Cell) -> bool:
    """Whether the methods were compared with the gradient of a teacher's objective."""
    return "divergence" in cell.get("teacher", {})


def all_columns(cell: Cell) -> tuple[str, ...]:
    """Every figure of the page's table, in order."""
    first = ("direction", "direction_over_baseline", "expected_direction", "signal_to_noise")
    return (*first, *(TEACHER if has_objective(cell) else ()), "progress", *TOKENS)


def ranked(cell: Cell, figure: str = "direction") -> list[Mapping[str, Any]]:
    """Methods without their mass-matched twins, the best first."""
    plain = [method for method in cell["methods"] if not method["matched"]]
    return sorted(plain, key=lambda method: -(method["figures"].get(figure, [0.0])[0] or 0.0))


def header(columns: Sequence[str]) -> list[str]:
    """Names of the columns."""
    return ["method", *(name.replace("_", " ") for name in columns), "direction, mass matched"]


def table_rows(cell: Cell, columns: Sequence[str]) -> list[list[str]]:
    """One row per method, best direction first; its mass-matched twin gives the last column."""
    matched = {method["name"]: method["figures"]["direction"] for method in cell["methods"] if method["matched"]}
    return [
        [
            method["name"],
            *(estimate_text(method["figures"].get(name), name) for name in columns),
            estimate_text(matched[method["name"]]) if method["name"] in matched else "same",
        ]
        for method in ranked(cell)
    ]


def title(cell: Cell) -> str:
    """What the cell measured, in one line."""
    sizes = cell["sizes"]
    text = (
        f"{cell['task']}, {cell['stage']}: {success_text(cell)}; "
        f"{sizes['prompts']} prompts, {sizes['accepted']} accepted responses"
    )
    if not has_objective(cell):
        return text
    teacher = cell["teacher"]
    return (
        f"{text}; teacher's success {teacher['success']:.3f}, KL to it {teacher['divergence']:.3f} nats a response, "
        f"{100 * teacher['covered']:.1f} % of the state visits listed"
    )


def success_text(cell: Cell) -> str:
    """The exact and the sampled success of a cell; a range where some spellings of accepted texts are not listed."""
    success = cell["success"]
    sampled, omitted, other = (success.get(name, 0.0) for name in ("sampled", "omitted", "other_spellings"))
    if omitted <= NEGLIGIBLE * success["exact"] and not other:
        return f"success {success['exact']:.3f} exact, {sampled:.3f} sampled"
    most = f" and at most {success['exact'] + omitted:.3f}" if omitted > NEGLIGIBLE * success["exact"] else ""
    text = f"success at least {success['exact']:.3f}{most} (exact for the listed spellings), {sampled:.3f} sampled"
    return f"{text}, and {other:.3f} of the responses spell an accepted text in other tokens" if other else text


def notes(cell: Cell) -> list[str]:
    """What the table does not say by itself: why it is empty, whose rows were added or left out, what a star means."""
    sentences = []
    if "nothing" in cell:
        sentences.append(
            f"nothing can be compared: {cell['nothing']}; take more rollouts, other prompts, or another model"
        )
    if cell["success"].get("other_spellings", 0.0):
        sentences.append(
            "responses that spell an accepted text in tokens that are not listed count as wrong, here and in the exact "
            "values; list such spellings as token ids, or the text itself, in the task's `accepted`"
        )
    if cell.get("controls"):
        sentences.append(f"added controls: {', '.join(cell['controls'])} (--no-controls leaves them out)")
    if cell.get("no_baseline"):
        sentences.append(
            "the baseline is not among the methods, so no difference to it is shown (--baseline names another)"
        )
    if cell["left_out"]:
        sentences.append(f"left out: {', '.join(sorted(cell['left_out']))} (reasons in results.json)")
    if any(_is_outside(method["figures"].get(name)) for method in cell["methods"] for name in UNBOUNDED):
        sentences.append(
            "* this estimate of a cosine left [−1, 1] and was cut: it divides by an estimate of ‖E ĝ‖², which noise "
            "can make too small; `noise` where the whole interval is outside, so nothing is known; more rollouts help"
        )
    return sentences


def estimate_text(estimate: Stored | None, name: str = "") -> str:
    """`0.55 [0.51, 0.59]`; an estimate of a cosine that is not bounded is cut to [−1, 1] with a star."""
    if estimate is None or estimate[0] is None:
        return "–"
    value, low, high = estimate[0], estimate[1], estimate[2]
    is_cut = name in UNBOUNDED and _is_outside(estimate)
    least, most = (value if end is None else end for end in (low, high))
    if is_cut and (least > 1.0 or most < -1.0):
        return "noise*"
    write = _write_cut if is_cut else "{:.2f}".format
    return write(value) if low is None or high is None else f"{write(value)} [{write(low)}, {write(high)}]"


def _is_outside(estimate: Stored | None) -> bool:
    return estimate is not None and any(item is not None and abs(item) > 1.0 + ROUNDING for item in estimate)


def _write_cut(value: float) -> str:
    return f"{value:.2f}" if abs(value) <= 1.0 + ROUNDING else f"{math.copysign(1.0, value):.2f}*"
