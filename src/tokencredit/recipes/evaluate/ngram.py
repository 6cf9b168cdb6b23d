"""A model that trains in a fraction of a second: interpolated bigrams, for trying searches on a laptop."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar
from zlib import crc32

import numpy as np
from pydantic import Field
from scipy.sparse import csr_matrix, vstack

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.evaluate.records import Evaluator, Metrics, Request, TaskScore, key_of
from tokencredit.recipes.pool.samples import Pool
from tokencredit.recipes.pool.words import split_tokens
from tokencredit.recipes.signals.relevance import read_queries
from tokencredit.seeds import derive
from tokencredit.settings import Count, Settings, Words

SMOOTH_UNIGRAM, SMOOTH_BIGRAM = 0.1, 5.0

Hashed = tuple[np.ndarray, np.ndarray, np.ndarray]  # buckets of words, of their predecessors, of both


class NgramSettings(Settings):
    """`evaluator:` of a search file with `kind: ngram`; queries are JSONL in any format of the pool."""

    section: ClassVar[str] = "evaluator"
    key_kind: ClassVar[str] = "key of evaluator 'ngram'"

    queries: Annotated[Mapping[str, Mapping[str, str]], Field(min_length=1), Words("a mapping split → task → file")]
    buckets: Count = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NgramEvaluator:
    """Score of a subset: −mean NLL (nats per token) of each task's queries under hashed bigram counts of the responses.

        p(w | v) = (c(v, w) + 5 p₁(w)) / (c(v) + 5),   p₁(w) = (c(w) + .1) / (C + .1 · buckets)

    The seed draws Poisson(1) weights of the samples: the noise of another draw of the pool.
    """

    unigrams: csr_matrix  # [N, buckets]
    bigrams: csr_matrix
    queries: Mapping[str, Mapping[str, list[Hashed]]]  # split → task
    buckets: int
    key: str

    def __call__(self, request: Request) -> Metrics:
        rng = np.random.default_rng(derive("ngram", request.seed))
        weights = np.zeros(self.unigrams.shape[0])
        # One draw a sample of the pool, not of the subset: common random numbers for variants of a recipe.
        weights[request.positions] = rng.poisson(1.0, len(weights))[request.positions]
        if not weights.any():
            weights[request.positions] = 1.0
        if request.split not in self.queries:
            raise TokenCreditError(f"the n-gram evaluator has no queries for split {request.split!r}")
        one, two = weights @ self.unigrams, weights @ self.bigrams
        total = one.sum()
        tasks = {}
        for task, texts in self.queries[request.split].items():
            losses = []
            for words, before, pairs in texts:
                base = (one[words] + SMOOTH_UNIGRAM) / (total + SMOOTH_UNIGRAM * self.buckets)
                probs = (two[pairs] + SMOOTH_BIGRAM * base) / (one[before] + SMOOTH_BIGRAM)
                losses.append(-np.log(probs).mean())
            tasks[task] = TaskScore(score=-float(np.mean(losses)), n=len(losses))
        return Metrics(tasks=tasks)


def hash_tokens(text: str, buckets: int) -> Hashed:
    """Hash the words, their predecessors and the pairs of both into buckets."""
    tokens = ["<s>", *split_tokens(text)]
    single = np.array([_bucket(token, buckets) for token in tokens])
    pairs = np.array([_bucket(f"{a} {b}", buckets) for a, b in pairwise(tokens)], np.int64)
    return single[1:], single[:-1], pairs


def _bucket(text: str, buckets: int) -> int:
    return crc32(text.encode("utf-8", "surrogatepass")) % buckets


def count_pool(pool: Pool, buckets: int) -> tuple[csr_matrix, csr_matrix]:
    """Count unigrams and bigrams of the responses, one row a sample."""
    rows: tuple[list[csr_matrix], list[csr_matrix]] = ([], [])
    for sample in pool.samples():
        text = "\n".join(m["content"] for m in sample["messages"] if m["role"] == "assistant")
        words, before, pairs = hash_tokens(text, buckets)
        for target, places in zip(rows, (np.r_[words, before[:1]], pairs), strict=True):
            kinds, counts = np.unique(places, return_counts=True)
            indptr = np.array([0, len(kinds)])
            target.append(csr_matrix((counts.astype(np.float64), kinds, indptr), shape=(1, buckets)))
    return vstack(rows[0]).tocsr(), vstack(rows[1]).tocsr()


def make_ngram_evaluator(config: Mapping[str, Any], pool: Pool) -> Evaluator:
    """Make the evaluator of an `evaluator` block; the key covers the hashed queries."""
    settings = NgramSettings.read(config)
    queries = {
        split: {task: _hash_responses(Path(path), settings.buckets) for task, path in tasks.items()}
        for split, tasks in settings.queries.items()
    }
    unigrams, bigrams = count_pool(pool, settings.buckets)
    pairs = {
        split: {task: [hashed[2].tolist() for hashed in texts] for task, texts in tasks.items()}
        for split, tasks in queries.items()
    }
    key = key_of("ngram", 2, settings.buckets, pairs)
    return NgramEvaluator(unigrams=unigrams, bigrams=bigrams, queries=queries, buckets=settings.buckets, key=key)


def _hash_responses(path: Path, buckets: int) -> list[Hashed]:
    hashed = []
    for messages in read_queries(path, path.stem):
        answers = [m["content"] for m in messages if m["role"] == "assistant"] or [m["content"] for m in messages]
        hashed.append(hash_tokens("\n".join(answers), buckets))
    return hashed
