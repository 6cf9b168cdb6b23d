"""What a lab task is: problems, a verifier, and the complete list of accepted responses."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.seeds import derive

# A problem belongs to the split whose range holds the hash of its key, in percent: splits share no key under any seed.
SPLITS: dict[str, tuple[int, int]] = {"sft": (0, 40), "train": (40, 80), "test": (80, 100)}

DRAWS = 20_000  # draws before a split counts as empty

ALPHABET = "0123456789+-=,:;abcdefghij"  # shared by all tasks, so that their models share a tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A prompt and what its verifier needs to know, as JSON values.

    Problems with the same `key` are the same up to the order in which they are written.
    """

    prompt: str
    key: str
    data: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps({"prompt": self.prompt, "key": self.key, "data": self.data}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Problem":
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A family of problems whose accepted responses can be listed.

    Invariant: `verify(problem, text)` is true exactly for the members of `accepted(problem)`. Texts come without EOS;
    a response is accepted only if EOS follows. `max_prompt` and `max_response` count tokens (one per character), EOS
    included. `draw(seed)` makes a problem; `random_trace(problem, rng, solved)` writes a response in the task's format
    that is accepted (True), is not (False), or either way (None). `easier` is a shorter version of the task, on which a
    warm start begins; `solved_first` lets it begin on solved traces alone; `warm_steps` is how many steps that takes by
    default.
    """

    name: str
    alphabet: str
    max_prompt: int
    max_response: int
    draw: Callable[[int], Problem]
    verify: Callable[[Problem, str], bool]
    accepted: Callable[[Problem], list[str]]
    random_trace: Callable[[Problem, random.Random, bool | None], str]
    easier: "Task | None" = None
    solved_first: bool = False
    warm_steps: int = 600

    def problems(self, split: str, count: int, seed: int = 0) -> list[Problem]:
        """`count` independent problems of `split`; the first n of them do not depend on `count`.

        A small task repeats problems. No problem of one split occurs in another, under any pair of seeds.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        return [self._problem(split, seed, index) for index in range(count)]

    def split_of(self, problem: Problem) -> str:
        """The split that `problem` belongs to."""
        percent = derive("lab split", self.name, problem.key) % 100
        return next(split for split, (low, high) in SPLITS.items() if low <= percent < high)

    def _problem(self, split: str, seed: int, index: int) -> Problem:
        for attempt in range(DRAWS):
            problem = self.draw(derive("lab problem", self.name, split, seed, index, attempt))
            if self.split_of(problem) == split:
                return problem
        raise TokenCreditError(
            f"task {self.name!r} has no problem in split {split!r}: none among {DRAWS} draws",
            hint="widen the task's range of numbers",
        )
