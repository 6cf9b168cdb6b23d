"""Computing signals once: what is stored under the same key is not computed again, a killed pass goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from scipy.sparse import csr_matrix

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.progress import track
from tokencredit.recipes.pool.encode import Unread
from tokencredit.recipes.pool.formats import text_of
from tokencredit.recipes.pool.lines import write_lines
from tokencredit.recipes.pool.samples import Pool
from tokencredit.recipes.pool.words import count_words
from tokencredit.recipes.signals.forward import COLUMNS, finish, score_pool, score_samples
from tokencredit.recipes.signals.load import Scorer, load_scorer
from tokencredit.recipes.signals.materials import Column
from tokencredit.recipes.signals.relevance import Queries, max_cosine, overlap, read_queries, refuse_leaks
from tokencredit.recipes.signals.sae import Autoencoder, activate, activate_pool, load_autoencoder
from tokencredit.recipes.signals.store import (
    SIGNALS,
    features_key,
    load_features,
    read_key,
    save_features,
    save_model_facts,
    signal_key,
    write_column,
)
from tokencredit.recipes.signals.text import all_text, branching, hashed_features, unigram_entropy

TEXT = ("len.ws", "unigram_entropy", "ao")
FEATURES = ("rds", "hashed", "embed", "sae")
NAMES = (*TEXT, *COLUMNS, *FEATURES, "rel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where signals come from: a model, query files by task, embeddings; `splits` are problems no query may repeat."""

    model: str | None = None
    max_length: int = 1024
    queries: Mapping[str, Path] = field(default_factory=dict)
    splits: Sequence[Path] = ()
    embeddings: Path | None = None
    query_embeddings: Mapping[str, Path] = field(default_factory=dict)
    sae: Path | None = None  # encoder weights, safetensors
    sae_layer: int = -1  # index into the model's hidden states
    skip_bad: bool = False  # samples that the chat template refuses get no signals and are in `unread`
    unread: list[Unread] = field(default_factory=list)


def compute(folder: Path, pool: Pool, names: Sequence[str], sources: Sources) -> list[str]:
    """Compute and store the named signals; returns the columns that were written now.

    What the user gave is checked before the first pass: queries, splits, files and whether there is a model.
    """
    return _Computation(folder=folder, pool=pool, names=names, sources=sources).run()


def write_unread(folder: Path, unread: Sequence[Unread]) -> Path:
    """List the samples that could not be encoded, with the reason, in `unread.jsonl`."""
    path = folder / "unread.jsonl"
    write_lines(path, ({"id": item.name, "reason": item.reason} for item in unread))
    return path


