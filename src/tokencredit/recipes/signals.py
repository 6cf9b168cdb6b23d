"""Computing signals once: what is stored under the same key is not computed again, a killed pass goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.progress import track
from tokencredit.recipes.forward import COLUMNS, Scorer, finish, load_scorer, score_pool, score_samples
from tokencredit.recipes.materials import Column
from tokencredit.recipes.pool import Pool
from tokencredit.recipes.relevance import max_cosine, overlap, read_queries, refuse_leaks
from tokencredit.recipes.sae import activate, activate_pool, load_autoencoder
from tokencredit.recipes.store import (
    SIGNALS,
    features_key,
    load_features,
    read_key,
    save_features,
    signal_key,
    write_column,
)
from tokencredit.recipes.textsignals import all_text, branching, hashed_features, unigram_entropy

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


def compute(folder: Path, pool: Pool, names: Sequence[str], sources: Sources) -> list[str]:
    """Compute and store the named signals; returns the columns that were written now."""
    for name in names:
        if name not in NAMES:
            raise unknown("signal", name, NAMES)
    if len(chosen := [name for name in names if name in FEATURES]) > 1:
        raise TokenCreditError(f"one kind of features at a time, got {', '.join(chosen)}")
    written = _text_columns(folder, pool, names)
    scorer = None
    if needs_model := [name for name in names if name in COLUMNS or name == "rds"]:
        scorer = _scorer_for(needs_model, sources)
        written += _model_columns(folder, pool, needs_model, scorer)
    if "hashed" in names:
        key = signal_key(pool, signal="hashed")
        if features_key(folder) != key:
            save_features(folder, hashed_features(pool), key)
    if "sae" in names:
        scorer = scorer or _scorer_for(["sae"], sources)
        _store_activations(folder, pool, scorer, sources)
    if "embed" in names:
        _store_embeddings(folder, pool, sources)
    if "rel" in names:
        written += _relevance_columns(folder, pool, sources, scorer)
    return written


def _scorer_for(names: Sequence[str], sources: Sources) -> Scorer:
    if sources.model is None:
        raise TokenCreditError(f"signals {', '.join(names)} need a model", hint="pass --model MODEL")
    return load_scorer(sources.model, sources.max_length)


def _text_columns(folder: Path, pool: Pool, names: Sequence[str]) -> list[str]:
    written = []
    for name in names:
        key = signal_key(pool, signal=name)
        if name not in TEXT or read_key(folder, name) == key:
            continue
        if name == "len.ws":
            values = pool.words.astype(np.float32)
        else:
            texts = (all_text(sample) for sample in track(pool.samples(), name, len(pool)))
            scores = branching(texts) if name == "ao" else [unigram_entropy(text) for text in texts]
            values = np.array(scores, np.float32)
        write_column(folder, name, values, key)
        written.append(name)
    return written


def _model_columns(folder: Path, pool: Pool, names: Sequence[str], scorer: Scorer) -> list[str]:
    """One pass gives every column of the model, and its pooled features where `rds` is asked for."""
    key = signal_key(pool, signal="forward", **scorer.facts)
    wanted = [name for name in names if name in COLUMNS and read_key(folder, name) != key]
    features_wanted = "rds" in names and features_key(folder) != key
    if not wanted and not features_wanted:
        return []
    work = folder / SIGNALS / f"pass-{key[:16]}"
    columns, features = score_pool(scorer, pool, work)
    for name in COLUMNS:
        write_column(folder, name, columns[name], key)
    if "rds" in names:
        save_features(folder, features, key)
    finish(work)
    return list(COLUMNS)


def _sae_key(pool: Pool, scorer: Scorer, sources: Sources) -> str:
    assert sources.sae is not None
    weights = sha256(sources.sae.read_bytes()).hexdigest()
    return signal_key(pool, signal="sae", weights=weights, layer=sources.sae_layer, **scorer.facts)


def _store_activations(folder: Path, pool: Pool, scorer: Scorer, sources: Sources) -> None:
    if sources.sae is None:
        raise TokenCreditError("signal 'sae' needs the weights of an encoder", hint="pass --sae FILE --sae-layer N")
    key = _sae_key(pool, scorer, sources)
    if features_key(folder) == key:
        return
    sae = load_autoencoder(sources.sae, sources.sae_layer, scorer.model.config.get_text_config().hidden_size)
    work = folder / SIGNALS / f"sae-{key[:16]}"
    save_features(folder, activate_pool(scorer, sae, pool, work), key)
    finish(work)


def _store_embeddings(folder: Path, pool: Pool, sources: Sources) -> None:
    if sources.embeddings is None:
        raise TokenCreditError("signal 'embed' needs embeddings", hint="pass --embeddings FILE (.npy, or .npz by id)")
    features = read_rows(sources.embeddings, pool)
    save_features(folder, features, signal_key(pool, signal="embed", content=content_hash(features)))


def content_hash(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    return sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def read_rows(path: Path, pool: Pool) -> np.ndarray:
    """User features or columns: `.npy` in pool order, or `.npz` with `ids` and `values`; absent ids become NaN."""
    try:
        content = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise TokenCreditError(f"cannot read {path}: {error}", hint="give .npy in pool order or .npz by id") from error
    if isinstance(content, np.ndarray):
        if len(content) != len(pool):
            raise TokenCreditError(f"{path} has {len(content)} rows for {len(pool)} samples")
        return content.astype(np.float32)
    if not {"ids", "values"} <= set(content.files):
        raise TokenCreditError(f"{path} must hold `ids` and `values`, it holds {', '.join(content.files)}")
    values = content["values"].astype(np.float32)
    rows = np.full((len(pool), *values.shape[1:]), np.nan, np.float32)
    rows[pool.positions_of([str(identifier) for identifier in content["ids"]])] = values
    return rows


def add_column(folder: Path, pool: Pool, name: str, path: Path) -> None:
    """A signal of the user's own, such as a rating or the token credit averaged over a sample."""
    values = read_rows(path, pool)
    if values.ndim != 1:
        raise TokenCreditError(f"{path} must hold one number a sample, got shape {values.shape}")
    if np.isinf(values).any():
        raise TokenCreditError(f"{path} holds infinite values", hint="write NaN where a score is missing")
    write_column(folder, name, values, signal_key(pool, signal=name, content=content_hash(values)))


