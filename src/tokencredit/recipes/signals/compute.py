"""Computing signals once: what is stored under the same key is not computed again, a killed pass goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from tokencredit.recipes.pool.materials import Column
from tokencredit.recipes.pool.samples import Pool, write_lines
from tokencredit.recipes.pool.store import (
    SIGNALS,
    features_key,
    load_features,
    read_key,
    save_features,
    save_model_facts,
    signal_key,
    write_column,
)
from tokencredit.recipes.pool.words import count_words
from tokencredit.recipes.signals.forward import COLUMNS, Scorer, finish, load_scorer, score_pool, score_samples
from tokencredit.recipes.signals.relevance import max_cosine, overlap, read_queries, refuse_leaks
from tokencredit.recipes.signals.sae import activate, activate_pool, load_autoencoder
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
    queries = _checked(folder, names, sources)
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
        written += _relevance_columns(folder, pool, sources, scorer, queries)
    return written


def _checked(folder: Path, names: Sequence[str], sources: Sources) -> dict[str, list[list[dict[str, Any]]]]:
    """The queries of each task; an error for whatever would only be missed after the pass over the pool."""
    for name in names:
        if name not in NAMES:
            raise unknown("signal", name, NAMES)
    if len(chosen := [name for name in names if name in FEATURES]) > 1:
        raise TokenCreditError(f"one kind of features at a time, got {', '.join(chosen)}")
    if needs_model := [name for name in names if name in COLUMNS or name in {"rds", "sae"}]:
        _require_model(needs_model, sources)
    for wanted, path, hint in (
        ("sae", sources.sae, "--sae FILE --sae-layer N"),
        ("embed", sources.embeddings, "--embeddings FILE (.npy, or .npz by id)"),
    ):
        if wanted in names and path is None:
            what = {"sae": "the weights of an encoder", "embed": "embeddings"}[wanted]
            raise TokenCreditError(f"signal {wanted!r} needs {what}", hint=f"pass {hint}")
    for path in (sources.sae, sources.embeddings, *sources.query_embeddings.values()):
        if path is not None and not path.is_file():
            raise TokenCreditError(f"{path} is not a file")
    if "rel" not in names:
        return {}
    if not chosen and features_key(folder) is None:
        raise TokenCreditError("relevance needs features", hint="add rds (with --model), hashed or embed to --signals")
    if not sources.queries and not sources.query_embeddings:
        raise TokenCreditError("relevance needs queries", hint="pass --queries TASK=FILE")
    queries = {}
    for task, path in sources.queries.items():
        queries[task] = read_queries(path, task)
        refuse_leaks(queries[task], path, sources.splits)
    return queries


def _require_model(names: Sequence[str], sources: Sources) -> str:
    if sources.model is None:
        raise TokenCreditError(f"signals {', '.join(names)} need a model", hint="pass --model MODEL")
    return sources.model


def write_unread(folder: Path, unread: Sequence[Unread]) -> Path:
    """List the samples that could not be encoded, with the reason, in `unread.jsonl`."""
    path = folder / "unread.jsonl"
    write_lines(path, ({"id": item.name, "reason": item.reason} for item in unread))
    return path


def _scorer_for(names: Sequence[str], sources: Sources) -> Scorer:
    return _load(_require_model(names, sources), sources)


def _load(model: str, sources: Sources) -> Scorer:
    scorer = load_scorer(model, sources.max_length)
    return replace(scorer, skip_bad=sources.skip_bad, unread=sources.unread)


def _text_columns(folder: Path, pool: Pool, names: Sequence[str]) -> list[str]:
    written = []
    for name in names:
        key = signal_key(pool, signal=name)
        if name not in TEXT or read_key(folder, name) == key:
            continue
        if name == "len.ws":
            counts = [sum(count_words(text_of(m)) for m in sample["messages"]) for sample in pool.samples()]
            values = np.array(counts, np.float32)
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
    save_model_facts(folder, scorer.name, scorer.revision)
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
    assert sources.sae is not None
    key = _sae_key(pool, scorer, sources)
    if features_key(folder) == key:
        return
    sae = load_autoencoder(sources.sae, sources.sae_layer, scorer.model.config.get_text_config().hidden_size)
    work = folder / SIGNALS / f"sae-{key[:16]}"
    save_features(folder, activate_pool(scorer, sae, pool, work), key)
    finish(work)


def _store_embeddings(folder: Path, pool: Pool, sources: Sources) -> None:
    assert sources.embeddings is not None
    features = read_rows(sources.embeddings, pool)
    save_features(folder, features, signal_key(pool, signal="embed", content=content_hash(features)))


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
    """A signal of the user's own, such as a rating or the token credit averaged over a sample."""
    values = read_rows(path, pool)
    if values.ndim != 1:
        raise TokenCreditError(f"{path} must hold one number a sample, got shape {values.shape}")
    if np.isinf(values).any():
        raise TokenCreditError(f"{path} holds infinite values", hint="write NaN where a score is missing")
    write_column(folder, name, values, signal_key(pool, signal=name, content=content_hash(values)))


