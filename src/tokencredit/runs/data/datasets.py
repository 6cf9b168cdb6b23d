"""Data sets of prompts: read from files, folders or the hub, and check what a run needs of them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from tokencredit.errors import TokenCreditError
from tokencredit.runs.config.run_config import DatasetSettings

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
DEEPEST = 64  # levels of lists and objects in a row; pyarrow crashes on rows that are nested very deeply
SHARE_OF_OVERLAP = 0.05  # of the evaluation problems; more than this is refused
EVALUATION_SPLITS = ("test", "validation", "valid", "val", "dev", "eval", "evaluation")


def load_training(settings: DatasetSettings) -> Dataset:
    """Load the training data that the `dataset:` section of a config names.

    Args:
      settings: `path` (a JSON, CSV, Parquet or Arrow file, a folder, or a name on the hub), `split`, `prompt` (the
        column of the prompts), and optionally `config` (a configuration of a hub data set).

    Returns:
      The rows, with their prompts in the column `prompt`.

    Raises:
      TokenCreditError: the data cannot be read, are empty, or lack the column.
    """
    return with_prompt_column(_load(settings.path, settings.config, settings.split), settings)


def load_evaluation(settings: DatasetSettings) -> Dataset | None:
    """Load the evaluation data of a `dataset:` section, or None where it names none.

    `evaluation` is a path like `path`; without it, `evaluation_split` is another split of `path`. Data that hold
    several splits are never read with the training split unless `evaluation_split` says so.
    """
    path, split = settings.evaluation or settings.path, settings.evaluation_split
    if settings.evaluation is None and split is None:
        return None
    same = path == settings.path
    if same and split in (None, settings.split):
        raise TokenCreditError(
            f"the evaluation would use the training data: {path!r}, split {settings.split!r}",
            hint="set dataset.evaluation_split to another split, or dataset.evaluation to another file",
        )
    loaded = _load(path, settings.config if same else None, split, evaluation=True)
    return with_prompt_column(loaded, settings.replace(path=path))


def _load(source: Any, config: str | None, split: str | None, *, evaluation: bool = False) -> Dataset:
    path = Path(str(source)).expanduser()
    try:
        if path.suffix in (*JSON_SUFFIXES, *TABLES, ".arrow") and not path.is_dir():
            _check_file_split(path, split, evaluation)
            loaded = _read_file(path)
        elif path.is_dir() and _is_saved(path):
            from datasets import load_from_disk

            loaded = load_from_disk(str(path))
        elif path.is_file():
            known = ", ".join((*JSON_SUFFIXES, *TABLES, ".arrow"))
            raise TokenCreditError(f"the dataset file {str(path)!r} has none of the suffixes {known}")
        else:
            loaded = _from_hub(str(path) if path.is_dir() else str(source), config, split, evaluation)
    except TokenCreditError:
        raise
    except Exception as error:  # the readers' many error types, in one line
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        hint = "name one: `dataset: {config: …}`" if "config name" in reason.lower() else None
        raise TokenCreditError(f"cannot read the dataset {str(source)!r}: {reason}", hint=hint) from error
    if isinstance(loaded, DatasetDict):
        loaded = loaded[_choose_split(list(loaded), split, str(source), evaluation)]
    if len(loaded) == 0:
        raise TokenCreditError(f"the dataset {str(source)!r} is empty", hint="it needs at least one prompt")
    return loaded


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json", "dataset_info.json"))


def _check_file_split(path: Path, split: str | None, evaluation: bool) -> None:
    if evaluation and split not in (None, "train", path.stem):
        raise TokenCreditError(
            f"{str(path)!r} is one file and has no split {split!r}",
            hint="set dataset.evaluation to a file of its own, and leave out dataset.evaluation_split",
        )


def _from_hub(source: str, config: str | None, split: str | None, evaluation: bool) -> Any:
    from datasets import get_dataset_split_names, load_dataset

    if split is None:
        split = _choose_split(get_dataset_split_names(source, config), None, source, evaluation)
    return load_dataset(source, config, split=split)


def _choose_split(names: list[str], split: str | None, source: str, evaluation: bool) -> str:
    if split is not None:
        if split not in names:
            raise TokenCreditError(f"{source} has no split {split!r}; it has {', '.join(names)}")
        return split
    if len(names) == 1:
        return names[0]
    usual = next((name for name in EVALUATION_SPLITS if name in names), None)
    if usual is None or not evaluation:
        raise TokenCreditError(
            f"{source} has several splits: {', '.join(names)}", hint="name one with dataset.evaluation_split"
        )
    return usual


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise TokenCreditError(f"no dataset file {str(path)!r}")
    if path.stat().st_size == 0:
        raise TokenCreditError(f"the dataset {str(path)!r} is empty", hint="it needs at least one prompt")
    if path.suffix in JSON_SUFFIXES:
        return rows_to_dataset(list(read_json_rows(path)), str(path))
    if path.suffix == ".arrow":
        return Dataset.from_file(str(path))
    if path.suffix in (".csv", ".tsv"):
        return _read_csv(path)
    from datasets import load_dataset

    return load_dataset("parquet", data_files=str(path), split="train")


def _read_csv(path: Path) -> Dataset:
    import pandas  # type: ignore[import-untyped]

    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            _decode(line, path, number)
    table = pandas.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", encoding="utf-8-sig")
    return Dataset.from_pandas(table, preserve_index=False)


def read_json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a JSON file: one object per line, or one array of objects.

    Raises:
      TokenCreditError: a line is not UTF-8, is not a JSON object, or is nested too deeply; it names file and line.
    """
    with path.open("rb") as file:
        first = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        file.seek(0)
        if first == b"[":
            yield from _rows_of_array(_decode(file.read(), path, 1), path)
            return
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, number)
            if text.strip():
                yield _object(_parse(text, f"{path}, line {number}"), f"{path}, line {number}")


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        raise TokenCreditError(
            f"cannot read the dataset {str(path)!r}: line {line} is not UTF-8 text", hint="save the file as UTF-8"
        ) from error


