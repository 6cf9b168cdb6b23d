"""Text of other people on a terminal: control characters are shown, not obeyed."""

import unicodedata

_KEPT = {"\t": " ", "\n": " ", "\r": " "}
_SHOWN = {"Cc", "Cs"}  # control characters (ESC among them) and lone surrogates
_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they reorder what follows


def plain_text(text: str) -> str:
    """Return `text` as one line that a terminal prints as it is.

    Control characters, lone surrogates and marks that reorder text become escapes such as `\\x1b`, so that an
    evaluator's log or a file name can neither move the cursor nor stop the output. Line ends become spaces.
    """
    return "".join(_KEPT.get(character) or _show(character) for character in text)


def _show(character: str) -> str:
    if character in _BIDI or unicodedata.category(character) in _SHOWN:
        return character.encode("unicode_escape").decode("ascii")
    return character