def _relevance_columns(
    folder: Path,
    pool: Pool,
    sources: Sources,
    scorer: Scorer | None,
    asked: Mapping[str, list[list[dict[str, Any]]]],
) -> list[str]:
    """`rel.<task>` for every query file, from whatever features the pool has."""
    features = load_features(folder)
    base = features_key(folder)
    assert features is not None and base is not None
    written = []
    for task, conversations in asked.items():
        key = signal_key(pool, signal="rel", features=base, queries=conversations)
        if read_key(folder, f"rel.{task}") == key:
            continue
        queries = _query_features(pool, conversations, sources, scorer, base)
        write_column(folder, f"rel.{task}", relevance(features, queries), key)
        written.append(f"rel.{task}")
    for task, path in sources.query_embeddings.items():
        queries = read_array(path)
        if not isinstance(queries, np.ndarray) or queries.ndim != 2 or queries.shape[1] != features.shape[1]:
            raise TokenCreditError(f"{path} must be an array [queries, {features.shape[1]}], as the pool's features")
        queries = queries.astype(np.float32)
        key = signal_key(pool, signal="rel", features=base, queries=content_hash(queries))
        write_column(folder, f"rel.{task}", relevance(features, queries), key)
        written.append(f"rel.{task}")
    return written


def relevance(features: np.ndarray | csr_matrix, queries: np.ndarray) -> Column:
    """Maximum cosine for dense features, overlap with the mean query for sparse activations."""
    return max_cosine(features, queries) if isinstance(features, np.ndarray) else overlap(features, queries.mean(0))


def _query_features(
    pool: Pool, conversations: list[list[dict[str, Any]]], sources: Sources, scorer: Scorer | None, base: str
) -> np.ndarray:
    if base == signal_key(pool, signal="hashed"):
        return hashed_features(pool, extra=conversations)
    if scorer is None:
        if sources.model is None:
            raise TokenCreditError(
                "queries must be read by what made the features", hint="pass --model, or --query-embeddings TASK=FILE"
            )
        scorer = _load(sources.model, sources)
    if sources.sae is not None and base == _sae_key(pool, scorer, sources):
        sae = load_autoencoder(sources.sae, sources.sae_layer, scorer.model.config.get_text_config().hidden_size)
        return activate(replace(scorer, skip_bad=False), sae, conversations).toarray()
    if base != signal_key(pool, signal="forward", **scorer.facts):
        raise TokenCreditError(
            f"the features of the pool were not made by {scorer.name!r}",
            hint="add rds to --signals, or give --query-embeddings TASK=FILE made like the pool's",
        )
    return score_samples(replace(scorer, skip_bad=False), conversations)[1]
