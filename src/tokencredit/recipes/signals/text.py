"""Signals of the text alone, and hashed features for pools that no model has read."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.pool.formats import text_of
from tokencredit.recipes.pool.samples import Pool
from tokencredit.recipes.pool.words import split_units, split_words
from tokencredit.seeds import derive

_BUCKETS = 1 << 16


def all_text(sample: dict) -> str:
    """All messages of a sample, a line apart, with their thinking and tool calls."""
    return "\n".join(text_of(message) for message in sample["messages"])


def unigram_entropy(text: str) -> float:
    """−Σ p log₂ p over the lower-cased words of a text, in bits; 0 where there is no word.

    In scripts without spaces a word is a character.
    """
    counts = np.array(list(Counter(split_words(text)).values()), dtype=np.float64)
    shares = counts / counts.sum() if len(counts) else counts
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def branching(texts: Iterable[str]) -> list[float]:
    """½ · #verbs + ½ · mean size of the verbs' subtrees, by spaCy's parser; English only.

    Without spaCy this is an error: a silent 0 would make every filter on it keep the head of the file.
    """
    try:
        import spacy

        parser = spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise TokenCreditError(
            f"signal 'ao' needs spaCy with the model en_core_web_sm: {error}",
            hint="pip install spacy && python -m spacy download en_core_web_sm",
        ) from error
    scores = []
    for document in parser.pipe(texts):
        sizes = [sum(1 for _ in token.subtree) for token in document if token.pos_ == "VERB"]
        scores.append(0.5 * len(sizes) + 0.5 * (float(np.mean(sizes)) if sizes else 0.0))
    return scores


def hashed_features(pool: Pool, width: int = 256, extra: list[list[dict[str, Any]]] | None = None) -> np.ndarray:
    """Features without a model: log-counts of hashed words and word pairs, weighted by rarity, projected and scaled.

    The projection is sparse: each of 65,536 buckets adds ±1 to four of `width` columns. With `extra` conversations
    (queries), their rows are returned instead of the pool's, with the pool's rarities.
    """
    frequency = np.zeros(_BUCKETS)
    texts = []
    for sample in pool.samples():
        texts.append(_log_counts(all_text(sample)))
        frequency[texts[-1][0]] += 1
    rarity = np.log((1 + len(texts)) / (1 + frequency)).astype(np.float32)
    if extra is not None:
        texts = [_log_counts(all_text({"messages": messages})) for messages in extra]
    rng = np.random.default_rng(derive("hashed features", width))
    places = rng.integers(0, width, (_BUCKETS, 4))
    signs = rng.choice(np.array([-1.0, 1.0], np.float32), (_BUCKETS, 4))
    features = np.zeros((len(texts), width), np.float32)
    for row, (buckets, counts) in enumerate(texts):
        values = (counts * rarity[buckets])[:, None] * signs[buckets]
        features[row] = np.bincount(places[buckets].ravel(), values.ravel(), width)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _log_counts(text: str) -> tuple[np.ndarray, np.ndarray]:
    words = split_units(text)
    counts = Counter(crc32(gram.encode("utf-8", "surrogatepass")) % _BUCKETS for gram in words)
    counts.update(crc32(f"{a} {b}".encode("utf-8", "surrogatepass")) % _BUCKETS for a, b in pairwise(words))
    return np.fromiter(counts, np.int64, len(counts)), np.log1p(np.fromiter(counts.values(), np.float32, len(counts)))
