"""All the ways in which a tokenizer can spell a text: a lattice over its bytes, and lists of token ids from it.

A policy may reach an accepted text by other tokens than the tokenizer would choose ("a", "b" in place of "ab"). Such a
response is accepted as well, so its probability belongs to V.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

from tokencredit.collect.exact.trie import TokenIds
from tokencredit.errors import TokenCreditError

FEW = 16  # spellings of one text that are listed at once; those of a text with more are found with the model


@dataclass(frozen=True, eq=False)
class Pieces:
    """The bytes that each token adds to a text, special tokens left out."""

    ids: dict[bytes, list[int]]
    longest: int
    strips: bool  # the decoder drops a space at the start of a text, so a first token may bring one


@dataclass(frozen=True, eq=False)
class Lattice:
    """The spellings of one text, followed by EOS, of at most `limit` tokens (EOS included; None: any length)."""

    text: str
    forms: tuple[bytes, ...]
    pieces: Pieces
    tokenizer: Any
    eos: int
    limit: int | None = None

    @cached_property
    def _least(self) -> list[list[int]]:
        """For each form, the fewest tokens from each byte to the end; a large number where the end is out of reach."""
        found = []
        for form in self.forms:
            least = [1 << 30] * len(form) + [0]
            for at in range(len(form) - 1, -1, -1):
                least[at] = 1 + min((least[stop] for _, stop in self._steps(form, at)), default=1 << 30)
            found.append(least)
        return found

    def _steps(self, form: bytes, at: int) -> Iterator[tuple[int, int]]:
        """(token, byte behind it) of every token that fits at a byte, the longest first."""
        for stop in range(min(len(form), at + self.pieces.longest), at, -1):
            for token in self.pieces.ids.get(form[at:stop], ()):
                yield token, stop

    def places(self, prefix: TokenIds) -> list[tuple[int, int]]:
        """(form, byte) where a prefix of tokens ends in the text; empty if it is not a prefix of a spelling."""
        found = []
        for index, form in enumerate(self.forms):
            at = {0}
            for token in prefix:
                at = {stop for start in at for other, stop in self._steps(form, start) if other == token}
            found += [(index, stop) for stop in at]
        return found

    def after(self, prefix: TokenIds) -> list[int]:
        """Tokens that can follow a prefix on the way to a spelling within the limit, EOS where the text is complete."""
        room = (1 << 29) if self.limit is None else self.limit - len(prefix) - 1
        found: dict[int, None] = {}
        for index, at in self.places(prefix):
            form, least = self.forms[index], self._least[index]
            if at == len(form):
                found[self.eos] = None
            found |= {token: None for token, stop in self._steps(form, at) if 1 + least[stop] <= room}
        if self.eos in found and not self.reads(prefix):
            del found[self.eos]
        return list(found)

    def reads(self, ids: TokenIds) -> bool:
        """Whether ids decode to the text, as the verifier will see it."""
        return bool(self.tokenizer.decode(list(ids)) == self.text)

    def complete(self, prefix: TokenIds) -> list[int] | None:
        """The spelling with the fewest tokens after a prefix, EOS appended; None if there is none."""
        best: list[int] | None = None
        for index, start in self.places(prefix):
            form, least, ids, at = self.forms[index], self._least[index], list(prefix), start
            while at < len(form) and least[at] < 1 << 29:
                token, at = min(self._steps(form, at), key=lambda step: least[step[1]])
                ids.append(token)
            if at == len(form) and self.reads(ids) and (best is None or len(ids) + 1 < len(best)):
                best = [*ids, self.eos]
        return best if best is None or self.limit is None or len(best) <= self.limit else None

    def spellings(self) -> Iterator[list[int]]:
        """All spellings, EOS appended, those with long tokens first."""
        stack: list[list[int]] = [[]]
        while stack:
            prefix = stack.pop()
            following = self.after(prefix)
            if self.eos in following:
                yield [*prefix, self.eos]
            stack += [[*prefix, token] for token in reversed(following) if token != self.eos]


class Accepted(list[list[int]]):
    """Accepted responses of one prompt as token ids; `lattices` are those of texts with more spellings than these."""

    def __init__(self, listed: Iterable[list[int]] = (), lattices: Iterable[Lattice] = ()) -> None:
        super().__init__(listed)
        self.lattices = list(lattices)


def encode_accepted(tokenizer: Any, responses: Sequence[str | TokenIds], *, max_tokens: int | None = None) -> Accepted:
    """Return the token ids of accepted responses, EOS appended, in every spelling that the tokenizer has for a text.

    The tokenizer's own spelling is always listed. All are where a text has at most 16, as with characters, which have
    one; of the others `exact_credit` lists those to which the model gives probability, and bounds what is left out.

    Args:
      responses: texts without EOS, or lists of token ids, which are taken as they are.
      max_tokens: the sampler's limit, EOS included. Spellings that are longer cannot be sampled and are left out.
    """
    eos = tokenizer.eos_token_id
    texts = [item for item in responses if isinstance(item, str)]
    own = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
    found = Accepted()
    seen: set[tuple[int, ...]] = set()
    for response in responses:
        given = list(next(own)) if isinstance(response, str) else list(response)
        spelled = [given if given[-1:] == [eos] else [*given, eos]]
        if isinstance(response, str) and hasattr(tokenizer, "get_vocab"):
            lattice = lattice_of(tokenizer, response, max_tokens)
            few = [ids for ids in islice(lattice.spellings(), FEW + 1) if ids != spelled[0]]
            if len(few) >= FEW:
                found.lattices.append(lattice)
            else:
                spelled += few
        if isinstance(response, str) and tuple(spelled[0]) in seen:
            raise TokenCreditError(f"accepted response {response!r} is listed twice")
        found += [ids for ids in spelled if tuple(ids) not in seen or not isinstance(response, str)]
        seen |= {tuple(ids) for ids in spelled}
    return found


def lattice_of(tokenizer: Any, text: str, max_tokens: int | None = None) -> Lattice:
    """The spellings of a text."""
    pieces = pieces_of(tokenizer)
    forms = (text.encode(), b" " + text.encode()) if pieces.strips else (text.encode(),)
    return Lattice(text, forms, pieces, tokenizer, tokenizer.eos_token_id, max_tokens)


_pieces: WeakKeyDictionary[Any, Pieces] = WeakKeyDictionary()


def pieces_of(tokenizer: Any) -> Pieces:
    """The bytes of every token of a tokenizer; read once."""
    try:
        if tokenizer in _pieces:
            return _pieces[tokenizer]
    except TypeError:  # not hashable, or no weak references
        return _read_pieces(tokenizer)
    _pieces[tokenizer] = _read_pieces(tokenizer)
    return _pieces[tokenizer]


def _read_pieces(tokenizer: Any) -> Pieces:
    decoder = _decoder(tokenizer)
    byte_level, spaces = '"ByteLevel"' in decoder, "▁" in decoder
    alphabet = _byte_alphabet() if byte_level else {}
    special = {*getattr(tokenizer, "all_special_ids", ()), tokenizer.eos_token_id}
    added = {number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    found: dict[bytes, list[int]] = {}
    for text, number in tokenizer.get_vocab().items():
        if number in special | added:
            continue
        if byte_level:
            piece = bytes(alphabet[char] for char in text) if all(char in alphabet for char in text) else text.encode()
        elif "ByteFallback" in decoder and len(text) == 6 and text.startswith("<0x"):
            piece = bytes([int(text[3:5], 16)])
        else:
            piece = (text.replace("▁", " ") if spaces else text).encode()
        if piece:
            found.setdefault(piece, []).append(number)
    return Pieces(found, max(map(len, found), default=0), spaces)


def _decoder(tokenizer: Any) -> str:
    """The settings by which a fast tokenizer turns tokens into text, as JSON; "" for others."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return ""
    return json.dumps(json.loads(inner.to_str()).get("decoder"), ensure_ascii=False)


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(other)}