def _rows_of_array(text: str, path: Path) -> Iterator[dict[str, Any]]:
    rows = _parse(text, str(path))
    if not isinstance(rows, list):
        raise TokenCreditError(f"{path} must hold an array of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield _object(row, f"{path}, row {number}")


def _parse(text: str, where: str) -> Any:
    too_deep = TokenCreditError(f"cannot read the dataset: {where} is nested more than {DEEPEST} levels deep")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise too_deep from error
    except ValueError as error:  # also a number of more digits than Python converts
        raise TokenCreditError(
            f"cannot read the dataset: {where} is not JSON: {' '.join(str(error).split())}"
        ) from error
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise too_deep
    return value


def _depth(value: Any) -> int:
    """The number of lists and objects inside each other, counted level by level."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, list | dict)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        what = "an empty object" if value == {} else type(value).__name__
        raise TokenCreditError(f"cannot read the dataset: {where} must be an object of columns, got {what}")
    return value


def rows_to_dataset(rows: list[dict[str, Any]], source: str) -> Dataset:
    """Turn rows into a data set; a column that a row lacks is None there.

    Raises:
      TokenCreditError: a column holds values of different types; it names the column and the first such row.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    try:
        return Dataset.from_dict(columns)
    except Exception as error:  # pyarrow's many types
        for name, values in columns.items():
            reason = _column_reason(values)
            if reason is not None:
                raise TokenCreditError(f"cannot read the dataset {source!r}: column {name!r}, {reason}") from error
        reason = " ".join(str(error).split())[:300]
        raise TokenCreditError(f"cannot read the dataset {source!r}: {reason}") from error


def _column_reason(values: list[Any]) -> str | None:
    """Explain why values cannot form a column, by the first row that does not fit those before it."""

    def fits(count: int) -> bool:
        try:
            Dataset.from_dict({"column": values[:count]})
        except Exception:
            return False
        return True

    if fits(len(values)):
        return None
    good, bad = 0, len(values)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    shown = ascii(values[bad - 1])[:60]
    return f"row {bad - 1}: {shown} cannot stand in one column with the values before it"


def with_prompt_column(dataset: Dataset, settings: DatasetSettings) -> Dataset:
    """Put the prompts into the column `prompt`, which TRL reads.

    Another column of that name is kept as `original_prompt`, so that a reward function can still read it.
    """
    column = settings.prompt
    if column not in dataset.column_names:
        raise TokenCreditError(
            f"the dataset {settings.path!r} has no column {column!r}; it has {', '.join(dataset.column_names)}",
            hint="name the column of the prompts: `dataset: {prompt: …}`",
        )
    if column == "prompt":
        return dataset
    if "prompt" in dataset.column_names:
        kept = "original_prompt"
        while kept in dataset.column_names:
            kept += "_"
        dataset = dataset.rename_column("prompt", kept)
    return dataset.rename_column(column, "prompt")


def without_overlap(evaluation: Dataset, training: Iterable[Any]) -> tuple[Dataset, int]:
    """Leave out evaluation problems that are also training prompts, and count them.

    Prompts are compared by their text, ignoring case and white space.

    Raises:
      TokenCreditError: more than 5 % of the evaluation problems are training prompts.
    """
    if {"image", "images"} & set(evaluation.column_names):
        return evaluation, 0  # the same question is asked about different pictures
    known = {_normalised(prompt) for prompt in training} - {None, ""}
    kept: list[int] = []
    repeated: list[int] = []
    for row, prompt in enumerate(evaluation["prompt"]):
        (repeated if _normalised(prompt) in known else kept).append(row)
    if len(repeated) > SHARE_OF_OVERLAP * len(evaluation):
        first = repeated[0]
        raise TokenCreditError(
            f"{len(repeated)} of {len(evaluation)} evaluation problems are also training prompts, the first in row "
            f"{first}: {(_text(evaluation[first]['prompt']) or '')[:60]!r}",
            hint="evaluate on held-out problems: set dataset.evaluation or dataset.evaluation_split",
        )
    return (evaluation.select(kept) if repeated else evaluation), len(repeated)


def _text(prompt: Any) -> str | None:
    """The text of a prompt's user turns, or None where it also shows something else than text."""
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if isinstance(turn, dict)] if isinstance(prompt, list) else []
    asked = [turn.get("content") for turn in turns if turn.get("role") == "user"]
    contents = asked or [turn.get("content") for turn in turns]
    texts = [content for content in contents if isinstance(content, str)]
    return "\n".join(texts) if len(texts) == len(contents) else None


def _normalised(prompt: Any) -> str | None:
    text = _text(prompt)
    return None if text is None else " ".join(text.casefold().split())
