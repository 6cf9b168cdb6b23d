"""Errors that repeat what was given and say what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class TokenCreditError(ValueError):
    """What is wrong, in one line, and what to do about it.

    `message` names the constraint, the value and the alternatives; `hint` names the remedy. The command line prints
    both and exits with status 2.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n\nhint: {hint}")
        self.message = message
        self.hint = hint


def shown(value: object, limit: int = 200) -> str:
    """The value for an error message: its `repr` on one line, cut to `limit` characters, whatever the object is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a `repr` of somebody else's object, or of a nesting too deep to write out
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else f"{text[:limit]}…"


def unknown(kind: str, name: object, accepted: Iterable[str]) -> TokenCreditError:
    """The error for a name that is not in `accepted`: it names the nearest one and lists them all."""
    names = sorted(accepted)
    text = name if isinstance(name, str) else shown(name)
    nearest = get_close_matches(text[:100], names, n=1, cutoff=0.5)
    guess = f", did you mean {nearest[0]!r}?" if nearest else ";"
    return TokenCreditError(f"unknown {kind} {shown(text)}{guess} available: {', '.join(names) or '(none)'}")
