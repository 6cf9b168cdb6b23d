"""The page of the benchmark: ranking, figures, the credit of example tokens, capacity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokencredit.methods.table import EXACT as EXACT_CREDIT
from tokencredit.report import bench_table, page, plots
from tokencredit.report.page import visible
from tokencredit.report.plots import GRID, INK, SERIES
from tokencredit.report.run_page.tokens import PART

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

METHOD, EXACT, CONTROL = SERIES[0], SERIES[1], GRID  # colours
COMPARED = 3  # methods below the exact credit in the token view, the best ones and the baseline


def write_bench_page(results: Mapping[str, Any], out: Path) -> Path:
    """Write the page of the results of `run_bench` to `out`, whole or not at all, and return its path."""
    return page.write_page(out, render_bench(results))


def render_bench(results: Mapping[str, Any]) -> str:
    """The page as HTML."""
    config = results["config"]
    cells = [_cell_content(cell, number, config["baseline"]) for number, cell in enumerate(results["cells"])]
    return page.render("bench.html", {"cells": cells, "config": config})


def _cell_content(cell: Mapping[str, Any], number: int, baseline: str) -> dict[str, Any]:
    """What the template shows of one cell."""
    ranked = bench_table.ranked(cell)
    controls = set(cell.get("controls", ()))
    names = [method["name"] for method in ranked if method["name"] not in controls]
    compared = list(dict.fromkeys([*[name for name in names if name != EXACT_CREDIT][: COMPARED - 1], baseline]))
    columns = bench_table.all_columns(cell)
    return {
        **cell,
        "success_text": bench_table.success_text(cell),
        "notes": bench_table.notes(cell),
        "ranked": ranked,
        "headings": [name.replace("baseline", baseline) for name in bench_table.header(columns)],
        "rows": bench_table.table_rows(cell, columns),
        "ranking": _draw_ranking(f"ranking-{number}", ranked, controls, "direction"),
        "teacher_ranking": _draw_teacher_ranking(cell, number, controls),
        "capacity_plot": _draw_capacity(f"capacity-{number}", cell["states"]),
        "token_views": [_token_view(example, compared) for example in cell["examples"]],
    }


def _token_view(example: Mapping[str, Any], compared: Sequence[str]) -> dict[str, Any]:
    """Rows of coloured tokens: exact credit on top, the methods below, each scaled to its own largest credit."""
    credits = {"exact": example["exact"]} | {
        name: example["methods"][name] for name in compared if name in example["methods"]
    }
    rows = []
    for name, values in credits.items():
        largest = max((abs(value) for value in values), default=0.0) or 1.0
        cells = [
            {
                "token": visible(token) or PART,
                "value": value,
                "entropy": entropy,
                "sign": "u" if value > 0 else "d",
                "strength": round(abs(value) / largest, 3),
            }
            for token, value, entropy in zip(example["tokens"], values, example["entropy"], strict=True)
        ]
        rows.append({"name": name, "tokens": cells})
    return {"prompt": example["prompt"], "reward": example["reward"], "rows": rows}


def _draw_teacher_ranking(cell: Mapping[str, Any], number: int, controls: set[str]) -> "Markup | None":
    """The ranking by the teacher's objective, or None where nothing was compared with it."""
    ranked = bench_table.ranked(cell, "teacher_direction")
    if not any("teacher_direction" in method["figures"] for method in ranked):
        return None
    return _draw_ranking(f"teacher-ranking-{number}", ranked, controls, "teacher_direction", "teacher_sequence")


def _draw_ranking(
    name: str, ranked: Sequence[Mapping[str, Any]], controls: set[str], figure: str, crossed: str = ""
) -> "Markup":
    colours = [_colour(method["name"], controls) for method in ranked]

    def draw(axes: "Axes") -> None:
        labels = [visible(method["name"], keep_lines=True) for method in ranked]
        rows = [(*method["figures"][figure], colour) for method, colour in zip(ranked, colours, strict=True)]
        plots.intervals(axes, labels, rows)
        for place, (method, colour) in enumerate(zip(ranked, colours, strict=True)):
            value = method["figures"].get(crossed, [None])[0]
            if value is not None:
                axes.plot([value], [place], "x", color=colour, markersize=4)
        axes.set_xlabel("cosine with the exact gradient, 95 % interval over prompts")

    return plots.svg(name, draw, size=(7.0, 0.22 * len(ranked) + 0.8))


def _colour(name: str, controls: set[str]) -> str:
    if name == EXACT_CREDIT:
        return EXACT
    return CONTROL if name in controls else METHOD


def _draw_capacity(name: str, states: Mapping[str, Sequence[float]]) -> "Markup":
    entropies, information = np.asarray(states["H"]), np.asarray(states["I"])
    values = np.clip(np.asarray(states["V"]), 1e-12, 1.0 - 1e-12)
    bound = -values * np.log(values) - (1 - values) * np.log1p(-values)
    reach = np.linspace(0.0, max(float(entropies.max(initial=0.0)), 1.0), 50)

    def draw(axes: "Axes") -> None:
        axes.plot(reach, reach, color=INK, linewidth=0.8, label="H, the entropy bound")
        axes.axhline(np.log(2.0), color=INK, linewidth=0.8, linestyle="--", label="ln 2")
        tight = np.minimum(entropies, bound)
        axes.plot(entropies, tight, ".", color=GRID, markersize=2.5, label="min(H, h(V)), per state")
        axes.plot(entropies, information, ".", color=METHOD, markersize=2.5, label="I(token; outcome)")
        axes.set_xlabel("entropy of the policy at the state, nats")
        axes.set_ylabel("nats")
        axes.set_ylim(-0.02, 0.8)
        axes.legend()

    return plots.svg(name, draw, size=(5.0, 3.6))