@dataclass(kw_only=True, eq=False)
class _Computation:
    """One call of `compute`; the model is loaded when the first signal needs it."""

    folder: Path
    pool: Pool
    names: Sequence[str]
    sources: Sources
    written: list[str] = field(default_factory=list)

    def run(self) -> list[str]:
        queries = self._check()
        for name in self.names:
            if name in TEXT:
                self._write_text_column(name)
        if self._from_model("rds"):
            self._pass_model()
        if "hashed" in self.names:
            key = signal_key(self.pool, signal="hashed")
            if features_key(self.folder) != key:
                save_features(self.folder, hashed_features(self.pool), key)
        if "sae" in self.names:
            self._store_activations()
        if self.sources.embeddings is not None and "embed" in self.names:
            features = read_rows(self.sources.embeddings, self.pool)
            key = signal_key(self.pool, signal="embed", content=content_hash(features))
            save_features(self.folder, features, key)
        if "rel" in self.names:
            self._write_relevance(queries)
        return self.written

    def _from_model(self, *features: str) -> list[str]:
        return [name for name in self.names if name in {*COLUMNS, *features}]

    def _check(self) -> dict[str, Queries]:
        """The queries of each task; an error for whatever would only be missed after the pass over the pool."""
        sources = self.sources
        for name in self.names:
            if name not in NAMES:
                raise unknown("signal", name, NAMES)
        features = [name for name in self.names if name in FEATURES]
        if len(features) > 1:
            raise TokenCreditError(f"one kind of features at a time, got {', '.join(features)}")
        if (names := self._from_model("rds", "sae")) and sources.model is None:
            raise TokenCreditError(f"signals {', '.join(names)} need a model", hint="pass --model MODEL")
        if "sae" in features and sources.sae is None:
            raise TokenCreditError("signal 'sae' needs the weights of an encoder", hint="pass --sae FILE --sae-layer N")
        if "embed" in features and sources.embeddings is None:
            raise TokenCreditError(
                "signal 'embed' needs embeddings", hint="pass --embeddings FILE (.npy, or .npz by id)"
            )
        for path in (sources.sae, sources.embeddings, *sources.query_embeddings.values()):
            if path is not None and not path.is_file():
                raise TokenCreditError(f"{path} is not a file")
        if "rel" not in self.names:
            return {}
        if not features and features_key(self.folder) is None:
            raise TokenCreditError(
                "relevance needs features", hint="add rds (with --model), hashed or embed to --signals"
            )
        if not sources.queries and not sources.query_embeddings:
            raise TokenCreditError("relevance needs queries", hint="pass --queries TASK=FILE")
        queries = {task: read_queries(path, task) for task, path in sources.queries.items()}
        for task, path in sources.queries.items():
            refuse_leaks(queries[task], path, sources.splits)
        return queries

    @cached_property
    def scorer(self) -> Scorer:
        if self.sources.model is None:
            raise TokenCreditError(
                "queries must be read by what made the features", hint="pass --model, or --query-embeddings TASK=FILE"
            )
        scorer = load_scorer(self.sources.model, self.sources.max_length)
        return replace(scorer, skip_bad=self.sources.skip_bad, unread=self.sources.unread)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        assert self.sources.sae is not None
        return load_autoencoder(self.sources.sae, self.sources.sae_layer, self.scorer.width)

    @cached_property
    def forward_key(self) -> str:
        return signal_key(self.pool, signal="forward", **self.scorer.facts)

    @cached_property
    def sae_key(self) -> str:
        """The key of the activations; empty where no encoder is given."""
        if self.sources.sae is None:
            return ""
        weights = sha256(self.sources.sae.read_bytes()).hexdigest()
        layer = self.sources.sae_layer
        return signal_key(self.pool, signal="sae", weights=weights, layer=layer, **self.scorer.facts)

    def _write_text_column(self, name: str) -> None:
        key = signal_key(self.pool, signal=name)
        if read_key(self.folder, name) != key:
            write_column(self.folder, name, self._text_column(name), key)
            self.written.append(name)

    def _text_column(self, name: str) -> Column:
        if name == "len.ws":
            counts = [sum(count_words(text_of(m)) for m in sample["messages"]) for sample in self.pool.samples()]
            return np.array(counts, np.float32)
        texts = (all_text(sample) for sample in track(self.pool.samples(), name, len(self.pool)))
        return np.array(branching(texts) if name == "ao" else list(map(unigram_entropy, texts)), np.float32)

    def _pass_model(self) -> None:
        """One pass gives every column of the model, and its pooled features where `rds` is asked for."""
        key = self.forward_key
        stale = any(read_key(self.folder, name) != key for name in self._from_model())
        if not stale and ("rds" not in self.names or features_key(self.folder) == key):
            return
        save_model_facts(self.folder, self.scorer.name, self.scorer.revision)
        work = self.folder / SIGNALS / f"pass-{key[:16]}"
        columns, features = score_pool(self.scorer, self.pool, work)
        for name in COLUMNS:
            write_column(self.folder, name, columns[name], key)
        self.written += COLUMNS
        if "rds" in self.names:
            save_features(self.folder, features, key)
        finish(work)

    def _store_activations(self) -> None:
        if features_key(self.folder) != self.sae_key:
            work = self.folder / SIGNALS / f"sae-{self.sae_key[:16]}"
            save_features(self.folder, activate_pool(self.scorer, self.autoencoder, self.pool, work), self.sae_key)
            finish(work)

    def _write_relevance(self, queries_of: Mapping[str, Queries]) -> None:
        """`rel.<task>` for every query file, from whatever features the pool has."""
        features, base = load_features(self.folder), features_key(self.folder)
        assert features is not None and base is not None
        for task, conversations in queries_of.items():
            key = signal_key(self.pool, signal="rel", features=base, queries=conversations)
            if read_key(self.folder, f"rel.{task}") != key:
                self._write_relevance_of(task, features, self._query_features(conversations, base), key)
        for task, path in self.sources.query_embeddings.items():
            queries = read_array(path)
            if not isinstance(queries, np.ndarray) or queries.ndim != 2 or queries.shape[1] != features.shape[1]:
                raise TokenCreditError(
                    f"{path} must be an array [queries, {features.shape[1]}], as the pool's features"
                )
            queries = queries.astype(np.float32)
            key = signal_key(self.pool, signal="rel", features=base, queries=content_hash(queries))
            self._write_relevance_of(task, features, queries, key)

    def _write_relevance_of(self, task: str, features: np.ndarray | csr_matrix, queries: np.ndarray, key: str) -> None:
        write_column(self.folder, f"rel.{task}", relevance(features, queries), key)
        self.written.append(f"rel.{task}")

    def _query_features(self, conversations: Queries, base: str) -> np.ndarray:
        """The queries as what made the pool's features reads them; the key of those is `base`."""
        if base == signal_key(self.pool, signal="hashed"):
            return hashed_features(self.pool, extra=conversations)
        strict = replace(self.scorer, skip_bad=False)
        if base == self.sae_key:
            return activate(strict, self.autoencoder, conversations).toarray()
        if base != self.forward_key:
            raise TokenCreditError(
                f"the features of the pool were not made by {self.scorer.name!r}",
                hint="add rds to --signals, or give --query-embeddings TASK=FILE made like the pool's",
            )
        return score_samples(strict, conversations)[1]


