"""Progress of long work, on stderr: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")

LINE_EVERY = 10.0  # seconds between lines where stderr is a file


def is_hidden(character: str) -> bool:
    """Whether a character does not show, or changes how its neighbours show: all of Unicode's C and Z but the space.

    Among them are the ESC of a terminal's commands, newlines and tabs, marks that reverse text and lone surrogates.
    Private characters are not: fonts have them.
    """
    return not character.isprintable() and unicodedata.category(character) != "Co"


def printable(text: object) -> str:
    """Make text from elsewhere safe to print: hidden characters but tab and newline become escapes such as `\\x1b`.

    `rich` reads square brackets as markup even then: pass the result with `markup=False`, or as a `rich.text.Text`.
    """
    written = (repr(item)[1:-1] if is_hidden(item) and item not in "\t\n" else item for item in str(text))
    return "".join(written)


def say(text: str) -> None:
    """Print one line for the user on stderr, above a progress bar if one is shown."""
    print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


@runtime_checkable
class Advance(Protocol):
    """Reports that `steps` more units are done; `note` replaces the text behind the bar."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


def track(iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items of `iterable` and show how many are done."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(description, total) as advance:
        for item in iterable:
            yield item
            advance()


@contextmanager
def bar(description: str, total: int | None) -> Iterator[Advance]:
    """A progress bar as a context; the value is called once for every unit of work done."""
    if sys.stderr.isatty():
        with _terminal_bar(description, total) as advance:
            yield advance
    else:
        yield _lines(description, total)


@contextmanager
def _terminal_bar(description: str, total: int | None) -> Iterator[Advance]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:  # the core runs with torch, numpy and jaxtyping alone
        yield _lines(description, total)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=Console(stderr=True)) as progress:
        task = progress.add_task(printable(description), total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            progress.update(task, advance=steps)
            if note:
                progress.update(task, note=printable(note))

        yield advance


def _lines(description: str, total: int | None) -> Advance:
    start = last = time.monotonic()
    done = 0

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        finished_late = total is not None and done >= total and now - start > LINE_EVERY
        if now - last >= LINE_EVERY or finished_late:
            last = now
            share = f"{done}/{total}" if total is not None else str(done)
            say(f"{description}: {share} ({now - start:.0f} s) {note}".rstrip())

    return advance
