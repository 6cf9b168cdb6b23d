"""The kit of the HTML pages: one frame with a content-security policy, every value escaped, files written whole."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tokencredit.diagnostics.stats import Interval
from tokencredit.errors import TokenCreditError
from tokencredit.files import make_folder, write_bytes
from tokencredit.progress import is_hidden

HOME = "tokencredit.report"  # the package with the frame of all pages


def render(template: str, content: Mapping[str, Any], *, package: str = HOME) -> str:
    """Render a page from a template of `package`; templates extend `page.html` of this package.

    Every value is escaped, except the pictures of `plots.svg`, which are `Markup`.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    homes = [PackageLoader(name) for name in dict.fromkeys((package, HOME))]
    environment = Environment(
        loader=ChoiceLoader(homes), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "visible": lambda text: visible(str(text), keep_lines=True),
        "number": number,
        "percent": percent,
        "interval": interval_text,
    }
    return environment.get_template(template).render(content)


def write_page(path: Path, text: str) -> Path:
    """Write a page whole or not at all, its folder with it, and return its path."""
    if path.is_dir():
        raise TokenCreditError(f"{path} is a folder", hint="name a file, such as report.html")
    make_folder(path.parent)
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))  # a lone surrogate is not UTF-8
    return path


def visible(text: str, *, keep_lines: bool = False) -> str:
    """Write out everything in `text` that would not show, or would change how its neighbours show.

    Newlines become ⏎ and spaces · (both kept where `keep_lines`), tabs ⇥; control characters, lone surrogates and
    format characters (such as those that reverse the writing direction) become their code point ⟨U+202E⟩.
    """
    written = {"\t": "⇥", "\n": "\n"} if keep_lines else {"\t": "⇥", "\n": "⏎", " ": "·"}
    return "".join(
        written.get(character, f"⟨U+{ord(character):04X}⟩" if is_hidden(character) else character) for character in text
    )


def number(value: float | None, digits: int = 3) -> str:
    """A number with a real minus sign, to four decimals at most; a dash for what does not exist."""
    if value is None or math.isnan(value):
        return "–"
    short = f"{value:.{digits}g}" if abs(value) >= 0.01 else f"{value:.4f}".rstrip("0").rstrip(".")
    return ("0" if short == "-0" else short).replace("-", "−")


def percent(value: float) -> str:
    """A share in percent, without the sign of percent."""
    return f"{100 * value:.1f}".replace("-", "−")


def interval_text(value: Interval | None, in_percent: bool = True, signed: bool = False) -> str:
    """A value with its interval: 41.2 [38.0, 44.5]."""
    if value is None or math.isnan(value.mean):
        return "–"
    write = percent if in_percent else partial(number, digits=4)
    plus = "+" if signed and value.mean > 0 else ""
    if math.isnan(value.low):
        return f"{plus}{write(value.mean)}"
    return f"{plus}{write(value.mean)} [{write(value.low)}, {write(value.high)}]"
