"""The fixed pool: canonical samples, ids that depend on text alone, and hashes of sets of samples."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from tokencredit.errors import TokenCreditError
from tokencredit.files import whole_file, write_bytes

Positions = Int32[np.ndarray, " _"]  # an ordered subset: indices into the pool

INDEX = "index.arrow"
POOL = "pool.jsonl"
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pool:
    """N samples that never change; a sample is its position 0…N−1, a subset an ordered array of positions.

    `text64` is the 64-bit hash of the normalised text, `id64` the same made different for exact repeats. Texts stay on
    disk and are read by offset; a pool without a folder (tests, synthetic surfaces) has none.
    """

    ids: np.ndarray  # [N] of bytes, such as b"88dd5474f0d64528" or b"88dd5474f0d64528~1"
    id64: UInt64[np.ndarray, " samples"]
    text64: UInt64[np.ndarray, " samples"]
    source_codes: Int32[np.ndarray, " samples"]
    source_names: tuple[str, ...]
    words: Int64[np.ndarray, " samples"]  # words of all messages, as `words.count_words` counts them
    offsets: Int64[np.ndarray, " samples"]
    hash: str
    id_order: Int64[np.ndarray, " samples"]  # positions by ascending id
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.id64)

    def samples(self, positions: Positions | None = None) -> Iterator[dict]:
        """Yield `{id, messages, source, meta}` of the positions, in their order; all samples by default."""
        if self.folder is None:
            raise TokenCreditError("this pool carries no text", hint="load it from a folder with `load_pool(DIR)`")
        order = np.arange(len(self)) if positions is None else positions
        try:
            with (self.folder / POOL).open("rb") as file:
                for position in order:
                    file.seek(self.offsets[position])
                    yield json.loads(file.readline())
        except (OSError, ValueError) as error:
            raise TokenCreditError(
                f"{self.folder / POOL} cannot be read: it was changed or is damaged", hint="build the pool again"
            ) from error

    def positions_of(self, ids: Sequence[str]) -> Positions:
        """The positions of ids, in the given order; an id that the pool lacks is an error."""
        encoded = np.array([identifier.encode() for identifier in ids], dtype=self.ids.dtype)
        order = self.id_order
        positions = order[np.minimum(np.searchsorted(self.ids[order], encoded), len(order) - 1)]
        absent = np.flatnonzero(self.ids[positions] != encoded)
        if len(absent):
            raise TokenCreditError(
                f"id {ids[absent[0]]!r} is not in the pool ({len(absent)} of {len(ids)} ids are missing)",
                hint="the file belongs to another pool; compare the pool hashes",
            )
        return positions.astype(np.int32)

    def write_ids(self, positions: Positions, path: Path) -> None:
        """Write the ids of a subset in its order, one a line."""
        write_bytes(path, b"\n".join(self.ids[positions].tolist()) + b"\n")

    def subset_hash(self, positions: Positions) -> str:
        """SHA-256 of the sorted ids: trainers shuffle, so the order of a subset is not part of what it is."""
        inside = np.zeros(len(self), bool)
        inside[positions] = True
        return _hash_of_ids(self.ids[self.id_order[inside[self.id_order]]])


def _hash_of_ids(sorted_ids: np.ndarray) -> str:
    return hashlib.sha256(b"\n".join(sorted_ids.tolist())).hexdigest()


def splitmix64(values: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """The finaliser of SplitMix64, a bijection on 64-bit words: splitmix64(0) = e220a8397b1dcdaf."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash_priority(id64: UInt64[np.ndarray, " n"], seed: int) -> UInt64[np.ndarray, " n"]:
    """p(x) = splitmix64(id64(x) XOR splitmix64(seed)): uniform, independent of order, nested in the number kept."""
    return splitmix64(id64 ^ splitmix64(np.array([seed & _MASK], dtype=np.uint64)))


