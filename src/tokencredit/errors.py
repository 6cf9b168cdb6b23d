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


def unknown(kind: str, name: object, accepted: Iterable[str]) -> TokenCreditError:
    """The error for a name that is not in `accepted`: it names the nearest one and lists them all."""
    names = sorted(accepted)
    nearest = get_close_matches(str(name), names, n=1, cutoff=0.5)
    guess = f", did you mean {nearest[0]!r}?" if nearest else ";"
    return TokenCreditError(f"unknown {kind} {str(name)!r}{guess} available: {', '.join(names) or '(none)'}")