def _relevance_columns(folder: Path, pool: Pool, sources: Sources, scorer: Scorer | None) -> list[str]:
    """`rel.<task>` for every query file, from whatever features the pool has."""
    features = load_features(folder)
    base = features_key(folder)
    if features is None or base is None:
        raise TokenCreditError("relevance needs features", hint="add rds (with --model), hashed or embed to --signals")
    if not sources.queries and not sources.query_embeddings:
        raise TokenCreditError("relevance needs queries", hint="pass --queries TASK=FILE")
    written = []
    for task, path in sources.queries.items():
        conversations = read_queries(path, task)
        refuse_leaks(conversations, path, sources.splits)
        key = signal_key(pool, signal="rel", features=base, queries=conversations)
        if read_key(folder, f"rel.{task}") == key:
            continue
        queries = _query_features(pool, conversations, sources, scorer, base)
        write_column(folder, f"rel.{task}", relevance(features, queries), key)
        written.append(f"rel.{task}")
    for task, path in sources.query_embeddings.items():
        queries = np.load(path, allow_pickle=False).astype(np.float32)
        key = signal_key(pool, signal="rel", features=base, queries=content_hash(queries))
        write_column(folder, f"rel.{task}", relevance(features, queries), key)
        written.append(f"rel.{task}")
    return written


def relevance(features: np.ndarray | csr_matrix, queries: np.ndarray) -> Column:
    """Maximum cosine for dense features, overlap with the mean query for sparse activations."""
    return max_cosine(features, queries) if isinstance(features, np.ndarray) else overlap(features, queries.mean(0))


def _query_features(
    pool: Pool, conversations: list[list[dict[str, str]]], sources: Sources, scorer: Scorer | None, base: str
) -> np.ndarray:
    if base == signal_key(pool, signal="hashed"):
        return hashed_features(pool, extra=conversations)
    if scorer is None:
        if sources.model is None:
            raise TokenCreditError(
                "queries must be read by what made the features", hint="pass --model, or --query-embeddings TASK=FILE"
            )
        scorer = load_scorer(sources.model, sources.max_length)
    if sources.sae is not None and base == _sae_key(pool, scorer, sources):
        sae = load_autoencoder(sources.sae, sources.sae_layer, scorer.model.config.get_text_config().hidden_size)
        return activate(scorer, sae, conversations).toarray()
    if base != signal_key(pool, signal="forward", **scorer.facts):
        raise TokenCreditError(
            f"the features of the pool were not made by {scorer.name!r}",
            hint="add rds to --signals, or give --query-embeddings TASK=FILE made like the pool's",
        )
    return score_samples(scorer, conversations)[1]
