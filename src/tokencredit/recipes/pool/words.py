"""Words of a text in any script: what lies between spaces, or single characters where a script writes no spaces."""

import re
import unicodedata
from collections.abc import Iterable
from functools import cache

# Scripts that put no space between words: a clause of them would count as one word, so the character is the unit.
_SPACELESS = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai, Lao, Burmese, Khmer
    *((0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x1B00, 0x1B7F)),  # Tai Le, New Tai Lue, Tai Tham, Balinese
    *((0x3005, 0x3007), (0x3021, 0x3029), (0x3031, 0x303C)),  # marks of repetition, the Chinese zero
    *((0x3040, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF)),  # Hiragana, Katakana, Bopomofo
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),  # Chinese characters and their extensions
    *((0xA000, 0xA4CF), (0xA980, 0xA9FF), (0xAA60, 0xAADF)),  # Yi, Javanese, Burmese extensions, Tai Viet
    *((0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F), (0x20000, 0x323AF)),  # more Katakana, more Chinese characters
)


def _ranges(points: Iterable[tuple[int, int]]) -> str:
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in points)


_ANY_SPACELESS = re.compile(f"[{_ranges(_SPACELESS)}]")
_WORD = re.compile(r"\w+")


@cache
def _units() -> re.Pattern[str]:
    """A character of a script without spaces with its marks, or a run of other letters, digits and marks.

    `\\w` alone matches no combining mark, so it would cut Hindi, Tamil or decomposed accents inside a word.
    """
    marks: list[tuple[int, int]] = []
    for point in range(0x300, 0x1F000):
        if unicodedata.category(chr(point)).startswith("M"):
            if marks and marks[-1][1] == point - 1:
                marks[-1] = (marks[-1][0], point)
            else:
                marks.append((point, point))
    mark, single = _ranges(marks), _ranges(_SPACELESS)
    return re.compile(f"(?![^\\w])[{single}][{mark}]*|(?:(?![{single}])\\w[{mark}]*)+")


def split_words(text: str) -> list[str]:
    """Return the words of a text in order, lower-cased; punctuation is left out.

    A word is a run of letters, digits and their marks, or a single character of a script that writes no spaces
    (Chinese, Japanese, Thai, Lao, Khmer, Burmese, …).
    """
    lower = text.lower()
    return _WORD.findall(lower) if lower.isascii() else _units().findall(lower)


def split_tokens(text: str) -> list[str]:
    """Return the words and the punctuation marks of a text in order, lower-cased."""
    lower = text.lower()
    tokens: list[str] = []
    end = 0
    for match in _units().finditer(lower):
        tokens += [character for character in lower[end : match.start()] if not character.isspace()]
        tokens.append(match.group())
        end = match.end()
    return tokens + [character for character in lower[end:] if not character.isspace()]


def split_units(text: str) -> list[str]:
    """Return the words of a text, or its characters where it has no word, such as a row of emoji."""
    return split_words(text) or [character for character in text if not character.isspace()]


def count_words(text: str) -> int:
    """Count what spaces separate; a part in a script without spaces counts as many words as `split_words` finds."""
    parts = text.split()
    if _ANY_SPACELESS.search(text) is None:
        return len(parts)
    return sum(max(1, len(split_words(part))) if _ANY_SPACELESS.search(part) else 1 for part in parts)
