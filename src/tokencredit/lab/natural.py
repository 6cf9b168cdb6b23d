"""Tasks in natural language: any family of `reasoning-gym`, for any model, with a rule that finds the answer.

A family is named `gym:NAME`, with parameters as `gym:chain_sum,max_terms=2,max_digits=1`. The response is free text;
the answer in it is found by a named rule, and the family's own scorer judges it.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.files import parse_yaml
from tokencredit.lab.tasks import gym
from tokencredit.seeds import derive

PREFIX = "gym:"

# A problem belongs to the split whose range holds the hash of its question, in percent.
SPLITS: dict[str, tuple[int, int]] = {"train": (0, 80), "test": (80, 100)}
DRAWS = 2_000  # draws before a split counts as empty
SAMPLED = 4  # problems whose answers choose the rule
CORRECT = 0.999  # a scorer's value from here on is a correct answer; below it is partial credit

NUMBER = re.compile(r"[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")
TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def find_last_number(text: str) -> str | None:
    """Find the last number: an integer, a decimal or a fraction, thousands separated by commas or not."""
    matches = NUMBER.findall(text)
    return matches[-1].replace(",", "").replace("−", "-") if matches else None


def find_boxed(text: str) -> str | None:
    r"""Find the content of the last `\boxed{…}`, braces balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, first = 1, start + len("\\boxed{")
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first:place].strip()
    return None  # cut off inside


def find_tag(text: str) -> str | None:
    """Find the content of the last `<answer>…</answer>`."""
    matches = TAG.findall(text)
    return matches[-1].strip() if matches else None


def find_whole(text: str) -> str | None:
    """Take the whole response as the answer."""
    return text.strip() or None


@dataclass(frozen=True, slots=True)
class AnswerRule:
    """How the answer is found, and what the prompt says so that a model can follow the rule."""

    find: Callable[[str], str | None]
    instruction: str


