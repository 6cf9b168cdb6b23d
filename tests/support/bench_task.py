"""A task of the tests' own, and a folder with a model for it."""

from pathlib import Path
from types import SimpleNamespace

from tokencredit.lab.model import build_model, build_tokenizer

ALPHABET = "ab:"


class Letters:
    """Say `a` or `b` twice: every prompt `n:`-like string accepts the words that hold an `a` first."""

    max_response = 4

    def __init__(self, listed: tuple[str, ...] = ("a", "ab", "aa"), right: tuple[str, ...] = ("a", "ab", "aa")) -> None:
        self.listed, self.right = listed, right

    def problems(self, split: str, count: int, seed: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(prompt="ab"[index % 2] * (1 + index // 2) + ":") for index in range(count)]

    def verify(self, problem: SimpleNamespace, response: str) -> bool:
        return response in self.right

    def accepted(self, problem: SimpleNamespace) -> list[str]:
        return list(self.listed)


letters = Letters()
too_kind = Letters(right=("a", "ab", "aa", "b", ""))
too_long = Letters(listed=("a", "aaaaa"))


def model_folder(where: Path) -> Path:
    """A tiny random model in Hugging Face format."""
    tokenizer = build_tokenizer(ALPHABET)
    build_model(tokenizer, layers=1, width=16, heads=2).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where
