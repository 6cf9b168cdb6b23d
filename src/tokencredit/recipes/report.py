"""A run as a table and as one HTML page that opens offline; text of recipes and reasons is escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from markupsafe import Markup

from tokencredit.files import read_json, write_json
from tokencredit.recipes.confirm import expected_maximum, shrunken
from tokencredit.recipes.evaluate.history import Evaluation, usable
from tokencredit.recipes.search.loop import Search
from tokencredit.recipes.search.policies import transitions_of
from tokencredit.recipes.search.propose import credits
from tokencredit.report import page, plots
from tokencredit.report.page import visible
from tokencredit.report.plots import GRID, INK, SERIES


def build_report(search: Search) -> dict[str, Any]:
    """Gather the numbers of a run, write `report.json` and `report.html`, and return the numbers."""
    content = report_content(search)
    write_json(search.folder / "report.json", content)
    page.write_page(search.folder / "report.html", render(content))
    return content


def report_content(search: Search) -> dict[str, Any]:
    """Everything that the page shows, as plain JSON."""
    good = usable(search.history)
    noise = search.config.noise_sd
    content: dict[str, Any] = {
        "pool": {"hash": search.materials.pool.hash, "samples": len(search.materials.pool)},
        "policy": search.config.search.policy,
        "seed": search.config.search.seed,
        "noise_sd": noise,
        "evaluations": [_row(evaluation) for evaluation in search.history],
        "failed": len(search.history) - len(good),
        "expected_maximum_of_noise": expected_maximum(len(good)) * noise if good else 0.0,
    }
    if good:
        finalist = search.finalists(1)[0]
        means = search.chooser.posterior(good) if len(good) > 1 else np.array([good[0].score])
        content["search"] = asdict(shrunken(search.history, noise))
        content["posterior"] = {str(e.slot): float(mean) for e, mean in zip(good, means, strict=True)}
        content["finalist"] = _row(finalist)
        content["funnel"] = [asdict(step) for step in search.chooser.executor.run(finalist.recipe).trace]
        credit = credits(transitions_of(good))
        content["credits"] = [{"operator": op, "position": place, "credit": c} for (op, place), c in credit.items()]
    if search.adviser is not None:
        content["llm"] = search.adviser.counts
    confirmed = search.folder / "confirm.json"
    if confirmed.is_file():
        content["confirm"] = read_json(confirmed)
    return content


def _row(e: Evaluation) -> dict[str, Any]:
    fields = ("slot", "kind", "status", "reason", "score", "samples", "tokens", "mean", "sd", "seconds", "below_floor")
    row = {name: getattr(e, name) for name in fields}
    failures = {task: scores.get("parse_fail", 0) for task, scores in e.tasks.items()}
    return row | {"recipe": str(e.recipe), "points": e.points, "parse_fail": failures, "state": e.state}


def report_lines(content: Mapping[str, Any]) -> list[str]:
    """The table on stdout."""
    lines = [f"{'slot':>4} {'kind':8} {'score':>8} {'expected':>15} {'samples':>8}  recipe"]
    for row in content["evaluations"]:
        score = f"{row['score']:8.2f}" if row["score"] is not None else "  failed"
        expected = f"{row['mean']:8.2f} ± {row['sd']:4.2f}" if row["mean"] is not None else ""
        lines.append(f"{row['slot']:4d} {row['kind']:8} {score} {expected:>15} {row['samples']:8d}  {row['recipe']}")
    if "search" in content:
        search = content["search"]
        lines += [
            "",
            f"best observed {search['best']:.2f}, mean {search['mean']:.2f}; noise alone would put the best "
            f"{content['expected_maximum_of_noise']:.2f} above the mean",
            f"shrunken estimate {search['estimate']:.2f}, that is {search['gain']:+.2f} over the mean",
        ]
        lines.append(f"finalist: slot {content['finalist']['slot']}, {content['finalist']['recipe']}")
    return lines + (["", *confirm_lines(content["confirm"])] if "confirm" in content else [])


def confirm_lines(content: Mapping[str, Any]) -> list[str]:
    """The confirmation as text, headline last."""
    finalist, shrunk = content["finalist"], content["search"]
    lines = [
        f"best observed {shrunk['best']:.2f} · shrunken {shrunk['estimate']:.2f} · "
        f"confirmed mean {finalist['mean']:.2f} [{finalist['low']:.2f}, {finalist['high']:.2f}] "
        f"over {finalist['seeds']} seeds"
    ]
    for row in content["differences"]:
        lines.append(
            f"finalist − {row['control']}: {row['mean']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}] "
            f"({row['method']}) {row['verdict']}"
        )
    return lines


def render(content: Mapping[str, Any]) -> str:
    """The page; pictures are inline SVG, nothing is loaded from anywhere."""
    parts: dict[str, Any] = {"search": None, "confirm": None, "finalist": None, "credits": [], "llm": {}}
    values = {"content": parts | dict(content), "pictures": {"path": None} | draw(content)}
    return page.render("recipes.html", values, package="tokencredit.recipes")


def draw(content: Mapping[str, Any]) -> dict[str, Markup]:
    """Search path, size against score, funnel, and the forest plot where a confirmation exists."""
    pictures = {}
    done = [row for row in content["evaluations"] if row["score"] is not None]
    if done:
        pictures["path"] = _picture("path", _draw_path, done, content)
        pictures["size"] = _picture("size", _draw_size, done, content)
        pictures["funnel"] = _picture("funnel", _draw_funnel, content["funnel"], content)
    if content.get("confirm", {}).get("differences"):
        pictures["forest"] = _picture("forest", _draw_forest, content["confirm"]["differences"], content)
    return pictures


KINDS = {"warm-up": (GRID, "s"), "control": (SERIES[1], "D"), "search": (SERIES[0], "o")}


def _picture(name: str, paint: Any, rows: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> Markup:
    bars = paint in {_draw_funnel, _draw_forest}
    height = 0.9 + 0.42 * (len(rows) + 1) if bars else 3.4
    return plots.svg(name, lambda axes: paint(axes, rows, content), size=(7.2, height))


def _draw_path(axes: Any, rows: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> None:
    noise = content["noise_sd"]
    slots, scores = [row["slot"] for row in rows], [row["score"] for row in rows]
    level = float(np.median(scores))
    axes.axhspan(level - 2 * noise, level + 2 * noise, color=SERIES[0], alpha=0.12, label="median ± 2 sd of noise")
    axes.step(slots, np.maximum.accumulate(scores), where="post", color=GRID, label="best so far")
    for kind, (colour, marker) in KINDS.items():
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            axes.errorbar(
                [row["slot"] for row in chosen],
                [row["score"] for row in chosen],
                yerr=noise,
                fmt=marker,
                color=colour,
                label=kind,
                capsize=2,
                linewidth=1,
            )
    forecast = [row for row in rows if row["mean"] is not None]
    axes.plot([r["slot"] for r in forecast], [r["mean"] for r in forecast], "_", color=INK, ms=11, label="forecast")
    axes.set_xlabel("evaluation")
    axes.set_ylabel("score, points")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22))


def _draw_size(axes: Any, rows: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> None:
    for kind, (colour, marker) in KINDS.items():
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            axes.plot([r["samples"] for r in chosen], [r["score"] for r in chosen], marker, color=colour, label=kind)
    finalist = content["finalist"]
    axes.annotate("finalist", (finalist["samples"], finalist["score"]), xytext=(6, 8), textcoords="offset points")
    axes.set_xlim(0, content["pool"]["samples"] * 1.02)
    axes.set_xlabel("samples in the subset")
    axes.set_ylabel("score, points")
    axes.legend()


def _draw_funnel(axes: Any, rows: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> None:
    names = ["pool"] + [f"{number}. {row['op']}" for number, row in enumerate(rows, start=1)]
    counts = [content["pool"]["samples"]] + [row["samples"] for row in rows]
    places = np.arange(len(names))
    axes.barh(places, counts, color=[GRID] + [SERIES[0]] * len(rows), height=0.62)
    for place, count in zip(places, counts, strict=True):
        axes.text(count, place, f" {count:,} ({count / counts[0]:.0%})", va="center", fontsize=9)
    axes.set_yticks(places, [visible(name, keep_lines=True) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, counts[0] * 1.2)
    axes.set_xlabel("samples kept")


def _draw_forest(axes: Any, rows: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> None:
    colours = [SERIES[2] if row["low"] > 0 else GRID for row in rows]
    lines = [(row["mean"], row["low"], row["high"], colour) for row, colour in zip(rows, colours, strict=True)]
    plots.intervals(axes, [f"− {row['control']}" for row in rows], lines)
    axes.set_xlabel("finalist minus control, points, 95 % interval")