RULES: dict[str, AnswerRule] = {
    "last_number": AnswerRule(find_last_number, ""),
    "boxed": AnswerRule(find_boxed, "Please reason step by step, and put your final answer within \\boxed{}."),
    "tag": AnswerRule(find_tag, "Think it through, then give the final answer between <answer> and </answer>."),
    "whole": AnswerRule(find_whole, "Answer with nothing but the solution."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NaturalTask:
    """One family with its parameters.

    * `rule`: a name of `RULES`.
    * `partial`: keep the scorer's partial credit. Without it a response has 1 if the scorer accepts it and 0 otherwise:
      many scorers give a share of a point to a wrong answer that contains the right one.
    """

    family: str
    rule: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False

    @property
    def name(self) -> str:
        return ",".join((PREFIX + self.family, *(f"{key}={value}" for key, value in self.parameters.items())))

    def problems(self, split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """Draw `count` problems; no question of one split occurs in the other, and a small family repeats questions.

        Returns:
          Rows with `question`, `answer` and `entry` (the family's item as JSON).
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        return [self._problem(split, seed, index) for index in range(count)]

    def _problem(self, split: str, seed: int, index: int) -> dict[str, Any]:
        low, high = SPLITS[split]
        for attempt in range(DRAWS):
            item = self._draw(derive("natural problem", self.name, split, seed, index, attempt))
            if low <= derive("natural split", self.family, item["question"]) % 100 < high:
                entry = json.dumps(item, default=str, ensure_ascii=False)
                return {"question": item["question"], "answer": str(item["answer"]), "entry": entry}
        raise TokenCreditError(
            f"task {self.name!r} has no problem in split {split!r}: none among {DRAWS} draws",
            hint="widen the family's range of problems",
        )

    def _draw(self, seed: int) -> dict[str, Any]:
        try:
            return gym.item(self.family, seed % 2**31, **self.parameters)
        except (AssertionError, TypeError, ValueError) as error:
            raise TokenCreditError(
                f"reasoning-gym refuses the parameters of {self.name!r}: {' '.join(str(error).split())}"
            ) from error

    def instruction_of(self) -> str:
        """What stands behind a question in the prompt, so that a model can follow the answer rule."""
        return RULES[self.rule].instruction

    def score(self, text: str, entry: Mapping[str, Any]) -> float:
        """Judge one response by the family's scorer; a response without an answer has 0."""
        answer = RULES[self.rule].find(text)
        if answer is None:
            return 0.0
        value = float(gym.scorer(self.family)(answer, dict(entry)))
        return value if self.partial else float(value >= CORRECT)

    def prompt(self, question: str) -> str:
        """The question with the instruction of the answer rule."""
        instruction = self.instruction_of()
        return f"{question}\n\n{instruction}" if instruction else question


def is_natural(name: object) -> bool:
    """Whether a task's name means a family of reasoning-gym."""
    return isinstance(name, str) and name.startswith(PREFIX)


def parse_task(given: str | Mapping[str, Any]) -> NaturalTask:
    """Read `gym:NAME,key=value,…` or `{name: gym:NAME, key: value, …}`; `answer` and `partial` are our own keys.

    `answer` names the rule that finds the answer. Without it, "last_number" is taken where the answers of a few
    problems are all numbers, and "tag" elsewhere.

    Raises:
      TokenCreditError: the family, a parameter or the answer rule is unknown; it names the nearest one.
    """
    if isinstance(given, Mapping):
        settings = {str(key): value for key, value in given.items() if key != "name"}
        name = str(given.get("name"))
    else:
        name, *pairs = given.split(",")
        settings = dict(_pair(pair, given) for pair in pairs)
    family = name.removeprefix(PREFIX)
    rule, partial = settings.pop("answer", None), settings.pop("partial", False)
    if rule is not None and rule not in RULES:
        raise unknown("answer rule", rule, RULES)
    if not isinstance(partial, bool):
        raise TokenCreditError(f"`partial` of task {name!r} must be true or false, got {partial!r}")
    accepted = family_parameters(family)
    for key in settings:
        if key not in accepted:
            raise unknown(f"parameter of {name}", key, accepted)
    task = NaturalTask(family=family, parameters=settings, rule=rule or "tag", partial=partial)
    answers = [row["answer"] for row in task.problems("train", SAMPLED)]
    if rule is None and all(NUMBER.fullmatch(answer) for answer in answers):
        return replace(task, rule="last_number")
    return task


def _pair(text: str, whole: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise TokenCreditError(f"cannot read {text!r} in the task {whole!r}", hint="write gym:NAME,key=value,key=value")
    return key.strip(), parse_yaml(value, f"the parameter {key.strip()!r} of {whole!r}")


def families() -> list[str]:
    """Names of reasoning-gym's families."""
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def family_parameters(family: str) -> list[str]:
    """Names of a family's parameters, without the seed and the size that we set."""
    if family not in families():
        raise unknown("family of reasoning-gym", family, families())
    from reasoning_gym.factory import DATASETS

    config = DATASETS[family][1]
    return [name for name in inspect.signature(config).parameters if name not in ("seed", "size")]


def reward_functions(task: NaturalTask) -> dict[str, Callable[..., list[float]]]:
    """The rewards of a task for TRL: `correct` by the family's scorer, `format` for an answer that the rule finds."""

    def correct(completions: Sequence[Any], entry: Sequence[str], **_: Any) -> list[float]:
        return [task.score(_text(item), json.loads(row)) for item, row in zip(completions, entry, strict=True)]

    def has_answer(completions: Sequence[Any], **_: Any) -> list[float]:
        find = RULES[task.rule].find
        return [float(find(_text(item)) is not None) for item in completions]

    return {"correct": correct, "format": has_answer}


def _text(completion: Any) -> str:
    """A completion as text: TRL gives messages where prompts are messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)
