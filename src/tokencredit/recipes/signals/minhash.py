"""Near-duplicates by shared word shingles: MinHash finds candidates, the exact Jaccard similarity decides."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from jaxtyping import Int64, UInt32, UInt64

from tokencredit.progress import bar
from tokencredit.recipes.pool.samples import Positions, splitmix64
from tokencredit.recipes.pool.words import split_units
from tokencredit.seeds import derive

PERMUTATIONS = 128
WIDTH = 5  # words of a shingle
RECALL = 0.99  # of a pair exactly at the threshold
CHUNK = 2000  # samples hashed at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shingles:
    """Distinct 5-word shingles of each sample as sorted 64-bit hashes (CSR), and their MinHash signatures.

    In scripts without spaces a word is a character.
    """

    offsets: Int64[np.ndarray, " samples_plus_one"]
    hashes: UInt64[np.ndarray, " shingles"]
    signatures: UInt32[np.ndarray, "samples permutations"]

    def of(self, position: int) -> UInt64[np.ndarray, " n"]:
        return self.hashes[self.offsets[position] : self.offsets[position + 1]]


def shingle(texts: Iterable[str], total: int) -> Shingles:
    """Hash all texts; one that has fewer than five words is a single shingle.

    Words are those of `split_words`; a text without words is compared by its characters.
    """
    words: dict[str, int] = {}
    chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    batch: list[list[int]] = []
    with bar("minhash signatures", total) as advance:
        for text in texts:
            batch.append([_word_hash(word, words) for word in split_units(text)])
            if len(batch) == CHUNK:
                chunks.append(_shingle_chunk(batch))
                advance(len(batch))
                batch = []
                if len(words) > 2_000_000:  # keeps the memory of a large pool flat
                    words.clear()
        if batch:
            chunks.append(_shingle_chunk(batch))
    counts, hashes, signatures = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return Shingles(offsets=np.r_[0, np.cumsum(counts)].astype(np.int64), hashes=hashes, signatures=signatures)


def _word_hash(word: str, words: dict[str, int]) -> int:
    value = words.get(word)
    if value is None:  # Python's own hash differs between processes
        value = words[word] = int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())
    return value


def _shingle_chunk(batch: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = np.array([max(len(words), WIDTH) for words in batch])
    flat = np.zeros(int(lengths.sum()), np.uint64)
    starts = np.r_[0, np.cumsum(lengths)[:-1]]
    for start, words in zip(starts.tolist(), batch, strict=True):
        flat[start : start + len(words)] = words
    rolled = np.zeros(len(flat) - WIDTH + 1, np.uint64)
    for step in range(WIDTH):
        rolled = splitmix64(rolled ^ flat[step : step + len(rolled)])
    owner = np.repeat(np.arange(len(batch)), lengths)
    inside = owner[: len(rolled)] == owner[WIDTH - 1 :]
    owner, rolled = owner[: len(rolled)][inside], rolled[inside]
    order = np.lexsort((rolled, owner))
    owner, rolled = owner[order], rolled[order]
    distinct = np.r_[True, (owner[1:] != owner[:-1]) | (rolled[1:] != rolled[:-1])]
    owner, rolled = owner[distinct], rolled[distinct]
    counts = np.bincount(owner, minlength=len(batch))
    return counts, rolled, _signatures(rolled, np.r_[0, np.cumsum(counts)[:-1]])


def _signatures(hashes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Minimum over the shingles of 128 multiply-shift hashes, [samples, 128]."""
    rng = np.random.default_rng(derive("minhash", "permutations"))
    factors = rng.integers(0, 1 << 63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shifts = rng.integers(0, 1 << 63, PERMUTATIONS, dtype=np.uint64)
    columns = []
    for factor, shift in zip(factors, shifts, strict=True):
        mixed = ((hashes * factor + shift) >> np.uint64(32)).astype(np.uint32)
        columns.append(np.minimum.reduceat(mixed, starts))
    return np.stack(columns, axis=1)


def rows_per_band(jaccard: float) -> int:
    """The longest band that still finds a pair exactly at the threshold with probability 0.99."""
    fitting = [r for r in range(1, 17) if 1 - (1 - jaccard**r) ** (PERMUTATIONS // r) >= RECALL]
    return max(fitting, default=1)


def keep_distinct(shingles: Shingles, walk: Positions, jaccard: float) -> np.ndarray:
    """Walk in order and drop x iff its exact Jaccard similarity to an earlier kept y is at least `jaccard`.

    Returns the mask of the kept. Candidates share a band of the signature; a pair at the threshold is a candidate with
    probability 0.99, one far above it with certainty. Only kept samples enter the buckets, so a thousand copies cost
    a thousand look-ups, not a million pairs.
    """
    rows = rows_per_band(jaccard)
    bands = PERMUTATIONS // rows
    keep = np.ones(len(walk), bool)
    buckets: dict[int, list[int]] = {}
    with bar("minhash", len(walk)) as advance:
        for start in range(0, len(walk), 8192):
            part = walk[start : start + 8192]
            keys = _band_keys(shingles.signatures[part], bands, rows)
            for place, (position, sample_keys) in enumerate(zip(part.tolist(), keys.tolist(), strict=True)):
                if _has_match(shingles, position, [buckets[key] for key in sample_keys if key in buckets], jaccard):
                    keep[start + place] = False
                    continue
                for key in sample_keys:
                    buckets.setdefault(key, []).append(position)
            advance(len(part))
    return keep


def _band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """One 64-bit key a band; the number of the band is part of it, so that one dictionary serves all bands."""
    parts = signatures[:, : bands * rows].reshape(len(signatures), bands, rows).astype(np.uint64)
    keys = np.broadcast_to(np.arange(bands, dtype=np.uint64), parts.shape[:2])
    for row in range(rows):
        keys = splitmix64(keys ^ parts[:, :, row])
    return keys


def _has_match(shingles: Shingles, position: int, buckets: list[list[int]], jaccard: float) -> bool:
    if not buckets:
        return False
    candidates = np.fromiter({candidate for bucket in buckets for candidate in bucket}, np.int64)
    candidates.sort()
    if len(candidates) > 8:
        agree = (shingles.signatures[candidates] == shingles.signatures[position]).mean(axis=1)
        # Four standard deviations of the estimate below the threshold, so that exactness is not lost here.
        candidates = candidates[agree >= jaccard - 4 * np.sqrt(jaccard * (1 - jaccard) / PERMUTATIONS)]
    sample = shingles.of(position)
    return any(_jaccard(sample, shingles.of(candidate)) >= jaccard for candidate in candidates.tolist())


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    shared = int(np.isin(a, b, assume_unique=True).sum()) if min(len(a), len(b)) else 0
    return shared / max(len(a) + len(b) - shared, 1)
