"""Pictures as inline SVG. Colours are CSS variables of the page, so that they follow its light or dark theme."""

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from tokencredit.report.run_page.results import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib draws with these stand-ins; each becomes a variable of templates/style.css.
SERIES = tuple(f"#5e00{k:02x}" for k in range(1, 7))
QUADRANT_COLOURS = {"PHR": "#9a0001", "PLR": "#9a0002", "NHR": "#9a0003", "NLR": "#9a0004"}
POLARITY_COLOURS = {"positive": "#9a0001", "negative": "#9a0003", "none": "#777701"}
INK, GRID = "#010203", "#777701"
VARIABLES = {colour: f"var(--series-{k})" for k, colour in enumerate(SERIES, 1)}
VARIABLES |= {colour: f"var(--{name.lower()})" for name, colour in QUADRANT_COLOURS.items()}
VARIABLES |= {INK: "currentColor", GRID: "var(--muted)"}

DASHES: tuple[tuple[float, ...], ...] = ((), (5.0, 2.0), (1.5, 1.5), (5.0, 1.5, 1.5, 1.5))
SIZE = (4.0, 2.7)  # inches: 288 units, about the width of a column of the page, so that text keeps its size
STEP = "training step"
CHARACTER = 0.0225  # width of a digit of a tick, as a share of the picture


class Style(NamedTuple):
    """Colour and dash pattern of one method, the same in every picture and in the legend."""

    colour: str
    dashes: tuple[float, ...]

    @property
    def variable(self) -> str:
        """The colour as the page's CSS knows it."""
        return VARIABLES[self.colour]


def style(number: int) -> Style:
    """Style of the method of 0-based `number`; neighbours differ in colour and in dash pattern."""
    return Style(SERIES[number % len(SERIES)], DASHES[(number + number // len(SERIES)) % len(DASHES)])


def curves(
    name: str, curves: Sequence[Curve], styles: dict[str, Style], *, percent: bool = False, unit_interval: bool = False
) -> str:
    """Lines with bands over training steps."""

    def draw(axes: "Axes") -> None:
        for curve in curves:
            of = styles[curve.label]
            _line(axes, curve, of.colour, of.dashes)
        axes.set_xlabel(STEP)
        if unit_interval:
            axes.set_ylim(-0.03, 1.03)
        if percent:
            _percent(axes)

    return _svg(name, draw)


def quadrant_lines(name: str, lines: dict[str, Curve], *, percent: bool = False) -> str:
    """One number per quadrant over training; low-entropy quadrants are dashed."""

    def draw(axes: "Axes") -> None:
        for quadrant, curve in lines.items():
            _line(axes, curve, QUADRANT_COLOURS[quadrant], () if quadrant[1] == "H" else (5.0, 2.0))
        axes.set_xlabel(STEP)
        axes.set_ylim(0, None)
        if percent:
            _percent(axes)

    return _svg(name, draw)


def bonus_lines(name: str, lines: dict[str, Curve]) -> str:
    """What was added to the credit of each quadrant over training, around 0; low-entropy quadrants are dashed."""

    def draw(axes: "Axes") -> None:
        axes.axhline(0.0, color=GRID, linewidth=0.8)
        for quadrant, curve in lines.items():
            _line(axes, curve, QUADRANT_COLOURS[quadrant], () if quadrant[1] == "H" else (5.0, 2.0))
        axes.set_xlabel(STEP)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")

    return _svg(name, draw)


def histogram(
    name: str, edges: Sequence[float], counts: dict[str, Sequence[int]], *, axis: str = "entropy from … nats"
) -> str:
    """Share of the tokens of each polarity in bins of entropy, side by side."""
    totals = {polarity: sum(values) for polarity, values in counts.items()}
    shown = [polarity for polarity, total in totals.items() if total]

    def draw(axes: "Axes") -> None:
        width = 0.8 / max(len(shown), 1)
        for k, polarity in enumerate(shown):
            at = [bin_ + 0.1 + (k + 0.5) * width for bin_ in range(len(edges) - 1)]
            heights = [value / totals[polarity] for value in counts[polarity]]
            axes.bar(at, heights, width=width, color=POLARITY_COLOURS[polarity])
        axes.set_xticks(range(len(edges) - 1), [f"{edge:g}" for edge in edges[:-1]], rotation=45)
        axes.set_xlabel(axis)
        axes.grid(axis="x", visible=False)
        _percent(axes)

    return _svg(name, draw, bottom=0.27)


def profiles(
    name: str,
    lines: dict[str, Sequence[float]],
    styles: dict[str, Style],
    *,
    axis: str = "position in the response, %",
) -> str:
    """A quantity by relative position in the response, one line a method."""

    def draw(axes: "Axes") -> None:
        for method, values in lines.items():
            of = styles[method]
            at = [100 * (k + 0.5) / len(values) for k in range(len(values))]
            found = [(x, y) for x, y in zip(at, values, strict=True) if not math.isnan(y)]
            axes.plot(*zip(*found, strict=True), color=of.colour, dashes=of.dashes, marker="o", markersize=3)
        axes.set_xlabel(axis)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, None)

    return _svg(name, draw)


def _line(axes: "Axes", curve: Curve, colour: str, dashes: tuple[float, ...]) -> None:
    marker = "o" if len(curve.steps) <= 12 else ""
    axes.plot(curve.steps, curve.mean, color=colour, dashes=dashes, marker=marker, markersize=3)
    if not all(map(math.isnan, curve.low)):
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)


def _percent(axes: "Axes") -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def _svg(name: str, draw: "Callable[[Axes], None]", *, bottom: float = 0.18) -> str:
    """One picture as an `<svg>` element whose ids start with `name`, so that many fit on one page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings = {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": name,
        "font.size": 10,
        "lines.linewidth": 1.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.alpha": 0.25,
        "text.parse_math": False,  # a name may hold a `$`
        "axes.formatter.useoffset": False,
    }
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with rc_context(settings):
        figure = Figure(figsize=SIZE)
        # Fixed margins: a layout engine draws everything twice.
        axes = figure.add_axes((0.16, bottom, 0.81, 0.97 - bottom))
        draw(axes)
        left = _write_whole_labels(axes)
        axes.set_position((left, bottom, 0.97 - left, 0.97 - bottom))
        if axes.get_xlabel() == STEP:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _for_page(file.getvalue(), name)


def _write_whole_labels(axes: "Axes") -> float:
    """Write the numbers of the vertical axis in full instead of an offset; return the margin that they need."""
    from matplotlib.ticker import ScalarFormatter

    low, high = sorted(axes.get_ylim())
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    step = min((b - a for a, b in pairwise(ticks)), default=0.0)
    if isinstance(axes.yaxis.get_major_formatter(), ScalarFormatter) and step > 0:
        axes.yaxis.set_major_formatter(partial(_tick, step=step, largest=max(map(abs, ticks))))
    labels = axes.yaxis.get_major_formatter().format_ticks(ticks)
    return max(0.16, 0.055 + CHARACTER * max(map(len, labels), default=0))


def _tick(value: float, place: int | None = None, *, step: float, largest: float) -> str:
    """A tick with as many decimals as tell it from its neighbours; far from 1 as a power of ten."""
    if largest >= 1e6 or largest < 1e-4:
        digits = max(0, math.ceil(math.log10(largest / step)))
        return f"{value:.{digits + 1}g}".replace("-", "−")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals and abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:  # steps of 0.25
        decimals += 1
    return f"{value:.{decimals}f}".replace("-", "−")


def _for_page(text: str, name: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)
