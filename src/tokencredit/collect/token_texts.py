"""Split the decoded text of a response over its tokens, so that the pieces joined are the text.

Decoding tokens one by one is wrong for many tokenizers: SentencePiece drops the space before a word that stands alone,
and a character of several tokens decodes to U+FFFD in each of them.
"""

from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

INCOMPLETE = "\ufffd"  # what `decode` gives for the first bytes of a character


def token_texts(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = False) -> list[str]:
    """Return the part of the decoded text that each token adds.

    `"".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)` always holds, and there is one piece per token. A
    character that takes several tokens belongs to the token that completes it; the tokens before get "".

    Args:
      tokenizer: a Hugging Face tokenizer, or anything with `decode` and `batch_decode`.
      ids: the token ids of one response.
      skip_special_tokens: passed on to the tokenizer; a special token then has the piece "".
    """
    return batch_token_texts(tokenizer, [ids], skip_special_tokens=skip_special_tokens)[0]


def batch_token_texts(
    tokenizer: Any, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool = False
) -> list[list[str]]:
    """`token_texts` of several responses; each distinct id is looked up once.

    Rows whose tokens decode on their own to the whole text cost one lookup per token; the others two short calls of the
    tokenizer per token.
    """
    rows = [[int(token) for token in row] for row in rows]
    distinct = sorted({token for row in rows for token in row})
    options = {"skip_special_tokens": skip_special_tokens}
    alone = dict(zip(distinct, tokenizer.batch_decode([[token] for token in distinct], **options), strict=True))
    found = []
    for row in rows:
        text = tokenizer.decode(row, **options) if row else ""
        pieces = [alone[token] for token in row]
        if "".join(pieces) != text:
            pieces = _incremental(tokenizer, row, options)
        if "".join(pieces) != text:
            pieces = _by_prefix(tokenizer, row, text, options)
        found.append(pieces)
    return found


def _incremental(tokenizer: Any, ids: Sequence[int], options: dict[str, bool]) -> list[str]:
    """Pieces from a short window before each token: linear in the length of the response."""
    pieces: list[str] = []
    first = shown = 0  # the window starts at `first`; tokens before `shown` have their text already
    before = ""
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[first:stop], **options)
        if text.endswith(INCOMPLETE) and stop < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        first, shown = shown, stop
        before = tokenizer.decode(ids[first:shown], **options)
    return pieces


def _by_prefix(tokenizer: Any, ids: Sequence[int], text: str, options: dict[str, bool]) -> list[str]:
    """Pieces from every prefix decoded: exact for any tokenizer, quadratic in the length of the response."""
    ends = [0]
    for stop in range(1, len(ids)):
        agree = takewhile(
            lambda pair: pair[0] == pair[1], zip(tokenizer.decode(ids[:stop], **options), text, strict=False)
        )
        ends.append(max(ends[-1], sum(1 for _ in agree)))
    ends.append(len(text))
    return [text[start:stop] for start, stop in pairwise(ends)]


def column_texts(
    tokenizer: Any, ids: Int[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> list[list[str]]:
    """The text that each token adds to its response; padding is decoded apart, so that it adds nothing."""
    used = [int(seen.nonzero()[-1]) + 1 if bool(seen.any()) else 0 for seen in mask.cpu()]
    pieces = [row[:stop] for row, stop in zip(ids.tolist(), used, strict=True)]
    pieces += [row[stop:] for row, stop in zip(ids.tolist(), used, strict=True)]
    texts = batch_token_texts(tokenizer, pieces) if ids.numel() else pieces
    return [[*chosen, *rest] for chosen, rest in zip(texts[: len(ids)], texts[len(ids) :], strict=True)]


def prompt_texts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Prompts without padding as the model sees them, special tokens included."""
    return [tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows]


def without_padding(row: Sequence[int], pad: int | None) -> list[int]:
    """A prompt from its first token that is not padding on the left."""
    start = next((place for place, token in enumerate(row) if token != pad), len(row))
    return list(row[start:])
