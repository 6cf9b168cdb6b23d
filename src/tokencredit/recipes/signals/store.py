"""Columns of a pool folder: one Arrow file a signal with the key of what made it, features as memory-mapped arrays."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from scipy.sparse import csr_matrix

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.files import make_folder, read_json, whole_file, write_json
from tokencredit.recipes.pool.samples import Pool, load_pool
from tokencredit.recipes.signals.materials import Column, Materials
from tokencredit.recipes.signals.minhash import Shingles, shingle
from tokencredit.recipes.signals.neardup import PairGraph, build_graph
from tokencredit.recipes.signals.text import all_text

SIGNALS = "signals"
FEATURES, MODEL = "features.json", "model.json"
VERSION = "2"  # of the signal code; part of every key


def signal_key(pool: Pool, **facts: object) -> str:
    """SHA-256 over the pool hash, the code version and whatever else made the signal: model, revision, template, …"""
    text = json.dumps({"pool": pool.hash, "version": VERSION, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_column(folder: Path, name: str, values: Column, key: str) -> None:
    """Write a signal; the file appears only when it is whole."""
    import pyarrow as pa
    import pyarrow.feather

    make_folder(folder / SIGNALS)
    table = pa.table({"value": pa.array(values, pa.float32())}).replace_schema_metadata({"key": key, "name": name})
    with whole_file(column_path(folder, name)) as file:
        pyarrow.feather.write_feather(table, file, compression="uncompressed")


def column_path(folder: Path, name: str) -> Path:
    """The file of a signal; a name that would leave the folder is an error."""
    if "/" in name or "\0" in name or name.startswith(".") or not name.isprintable():
        raise TokenCreditError(f"a signal name must not contain '/' or start with '.', got {name!r}")
    return folder / SIGNALS / f"{name}.arrow"


def read_key(folder: Path, name: str) -> str | None:
    """The key of a stored signal, None where there is none."""
    import pyarrow as pa
    import pyarrow.feather

    path = column_path(folder, name)
    if not path.is_file():
        return None
    try:
        schema = pyarrow.feather.read_table(path, columns=[], memory_map=True).schema
    except (OSError, pa.ArrowException):
        return None  # damaged: it is computed again
    return (schema.metadata or {}).get(b"key", b"").decode(errors="replace")


class Columns(Mapping[str, Column]):
    """The signals of a pool folder, each read on first use."""

    def __init__(self, folder: Path, samples: int) -> None:
        self._folder, self._samples = folder, samples
        self._names = sorted(path.name.removesuffix(".arrow") for path in (folder / SIGNALS).glob("*.arrow"))
        self._held: dict[str, Column] = {}

    def __getitem__(self, name: str) -> Column:
        if name not in self._held:
            if name not in self._names:
                raise unknown("signal", name, self._names)
            values = _read_column(column_path(self._folder, name))
            if len(values) != self._samples:
                raise TokenCreditError(
                    f"signal {name!r} has {len(values)} values for {self._samples} samples",
                    hint="the pool was rebuilt; compute its signals again",
                )
            self._held[name] = values
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_column(path: Path) -> Column:
    import pyarrow as pa
    import pyarrow.feather

    try:
        table = pyarrow.feather.read_table(path)
        values: Column = table["value"].to_numpy(zero_copy_only=False).astype(np.float32)
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise TokenCreditError(
            f"{path} cannot be read: it is damaged or cut off", hint="compute the signal again"
        ) from error
    return values


def load_materials(folder: Path | str) -> Materials:
    """Pool, signals and features of a folder; graphs and signatures are built on first use and kept on disk."""
    folder = Path(folder)
    pool = load_pool(folder)
    columns = Columns(folder, len(pool))
    keys = {name: read_key(folder, name) or "" for name in columns}
    features = load_features(folder)
    return Materials(
        pool=pool,
        signals=columns,
        keys=keys,
        features=features,
        make_graph=partial(_stored_graph, folder, features) if isinstance(features, np.ndarray) else None,
        make_shingles=partial(_stored_shingles, folder, pool),
    )


def save_features(folder: Path, features: np.ndarray | csr_matrix, key: str) -> None:
    """Dense rows as `features.npy`, sparse ones as the three arrays of their CSR form, with the key beside them."""
    base = folder / SIGNALS
    make_folder(base)
    (base / FEATURES).unlink(missing_ok=True)  # until the arrays are whole there are no features
    if isinstance(features, np.ndarray):
        _save_array(base / "features.npy", features.astype(np.float32))
    else:
        for part in ("data", "indices", "indptr"):
            _save_array(base / f"features.{part}.npy", getattr(features, part))
    facts = {"key": key, "shape": list(features.shape), "sparse": not isinstance(features, np.ndarray)}
    write_json(base / FEATURES, facts)


def _save_array(path: Path, array: np.ndarray) -> None:
    with whole_file(path) as file:
        np.save(file, array, allow_pickle=False)


def _read_facts(path: Path, *names: str) -> dict[str, Any] | None:
    """What is written beside arrays; None where there is nothing or where the file is damaged."""
    try:
        facts = read_json(path)
    except TokenCreditError:
        return None
    return facts if isinstance(facts, dict) and set(names) <= set(facts) else None


def _feature_facts(folder: Path) -> dict[str, Any] | None:
    return _read_facts(folder / SIGNALS / FEATURES, "key", "shape", "sparse")


def features_key(folder: Path) -> str | None:
    """The key of the stored features, None where there are none."""
    facts = _feature_facts(folder)
    return None if facts is None else str(facts["key"])


def load_features(folder: Path) -> np.ndarray | csr_matrix | None:
    """The stored features, memory-mapped; None where there are none."""
    base = folder / SIGNALS
    facts = _feature_facts(folder)
    if facts is None:
        return None
    if not facts["sparse"]:
        return _load_array(base / "features.npy")
    parts = [_load_array(base / f"features.{part}.npy") for part in ("data", "indices", "indptr")]
    return csr_matrix(tuple(parts), shape=tuple(facts["shape"]), copy=False)


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise TokenCreditError(
            f"{path} cannot be read: it is missing, damaged or cut off", hint="compute the features again"
        ) from error


def _stored_graph(folder: Path, features: np.ndarray, clusters: int, exact: bool) -> PairGraph:
    """The pair graph from disk if its features are the same, else built and stored."""
    name = "exact" if exact else f"{clusters}"
    path, key = folder / SIGNALS / f"neardup-{name}.npz", features_key(folder) or ""
    stored = _read_graph(path, key) if path.is_file() else None
    if stored is not None:
        return stored
    graph = build_graph(features, clusters, exact=exact)
    parts = {part: getattr(graph, part) for part in ("first", "second", "cosine", "covered", "hash")}
    with whole_file(path) as file:
        np.savez(file, key=np.array(key), **parts)
    return graph


def _read_graph(path: Path, key: str) -> PairGraph | None:
    """A stored graph of the same features; None where it is of others or damaged: it is built again."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            fields = {part: stored[part] for part in ("first", "second", "cosine", "covered")}
            return PairGraph(**fields, hash=str(stored["hash"]))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _stored_shingles(folder: Path, pool: Pool) -> Shingles:
    base = make_folder(folder / SIGNALS)
    paths = {name: base / f"minhash.{name}.npy" for name in ("offsets", "hashes", "signatures")}
    mark, facts = base / "minhash.json", {"pool": pool.hash, "version": VERSION}
    if _read_facts(mark) != facts:
        mark.unlink(missing_ok=True)
        shingles = shingle(map(all_text, pool.samples()), len(pool))
        for name, path in paths.items():
            _save_array(path, getattr(shingles, name))
        write_json(mark, facts)
    return Shingles(**{name: _load_array(path) for name, path in paths.items()})


def save_model_facts(folder: Path, model: str, revision: str) -> None:
    """Keep the name of the model that read the pool, for the export."""
    write_json(make_folder(folder / SIGNALS) / MODEL, {"model": model, "revision": revision})


def model_of(folder: Path | None) -> str | None:
    """The model that read the pool last, None where none did."""
    facts = None if folder is None else _read_facts(folder / SIGNALS / MODEL, "model")
    return str(facts["model"]) if facts and facts["model"] else None
