"""Relevance of samples to query sets, by cosine of features or overlap of sparse activations; and leaks refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from scipy.sparse import csr_matrix

from tokencredit.errors import TokenCreditError
from tokencredit.progress import printable
from tokencredit.recipes.pool.formats import PAIRS, Refusal, to_sample
from tokencredit.recipes.pool.ingest import normalise
from tokencredit.recipes.pool.readers import records
from tokencredit.recipes.signals.neardup import has_features
from tokencredit.seeds import derive

QUERIES = 128  # per task
Queries = list[list[dict[str, Any]]]  # conversations


def max_cosine(
    features: Float[np.ndarray, "samples width"], queries: Float[np.ndarray, "queries width"]
) -> Float32[np.ndarray, " samples"]:
    """max over queries of cos(sample, query); rows without features are NaN, queries without features do not count."""
    queries = queries[has_features(queries)]
    if len(queries) == 0:
        raise TokenCreditError("no query has features", hint="give queries that are not empty, as rows without NaN")
    norms = np.linalg.norm(features, axis=1)
    unit = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    best = np.full(len(features), np.nan, np.float32)
    for start in range(0, len(features), 8192):
        rows = slice(start, start + 8192)
        with np.errstate(invalid="ignore", divide="ignore"):
            best[rows] = ((features[rows] @ unit.T).max(1) / norms[rows]).astype(np.float32)
    return np.where(norms > 0, best, np.float32(np.nan))


def overlap(activations: csr_matrix, target: Float[np.ndarray, " width"]) -> Float32[np.ndarray, " samples"]:
    """s(x) = Σ_j min(a_j, t_j) / Σ_j max(a_j, t_j) for non-negative activations a and the mean t of the queries.

    Only the active features of a sample are visited: Σ_j max = Σ_A max(a, t) + Σ_j t_j − Σ_A t_j.
    """
    a = activations.tocsr()
    t = target[a.indices]
    starts = a.indptr[:-1]
    used = np.diff(a.indptr) > 0

    def row_sums(values: np.ndarray) -> np.ndarray:
        sums = np.zeros(a.shape[0])
        if used.any():
            sums[used] = np.add.reduceat(values, starts[used])
        return sums

    smaller, larger = row_sums(np.minimum(a.data, t)), row_sums(np.maximum(a.data, t))
    return (smaller / np.maximum(larger + target.sum() - row_sums(t), 1e-12)).astype(np.float32)


def read_queries(path: Path, task: str) -> Queries:
    """Read at most 128 conversations of a query file.

    Any format of the pool, `{task, prompt, answer}` as the evaluation splits have it, or a question alone: `text`,
    `prompt`, `question` or `instruction`.
    """
    if not path.is_file():
        raise TokenCreditError(f"no query file {str(path)!r} for task {task!r}", hint="give --queries TASK=FILE")
    queries = []
    for line, record in records(path):
        try:
            queries.append(_question(record) or to_sample(record, path.stem)["messages"])
        except Refusal as refusal:
            raise TokenCreditError(
                f"{path}:{line}: {printable(refusal)}",
                hint="a query is {prompt, answer}, any record of a pool, or a `text` alone",
            ) from refusal
    if not queries:
        raise TokenCreditError(f"{path} holds no query for task {task!r}")
    if len(queries) > QUERIES:
        rng = np.random.default_rng(derive("queries", task))
        queries = [queries[index] for index in np.sort(rng.choice(len(queries), QUERIES, replace=False))]
    return queries


def _question(record: object) -> list[dict[str, Any]] | None:
    """The one message of a record that only asks; None for every other."""
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("text"), str):
        return [{"role": "user", "content": record["text"]}]
    if any(key in record for key in ("messages", "conversations", *(response for _, response in PAIRS))):
        return None
    asked = next((record[key] for key in ("prompt", "question", "instruction") if record.get(key)), None)
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else None


def refuse_leaks(queries: Sequence[Sequence[Mapping[str, Any]]], source: Path, splits: Sequence[Path]) -> None:
    """A query that is also a problem of an evaluation split is an error: it would select for the test."""
    asked = {normalise(message["content"]) for query in queries for message in query if message["role"] == "user"}
    for path in splits:
        if not path.is_file():
            raise TokenCreditError(f"no file of problems {str(path)!r}", hint="give --splits FILE …")
        for number, problem in records(path):
            if not isinstance(problem, dict):
                raise TokenCreditError(f"{path}:{number}: expected a problem, {printable(problem)}")
            text = normalise(str(problem.get("prompt", problem.get("question", ""))))
            if text in asked:
                raise TokenCreditError(
                    f"{source} shares a problem with {path}:{number}: {text[:60]!r}",
                    hint="take queries from a train or dev split, never from what the search is judged on",
                )