def relevance(features: np.ndarray | csr_matrix, queries: np.ndarray) -> Column:
    """Maximum cosine for dense features, overlap with the mean query for sparse activations."""
    return max_cosine(features, queries) if isinstance(features, np.ndarray) else overlap(features, queries.mean(0))


def content_hash(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    return sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def read_rows(path: Path, pool: Pool) -> np.ndarray:
    """User features or columns: `.npy` in pool order, or `.npz` with `ids` and `values`; absent ids become NaN."""
    content = read_array(path)
    if isinstance(content, np.ndarray):
        if len(content) != len(pool):
            raise TokenCreditError(f"{path} has {len(content)} rows for {len(pool)} samples")
        return content.astype(np.float32)
    if not {"ids", "values"} <= set(content):
        raise TokenCreditError(f"{path} must hold `ids` and `values`, it holds {', '.join(content)}")
    values = content["values"].astype(np.float32)
    if len(values) != len(content["ids"]):
        raise TokenCreditError(f"{path} has {len(content['ids'])} ids and {len(values)} values")
    rows = np.full((len(pool), *values.shape[1:]), np.nan, np.float32)
    rows[pool.positions_of([str(identifier) for identifier in content["ids"]])] = values
    return rows


def read_array(path: Path) -> Any:
    """The content of a NumPy file, without pickles."""
    try:
        content = np.load(path, allow_pickle=False)
        return content if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise TokenCreditError(f"cannot read {path}: {reason}", hint="give .npy in pool order or .npz by id") from error


def add_column(folder: Path, pool: Pool, name: str, path: Path) -> None:
    """Store a signal of the user's own, such as a rating or the token credit averaged over a sample."""
    values = read_rows(path, pool)
    if values.ndim != 1:
        raise TokenCreditError(f"{path} must hold one number a sample, got shape {values.shape}")
    if np.isinf(values).any():
        raise TokenCreditError(f"{path} holds infinite values", hint="write NaN where a score is missing")
    write_column(folder, name, values, signal_key(pool, signal=name, content=content_hash(values)))
