"""Columns of a pool folder: one Arrow file a signal with the key of what made it, features as memory-mapped arrays."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.files import read_json, write_json
from tokencredit.recipes.materials import Column, Materials
from tokencredit.recipes.minhash import Shingles, shingle
from tokencredit.recipes.neardup import PairGraph, build_graph
from tokencredit.recipes.pool import Pool, load_pool
from tokencredit.recipes.textsignals import all_text

SIGNALS = "signals"
VERSION = "2"  # of the signal code; part of every key


def signal_key(pool: Pool, **facts: object) -> str:
    """SHA-256 over the pool hash, the code version and whatever else made the signal: model, revision, template, …"""
    text = json.dumps({"pool": pool.hash, "version": VERSION, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_column(folder: Path, name: str, values: Column, key: str) -> None:
    """Write a signal; the file appears only when it is whole."""
    import pyarrow as pa
    import pyarrow.feather

    (folder / SIGNALS).mkdir(parents=True, exist_ok=True)
    table = pa.table({"value": pa.array(values, pa.float32())}).replace_schema_metadata({"key": key, "name": name})
    path = column_path(folder, name)
    partial = path.with_suffix(".partial")
    pyarrow.feather.write_feather(table, partial, compression="uncompressed")
    partial.replace(path)


def column_path(folder: Path, name: str) -> Path:
    """The file of a signal; a name that would leave the folder is an error."""
    if "/" in name or name.startswith("."):
        raise TokenCreditError(f"a signal name must not contain '/' or start with '.', got {name!r}")
    return folder / SIGNALS / f"{name}.arrow"


def read_key(folder: Path, name: str) -> str | None:
    """The key of a stored signal, None where there is none."""
    import pyarrow.feather

    path = column_path(folder, name)
    if not path.is_file():
        return None
    return pyarrow.feather.read_table(path, columns=[], memory_map=True).schema.metadata[b"key"].decode()


class Columns(Mapping[str, Column]):
    """The signals of a pool folder, each read on first use."""

    def __init__(self, folder: Path, samples: int) -> None:
        self._folder, self._samples = folder, samples
        self._names = sorted(path.name.removesuffix(".arrow") for path in (folder / SIGNALS).glob("*.arrow"))
        self._held: dict[str, Column] = {}

    def __getitem__(self, name: str) -> Column:
        import pyarrow.feather

        if name not in self._held:
            if name not in self._names:
                raise unknown("signal", name, self._names)
            table = pyarrow.feather.read_table(column_path(self._folder, name))
            values = table["value"].to_numpy(zero_copy_only=False).astype(np.float32)
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


def load_materials(folder: Path | str) -> Materials:
    """Pool, signals and features of a folder; graphs and signatures are built on first use and kept on disk."""
    folder = Path(folder)
    pool = load_pool(folder)
    columns = Columns(folder, len(pool))
    keys = {name: read_key(folder, name) or "" for name in columns}
    features = load_features(folder)

    def graph(clusters: int, exact: bool) -> PairGraph:
        assert isinstance(features, np.ndarray)
        return _stored_graph(folder, features, clusters, exact)

    def shingles() -> Shingles:
        return _stored_shingles(folder, pool)

    return Materials(
        pool=pool,
        signals=columns,
        keys=keys,
        features=features,
        make_graph=graph if isinstance(features, np.ndarray) else None,
        make_shingles=shingles,
    )


def save_features(folder: Path, features: np.ndarray | csr_matrix, key: str) -> None:
    """Dense rows as `features.npy`, sparse ones as the three arrays of their CSR form, with the key beside them."""
    base = folder / SIGNALS
    base.mkdir(parents=True, exist_ok=True)
    if isinstance(features, np.ndarray):
        _save_array(base / "features.npy", features.astype(np.float32))
    else:
        for part in ("data", "indices", "indptr"):
            _save_array(base / f"features.{part}.npy", getattr(features, part))
    facts = {"key": key, "shape": list(features.shape), "sparse": not isinstance(features, np.ndarray)}
    (base / "features.json").write_text(json.dumps(facts), encoding="utf-8")


def _save_array(path: Path, array: np.ndarray) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    partial.replace(path)


def features_key(folder: Path) -> str | None:
    """The key of the stored features, None where there are none."""
    path = folder / SIGNALS / "features.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["key"]) if path.is_file() else None


def load_features(folder: Path) -> np.ndarray | csr_matrix | None:
    """The stored features, memory-mapped; None where there are none."""
    base = folder / SIGNALS
    if not (base / "features.json").is_file():
        return None
    facts = json.loads((base / "features.json").read_text(encoding="utf-8"))
    if not facts["sparse"]:
        return np.asarray(np.load(base / "features.npy", mmap_mode="r", allow_pickle=False))
    parts = [np.load(base / f"features.{part}.npy", mmap_mode="r") for part in ("data", "indices", "indptr")]
    return csr_matrix(tuple(parts), shape=tuple(facts["shape"]), copy=False)


def _stored_graph(folder: Path, features: np.ndarray, clusters: int, exact: bool) -> PairGraph:
    """The pair graph from disk if its features are the same, else built and stored."""
    name = "exact" if exact else f"{clusters}"
    path, key = folder / SIGNALS / f"neardup-{name}.npz", features_key(folder) or ""
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) == key:
                fields = {part: stored[part] for part in ("first", "second", "cosine", "covered")}
                return PairGraph(**fields, hash=str(stored["hash"]))
    graph = build_graph(features, clusters, exact=exact)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        parts = {part: getattr(graph, part) for part in ("first", "second", "cosine", "covered", "hash")}
        np.savez(file, key=np.array(key), **parts)
    partial.replace(path)
    return graph


def _stored_shingles(folder: Path, pool: Pool) -> Shingles:
    base = folder / SIGNALS
    base.mkdir(parents=True, exist_ok=True)
    names = ("offsets", "hashes", "signatures")
    mark = base / "minhash.json"
    if not (mark.is_file() and json.loads(mark.read_text())["pool"] == pool.hash):
        texts = (all_text(sample) for sample in pool.samples())
        made = shingle(texts, len(pool))
        for name in names:
            _save_array(base / f"minhash.{name}.npy", getattr(made, name))
        write_json(mark, {"pool": pool.hash, "version": VERSION})
    arrays = {name: np.asarray(np.load(base / f"minhash.{name}.npy", mmap_mode="r")) for name in names}
    return Shingles(**arrays)
