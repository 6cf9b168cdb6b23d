"""Pictures of every page as inline SVG; colours are CSS variables, so that they follow the light or dark theme."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from markupsafe import Markup
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


class Curve(NamedTuple):
    """Mean over seeds and its interval at each step (NaN where one seed is all there is)."""

    label: str
    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


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
    name: str,
    curves: Sequence[Curve],
    styles: Mapping[str, Style],
    *,
    in_percent: bool = False,
    unit_interval: bool = False,
) -> "Markup":
    """Lines with bands over training steps."""

    def draw(axes: "Axes") -> None:
        for curve in curves:
            _line(axes, curve, styles[curve.label])
        axes.set_xlabel(STEP)
        if unit_interval:
            axes.set_ylim(-0.03, 1.03)
        if in_percent:
            _label_in_percent(axes)

    return svg(name, draw)


def quadrant_lines(
    name: str, lines: Mapping[str, Curve], *, in_percent: bool = False, around_zero: bool = False
) -> "Markup":
    """One number per quadrant over training; low-entropy quadrants are dashed."""

    def draw(axes: "Axes") -> None:
        if around_zero:
            axes.axhline(0.0, color=GRID, linewidth=0.8)
        for quadrant, curve in lines.items():
            _line(axes, curve, Style(QUADRANT_COLOURS[quadrant], () if quadrant[1] == "H" else (5.0, 2.0)))
        axes.set_xlabel(STEP)
        if around_zero:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        else:
            axes.set_ylim(0, None)
        if in_percent:
            _label_in_percent(axes)

    return svg(name, draw)


def histogram(
    name: str, edges: Sequence[float], counts: Mapping[str, Sequence[int]], *, axis: str = "entropy from … nats"
) -> "Markup":
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
        _label_in_percent(axes)

    return svg(name, draw, bottom=0.27)


def profiles(
    name: str,
    lines: Mapping[str, Sequence[float]],
    styles: Mapping[str, Style],
    *,
    axis: str = "position in the response, %",
) -> "Markup":
    """A quantity by relative position in the response, one line a method."""

    def draw(axes: "Axes") -> None:
        for method, values in lines.items():
            line = styles[method]
            at = [100 * (k + 0.5) / len(values) for k in range(len(values))]
            points = [(x, y) for x, y in zip(at, values, strict=True) if not math.isnan(y)]
            axes.plot(*zip(*points, strict=True), color=line.colour, dashes=line.dashes, marker="o", markersize=3)
        axes.set_xlabel(axis)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, None)

    return svg(name, draw)


Row = tuple[float | None, float | None, float | None, str]


def intervals(axes: "Axes", names: Sequence[str], rows: Sequence[Row]) -> None:
    """Draw one line per name from the top: value, low and high end (None: not defined), and colour."""
    for place, (value, low, high, colour) in enumerate(rows):
        if value is not None and low is not None and high is not None:
            axes.plot([low, high], [place, place], color=colour, linewidth=1.8)
        if value is not None:
            axes.plot([value], [place], "o", color=colour, markersize=4)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(0.0, color=INK, linewidth=0.6)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _line(axes: "Axes", curve: Curve, style: Style) -> None:
    marker = "o" if len(curve.steps) <= 12 else ""
    axes.plot(curve.steps, curve.mean, color=style.colour, dashes=style.dashes, marker=marker, markersize=3)
    if not all(map(math.isnan, curve.low)):
        axes.fill_between(curve.steps, curve.low, curve.high, color=style.colour, alpha=0.18, linewidth=0)


def _label_in_percent(axes: "Axes") -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def svg(
    name: str, draw: "Callable[[Axes], None]", *, size: tuple[float, float] | None = None, bottom: float = 0.18
) -> "Markup":
    """Draw one picture as an `<svg>` element, which no template escapes: text inside it is escaped by the drawing.

    Args:
      name: what the ids in the picture start with, so that many pictures fit on one page.
      draw: draws on the axes, in the colours of this module.
      size: width and height in inches. Without it the picture is one of many in a grid, with margins that fit there.
      bottom: the lower margin of a picture in a grid.
    """
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": name,
        "font.size": 10,
        "legend.fontsize": 8,
        "legend.frameon": False,
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
        figure = Figure(figsize=size or SIZE, layout="constrained" if size else None)
        if size:
            draw(figure.add_subplot())
        else:
            _draw_in_grid(figure.add_axes((0.16, bottom, 0.81, 0.97 - bottom)), draw, bottom)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    picture = _for_page(file.getvalue(), name)
    return Markup(picture if size else re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", picture, count=1))


def _draw_in_grid(axes: "Axes", draw: "Callable[[Axes], None]", bottom: float) -> None:
    """Draw with fixed margins: a layout engine draws everything twice."""
    from matplotlib.ticker import MaxNLocator

    draw(axes)
    left = _write_whole_labels(axes)
    axes.set_position((left, bottom, 0.97 - left, 0.97 - bottom))
    if axes.get_xlabel() == STEP:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))


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
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)
