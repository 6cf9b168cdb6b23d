"""The benchmark as one HTML page that opens offline: ranking, token view, capacity. What a model wrote is escaped."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokencredit.files import make_folder, write_bytes
from tokencredit.methods.table import BASELINE, EXACT
from tokencredit.report.run_page.tokens import PART, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stand-in that becomes the page's text colour
BLUE, RED, GREY = "#2a6f97", "#b23a48", "#8d99ae"
UNBOUNDED = ("expected_direction", "teacher_expected")  # estimates of cosines that noise can push out of [−1, 1]
CONTROLS = (" (shuffled)", " (reversed)", " (mean)")  # how the names of controls end
NEGLIGIBLE = 5e-4  # share of the success that a bound on what is left out may have without being said
ROUNDING = 1e-6  # an estimate that is this far above 1 is 1
SHOWN = 3  # methods laid over the exact credit in the token view, the best ones and grpo


def write_bench_page(results: Mapping[str, Any], out: Path) -> Path:
    """Write the page of the results of `run_bench` to `out` by one rename, and return its path."""
    text = render_bench(results)
    make_folder(out.parent)
    write_bytes(out, text.encode("utf-8", errors="backslashreplace"))
    return out


def render_bench(results: Mapping[str, Any]) -> str:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tokencredit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["estimate"] = figure_text
    environment.filters["visible"] = lambda text: visible(str(text), keep_lines=True)
    cells = [_view(cell) for cell in results["cells"]]
    return environment.get_template("bench.html").render(cells=cells, config=results["config"])


def _view(cell: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of one cell; the pictures are our own drawings of numbers, with our own names."""
    from markupsafe import Markup

    ranked = _ranked(cell)
    names = [method["name"] for method in ranked if not method["name"].endswith(CONTROLS)]
    compared = list(dict.fromkeys([*[name for name in names if name != EXACT][: SHOWN - 1], BASELINE]))
    return {
        **cell,
        "success_text": success_text(cell),
        "notes": notes(cell),
        "ranked": ranked,
        "matched": {item["name"]: item["figures"] for item in cell["methods"] if item["matched"]},
        "ranking": Markup(_picture(lambda axes: _draw_ranking(axes, ranked), (7.0, 0.22 * len(ranked) + 0.8)))
        if ranked
        else "",
        "teacher_ranking": _teacher_ranking(cell),
        "capacity_plot": Markup(_picture(lambda axes: _draw_capacity(axes, cell["states"]), (5.0, 3.6))),
        "token_views": [_token_view(example, compared) for example in cell["examples"]],
    }


def _ranked(cell: Mapping[str, Any], figure: str = "direction") -> list[Mapping[str, Any]]:
    plain = [method for method in cell["methods"] if not method["matched"]]
    return sorted(plain, key=lambda method: -(method["figures"].get(figure, [0.0])[0] or 0.0))


def _token_view(example: Mapping[str, Any], compared: Sequence[str]) -> dict[str, Any]:
    """Rows of coloured tokens: exact credit on top, the methods below, each scaled to its own largest credit."""
    credits = {"exact": example["exact"]} | {
        name: example["methods"][name] for name in compared if name in example["methods"]
    }
    rows = []
    for name, values in credits.items():
        largest = max((abs(value) for value in values), default=0.0)
        cells = [
            {
                "token": visible(token) or PART,
                "value": value,
                "entropy": entropy,
                "sign": "plus" if value > 0 else "minus",
                "strength": round(abs(value) / largest, 3) if largest else 0.0,
            }
            for token, value, entropy in zip(example["tokens"], values, example["entropy"], strict=True)
        ]
        rows.append({"name": name, "tokens": cells})
    return {"prompt": example["prompt"], "reward": example["reward"], "rows": rows}


def _teacher_ranking(cell: Mapping[str, Any]) -> Any:
    """The ranking by the teacher's objective as a picture, or None where nothing was compared with it."""
    from markupsafe import Markup

    ranked = _ranked(cell, "teacher_direction")
    if not any("teacher_direction" in method["figures"] for method in ranked):
        return None
    size = (7.0, 0.22 * len(ranked) + 0.8)
    return Markup(_picture(lambda axes: _draw_ranking(axes, ranked, "teacher_direction", "teacher_sequence"), size))


def _draw_ranking(
    axes: "Axes", ranked: Sequence[Mapping[str, Any]], figure: str = "direction", crossed: str = ""
) -> None:
    for place, method in enumerate(reversed(ranked)):
        value, low, high = method["figures"][figure]
        if value is None:
            continue
        colour = RED if method["name"] == EXACT else GREY if method["name"].endswith(CONTROLS) else BLUE
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=colour, linewidth=1.6)
        axes.plot([value], [place], "o", color=colour, markersize=4)
        if crossed and method["figures"][crossed][0] is not None:
            axes.plot([method["figures"][crossed][0]], [place], "x", color=colour, markersize=4)
    axes.set_yticks(range(len(ranked)), [visible(method["name"], keep_lines=True) for method in reversed(ranked)])
    axes.axvline(0.0, color=INK, linewidth=0.5)
    axes.set_xlabel("cosine with the exact gradient, 95 % interval over prompts")
    axes.set_ylim(-0.6, len(ranked) - 0.4)