def make_pool(
    text_hashes: Sequence[int] | np.ndarray,
    sources: Sequence[str],
    words: Sequence[int] | np.ndarray,
    offsets: Sequence[int] | np.ndarray | None = None,
    folder: Path | None = None,
) -> Pool:
    """A pool from 64-bit text hashes; exact repeats get `~1`, `~2`, … in file order."""
    text64 = np.asarray(text_hashes, dtype=np.uint64)
    repeat = _repeat_numbers(text64)
    with np.errstate(over="ignore"):
        repeated = splitmix64(text64 + repeat.astype(np.uint64))
    names = tuple(sorted(set(sources)))
    code_of = {name: code for code, name in enumerate(names)}
    ids = np.array([name_of(*pair) for pair in zip(text64.tolist(), repeat.tolist(), strict=True)], dtype="S")
    order = np.argsort(ids, kind="stable")
    return Pool(
        ids=ids,
        id64=np.where(repeat > 0, repeated, text64),
        text64=text64,
        source_codes=np.array([code_of[source] for source in sources], dtype=np.int32),
        source_names=names,
        words=np.asarray(words, dtype=np.int64),
        offsets=np.zeros(len(text64), np.int64) if offsets is None else np.asarray(offsets, dtype=np.int64),
        hash=_hash_of_ids(ids[order]),
        id_order=order,
        folder=folder,
    )


def name_of(text64: int, repeat: int) -> str:
    """The id of a sample: 16 hex digits of its text, and `~j` for the j-th exact repeat."""
    return f"{text64:016x}~{repeat}" if repeat else f"{text64:016x}"


def _repeat_numbers(text64: np.ndarray) -> np.ndarray:
    """How many earlier samples have the same text."""
    order = np.argsort(text64, kind="stable")
    grouped = text64[order]
    first = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]]) if len(order) else np.empty(0, np.int64)
    start = np.repeat(first, np.diff(np.r_[first, len(order)]))
    repeat = np.empty(len(order), np.int64)
    repeat[order] = np.arange(len(order)) - start
    return repeat


def save_index(pool: Pool, folder: Path) -> None:
    """Write the columns of a pool beside its text, with the hash and the size of the text file."""
    import pyarrow as pa
    import pyarrow.feather

    columns = {
        "text64": pool.text64,
        "source": pa.DictionaryArray.from_arrays(pa.array(pool.source_codes), pa.array(list(pool.source_names))),
        "words": pool.words,
        "offset": pool.offsets,
    }
    size = (folder / POOL).stat().st_size
    facts = {"schema": "1", "pool_hash": pool.hash, "bytes": str(size)}
    table = pa.table(columns).replace_schema_metadata(facts)
    with whole_file(folder / INDEX) as file:
        pyarrow.feather.write_feather(table, file, compression="uncompressed")


def load_pool(folder: Path | str) -> Pool:
    """Load a pool that `canonicalise` wrote; a text file that changed since is an error."""
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise TokenCreditError(
            f"{folder} holds no pool ({INDEX} is missing)",
            hint="build one with `tokencredit recipes signals POOL --out DIR`",
        )
    pool, facts = _read_index(folder)
    size = (folder / POOL).stat().st_size if (folder / POOL).is_file() else 0
    if str(size) != facts.get("bytes"):
        raise TokenCreditError(
            f"{folder / POOL} has {size} bytes, its index says {facts.get('bytes')}",
            hint="the text was changed; build the pool again",
        )
    if pool.hash != facts.get("pool_hash"):
        raise TokenCreditError(
            f"the index of {folder} hashes to {pool.hash[:12]}, it says {facts.get('pool_hash', '')[:12]}",
            hint="the index was changed; build the pool again",
        )
    return pool


def _read_index(folder: Path) -> tuple[Pool, dict[str, str]]:
    """The columns of an index, and the facts that it states about its pool."""
    import pyarrow as pa
    import pyarrow.feather

    try:
        table = pyarrow.feather.read_table(folder / INDEX)
        facts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        sources = table["source"].combine_chunks()
        names = sources.dictionary.to_pylist()
        pool = make_pool(
            table["text64"].to_numpy(),
            [names[code] for code in sources.indices.to_pylist()],
            table["words"].to_numpy(),
            table["offset"].to_numpy(),
            folder,
        )
    except (OSError, pa.ArrowException, KeyError, AttributeError, IndexError, ValueError) as error:
        raise TokenCreditError(
            f"{folder / INDEX} cannot be read: it is damaged or cut off", hint="build the pool again"
        ) from error
    return pool, facts
