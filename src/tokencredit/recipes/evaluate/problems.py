"""The verifiable problems that a fine-tuned model is judged on, one JSON-lines file for each split."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.recipes.pool.readers import records

Problem = Mapping[str, str]  # task, prompt, answer, id, reference


def read_problems(splits: Mapping[str, str], split: str) -> list[Problem]:
    """Read a split; a line that is not `{task, prompt, answer}` is an error with file and number."""
    if split not in splits:
        raise unknown("split", split, splits)
    path = Path(splits[split])
    if not path.is_file():
        raise TokenCreditError(f"{path} does not exist", hint="give a JSONL file of {task, prompt, answer}")
    problems: list[Problem] = []
    for number, record in records(path):
        fields = record if isinstance(record, dict) else {}
        missing = [name for name in ("task", "prompt", "answer") if name not in fields]
        if missing:
            raise TokenCreditError(f"{path}:{number}: expected {{task, prompt, answer}}, {missing[0]!r} is missing")
        problem = {name: str(fields[name]) for name in ("task", "prompt", "answer")}
        problems.append(problem | {"id": str(fields.get("id", number)), "reference": str(fields.get("reference", ""))})
    if not problems:
        raise TokenCreditError(f"{path} holds no problem")
    return problems


def refuse_overlap(problems: Mapping[str, Sequence[Problem]]) -> None:
    """Raise an error where two splits share a problem."""
    split_of: dict[tuple[str, str], str] = {}
    for split, items in problems.items():
        for item in items:
            other = split_of.setdefault((item["task"], item["prompt"]), split)
            if other != split:
                raise TokenCreditError(
                    f"splits {other!r} and {split!r} share the problem {item['prompt'][:60]!r}",
                    hint="search and confirmation need disjoint problems",
                )
