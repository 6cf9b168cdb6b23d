"""A model that trains in a fraction of a second: interpolated bigrams, for trying searches on a laptop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from scipy.sparse import csr_matrix, vstack

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.evaluate.evaluators import key_of
from tokencredit.recipes.pool.samples import Pool
from tokencredit.recipes.pool.words import split_tokens
from tokencredit.recipes.search.objective import Evaluator, Metrics, Request, TaskScore
from tokencredit.seeds import derive

SMOOTH_UNIGRAM, SMOOTH_BIGRAM = 0.1, 5.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NgramEvaluator:
    """Score of a subset: −mean NLL (nats per token) of each task's queries under hashed bigram counts of the responses.

        p(w | v) = (c(v, w) + 5 p₁(w)) / (c(v) + 5),   p₁(w) = (c(w) + .1) / (C + .1 · buckets)

    The seed draws Poisson(1) weights of the samples: the noise of another draw of the pool.
    """

    unigrams: csr_matrix  # [N, buckets]
    bigrams: csr_matrix
    queries: Mapping[str, Mapping[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]]  # split → task → (w, v, vw)
    buckets: int
    key: str

    def __call__(self, request: Request) -> Metrics:
        rng = np.random.default_rng(derive("ngram", request.seed))
        weights = np.zeros(self.unigrams.shape[0])
        # One draw a sample of the pool, not of the subset: common random numbers for variants of a recipe.
        weights[request.positions] = rng.poisson(1.0, len(weights))[request.positions]
        if not weights.any():
            weights[request.positions] = 1.0
        one, two = weights @ self.unigrams, weights @ self.bigrams
        total = one.sum()
        if request.split not in self.queries:
            raise TokenCreditError(f"the n-gram evaluator has no queries for split {request.split!r}")
        tasks = {}
        for task, texts in self.queries[request.split].items():
            losses = []
            for words, before, pairs in texts:
                base = (one[words] + SMOOTH_UNIGRAM) / (total + SMOOTH_UNIGRAM * self.buckets)
                probs = (two[pairs] + SMOOTH_BIGRAM * base) / (one[before] + SMOOTH_BIGRAM)
                losses.append(-np.log(probs).mean())
            tasks[task] = TaskScore(score=-float(np.mean(losses)), n=len(losses))
        return Metrics(tasks=tasks)


def hash_tokens(text: str, buckets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Buckets of the words, of their predecessors and of the pairs of both."""
    tokens = ["<s>", *split_tokens(text)]
    single = np.array([_bucket(token, buckets) for token in tokens])
    pairs = np.array([_bucket(f"{a} {b}", buckets) for a, b in pairwise(tokens)], np.int64)
    return single[1:], single[:-1], pairs


def _bucket(text: str, buckets: int) -> int:
    return crc32(text.encode("utf-8", "surrogatepass")) % buckets


def count_pool(pool: Pool, buckets: int) -> tuple[csr_matrix, csr_matrix]:
    """Unigram and bigram counts of the responses, one row a sample."""
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
    """`queries: {search: {task: FILE}, confirm: {task: FILE}}`, JSONL in any format of the pool."""
    buckets = int(config.get("buckets", 1 << 18))
    files = config.get("queries") or {}
    if not files:
        raise TokenCreditError("evaluator 'ngram' needs `queries`, a mapping split → task → file")
    queries = {
        split: {task: [hash_tokens(text, buckets) for text in _responses(Path(path))] for task, path in tasks.items()}
        for split, tasks in files.items()
    }
    unigrams, bigrams = count_pool(pool, buckets)
    prints = {
        split: {task: [p.tolist() for _, _, p in texts] for task, texts in t.items()} for split, t in queries.items()
    }
    return NgramEvaluator(
        unigrams=unigrams, bigrams=bigrams, queries=queries, buckets=buckets, key=key_of("ngram", 2, buckets, prints)
    )


def _responses(path: Path) -> Sequence[str]:
    from tokencredit.recipes.signals.relevance import read_queries

    texts = []
    for messages in read_queries(path, path.stem):
        answers = [m["content"] for m in messages if m["role"] == "assistant"] or [m["content"] for m in messages]
        texts.append("\n".join(answers))
    return texts