def _draw_capacity(axes: "Axes", states: Mapping[str, Sequence[float]]) -> None:
    entropies, information = np.asarray(states["H"]), np.asarray(states["I"])
    values = np.clip(np.asarray(states["V"]), 1e-12, 1.0 - 1e-12)
    bound = -values * np.log(values) - (1 - values) * np.log1p(-values)
    reach = np.linspace(0.0, max(float(entropies.max(initial=0.0)), 1.0), 50)
    axes.plot(reach, reach, color=INK, linewidth=0.8, label="H, the entropy bound")
    axes.axhline(np.log(2.0), color=INK, linewidth=0.8, linestyle="--", label="ln 2")
    axes.plot(entropies, np.minimum(entropies, bound), ".", color=GREY, markersize=2.5, label="min(H, h(V)), per state")
    axes.plot(entropies, information, ".", color=BLUE, markersize=2.5, label="I(token; outcome)")
    axes.set_xlabel("entropy of the policy at the state, nats")
    axes.set_ylabel("nats")
    axes.set_ylim(-0.02, 0.8)
    axes.legend(fontsize=7, frameon=False)


def _picture(draw: Callable[["Axes"], None], size: tuple[float, float]) -> str:
    """One plot as an inline SVG element that takes the page's text colour."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False, "axes.formatter.useoffset": False}):  # a name may hold a `$`
        return _drawn(draw, Figure(figsize=size, layout="constrained"))


def _drawn(draw: Callable[["Axes"], None], figure: "Figure") -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    figure.patch.set_alpha(0.0)
    axes.patch.set_alpha(0.0)
    draw(axes)
    axes.tick_params(colors=INK, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(INK)
    legend = axes.get_legend()
    for text in (axes.xaxis.label, axes.yaxis.label, *(legend.get_texts() if legend is not None else ())):
        text.set_color(INK)
        text.set_fontsize(8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(re.escape(INK), "currentColor", svg[svg.index("<svg") :])


def success_text(cell: Mapping[str, Any]) -> str:
    """The exact and the sampled success of a cell; a range where some spellings of accepted texts are not listed."""
    success = cell["success"]
    sampled, omitted, other = (success.get(name, 0.0) for name in ("sampled", "omitted", "other_spellings"))
    if omitted <= NEGLIGIBLE * success["exact"] and not other:
        return f"success {success['exact']:.3f} exact, {sampled:.3f} sampled"
    most = f" and at most {success['exact'] + omitted:.3f}" if omitted > NEGLIGIBLE * success["exact"] else ""
    text = f"success at least {success['exact']:.3f}{most} (exact for the listed spellings), {sampled:.3f} sampled"
    return f"{text}, and {other:.3f} of the responses spell an accepted text in other tokens" if other else text


def notes(cell: Mapping[str, Any]) -> list[str]:
    """Sentences below the table of a cell."""
    found = []
    if "nothing" in cell:
        found.append(f"nothing can be compared: {cell['nothing']}; take more rollouts, other prompts, or another model")
    if cell["success"].get("other_spellings", 0.0):
        found.append(
            "responses that spell an accepted text in tokens that are not listed count as wrong, here and in the exact "
            "values; list such spellings as token ids, or the text itself, in the task's `accepted`"
        )
    if cell.get("controls"):
        found.append(f"added controls: {', '.join(cell['controls'])} (--no-controls leaves them out)")
    if cell.get("no_baseline"):
        found.append(
            "the baseline is not among the methods, so no difference to it is shown (--baseline names another)"
        )
    if cell["left_out"]:
        found.append(f"left out: {', '.join(sorted(cell['left_out']))} (reasons in results.json)")
    if any(_outside(method["figures"].get(name)) for method in cell["methods"] for name in UNBOUNDED):
        found.append(
            "* this estimate of a cosine left [−1, 1] and was cut: it divides by an estimate of ‖E ĝ‖², which noise "
            "can make too small; `noise` where the whole interval is outside, so nothing is known; more rollouts help"
        )
    return found


def figure_text(estimate: Sequence[float | None] | None, name: str = "") -> str:
    """`0.55 [0.51, 0.59]`; an estimate of a cosine that is not bounded is cut to [−1, 1] with a star."""
    if estimate is None or estimate[0] is None:
        return "–"
    value, low, high = estimate[0], estimate[1], estimate[2]
    if name in UNBOUNDED and _outside(estimate):
        least, most = (value if low is None else low), (value if high is None else high)
        if least > 1.0 or most < -1.0:
            return "noise*"
        shown = ["" if item is None else _cut(item) for item in estimate]
    else:
        shown = ["" if item is None else f"{item:.2f}" for item in estimate]
    return shown[0] if low is None or high is None else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _outside(estimate: Sequence[float | None] | None) -> bool:
    return estimate is not None and any(item is not None and abs(item) > 1.0 + ROUNDING for item in estimate)


def _cut(value: float) -> str:
    return f"{value:.2f}" if abs(value) <= 1.0 + ROUNDING else f"{math.copysign(1.0, value):.2f}*"
