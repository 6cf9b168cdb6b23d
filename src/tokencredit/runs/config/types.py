"""The types of a config's keys, in one table, and the checks that need no model and no host.

Whatever a YAML file holds, the result is an accepted value or a `TokenCreditError` that names the key.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from tokencredit.errors import TokenCreditError, shown, unknown

LARGEST = 2**31 - 1
MOST_THREADS = 1024
MOST_VALUES = 10_000  # in one config; an alias that is used often counts as often
DEEPEST = 50


class Type(NamedTuple):
    """What a key accepts, in words and as a predicate."""

    words: str
    accepts: Callable[[Any], bool]


def is_whole(value: Any, low: int, high: int = LARGEST) -> bool:
    """Tell whether a value is an integer between two bounds; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number; True and False are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def or_null(kind: Type) -> Type:
    """The same type, or null."""
    return Type(f"{kind.words}, or null", lambda value: value is None or kind.accepts(value))


TEXT = Type("a text", lambda value: isinstance(value, str) and value.strip() != "" and "\0" not in value)
COUNT = Type("a whole number of at least 1", lambda value: is_whole(value, 1))
SEED = Type("a whole number", lambda value: is_whole(value, 0, 2**32 - 1))
MAPPING = Type("a mapping", lambda value: isinstance(value, Mapping))
CHAT = Type("auto, true or false", lambda value: isinstance(value, bool) or value == "auto")

TYPES: dict[str, Type] = {
    "name": TEXT,
    "task": or_null(TEXT),
    "model": TEXT,
    "stage": TEXT,
    "timing": TEXT,
    "seed": SEED,
    "steps": COUNT,
    "prompts_per_step": or_null(COUNT),
    "sampler": TEXT,
    "threads": or_null(Type("a whole number of at least 1", lambda value: is_whole(value, 1, MOST_THREADS))),
    "dataset.path": or_null(TEXT),
    "dataset.config": or_null(TEXT),
    "dataset.split": TEXT,
    "dataset.prompt": TEXT,
    "dataset.count": or_null(COUNT),
    "dataset.evaluation": or_null(TEXT),
    "dataset.evaluation_split": or_null(TEXT),
    "dataset.system_prompt": or_null(TEXT),
    "dataset.chat": CHAT,
    "lora": or_null(MAPPING),
    "teacher": or_null(MAPPING),
    "evaluation.every": COUNT,
    "evaluation.problems": COUNT,
    "evaluation.samples": COUNT,
    "evaluation.threshold": Type("a number", is_number),
    "records.every": Type("a whole number of steps, 0 for no records", lambda value: is_whole(value, 0)),
    "trainer.num_generations": COUNT,
    "trainer.max_completion_length": COUNT,
    "trainer.per_device_train_batch_size": COUNT,
    "trainer.gradient_accumulation_steps": COUNT,
    "trainer.learning_rate": Type("a number of at least 0", lambda value: is_number(value) and value >= 0),
    "trainer.temperature": Type("a number above 0", lambda value: is_number(value) and value > 0),
    "trainer.beta": Type("a number of at least 0", lambda value: is_number(value) and value >= 0),
}


def check_types(config: Mapping[str, Any]) -> None:
    """Compare every key that is set with its type in `TYPES`."""
    for path, kind in TYPES.items():
        section, dot, key = path.partition(".")
        holder = config[section] if dot else config
        name = key if dot else section
        if name in holder and not kind.accepts(holder[name]):
            raise TokenCreditError(f"`{path}` must be {kind.words}, got {shown(holder[name])}")
    if config["sampler"] not in ("auto", "fast", "host"):
        raise unknown("sampler", config["sampler"], ("auto", "fast", "host"))
    if config["timing"] not in ("auto", "update", "rollout"):
        raise unknown("timing", config["timing"], ("auto", "update", "rollout"))


def plain_value(value: Any, path: str = "the config") -> Any:
    """Copy a config into what JSON and YAML can hold: mappings with text keys, lists, texts, numbers, booleans, null.

    Raises:
      TokenCreditError: another type, nesting of more than 50 levels (an alias that contains itself), or more than
        10,000 values (an alias of aliases).
    """
    return _copy_plain(value, path, 0, [0])


def _copy_plain(value: Any, path: str, depth: int, seen: list[int]) -> Any:
    seen[0] += 1
    if depth > DEEPEST:
        raise TokenCreditError(f"{path.partition('.')[0]} is nested more than {DEEPEST} levels deep")
    if seen[0] > MOST_VALUES:
        raise TokenCreditError(f"the config holds more than {MOST_VALUES:,} values")
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        keys = [_text_key(key, path) for key in value]
        return {key: _copy_plain(value[key], f"{path}.{key}", depth + 1, seen) for key in keys}
    if isinstance(value, list | tuple):
        return [_copy_plain(item, path, depth + 1, seen) for item in value]
    raise TokenCreditError(f"{path} holds {shown(value)}, which YAML reads as {type(value).__name__}", hint="quote it")


def _text_key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise TokenCreditError(f"{path} has the key {shown(key)}; a key must be a text", hint="quote it")
    return key


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value can stand for a field of this annotation; an annotation unknown here accepts everything."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    kind = origin or hint
    if kind in (bool, str, dict, list) or kind is type(None):
        return isinstance(value, kind)
    if kind is int:
        return is_whole(value, -LARGEST)
    if kind is float:
        return is_number(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return isinstance(value, str)
    return True


def words_of(hint: Any) -> str:
    """An annotation in the words of a config."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    said = [names.get(get_origin(part) or part, "") for part in parts if part is not type(None)]
    said += ["a list"] * any(get_origin(part) is list or part is list for part in parts)
    said += ["null"] * (type(None) in parts)
    return " or ".join(dict.fromkeys(part for part in said if part)) or "another type"


class Reward(NamedTuple):
    """One reward of a run: a function as module:function, or a reward model by folder or hub name, and its weight."""

    name: str
    weight: float


def reward_list(given: Any) -> list[Reward]:
    """Read `reward:` in any of its forms.

    Accepted are a text, a list of texts, a mapping from names to weights, and a list of `{reward: name, weight: w}`.
    Null means no reward.
    """
    if given is None:
        return []
    if isinstance(given, Mapping) and "reward" not in given:
        rewards = [_reward({"reward": name, "weight": weight}) for name, weight in given.items()]
    elif isinstance(given, str | Mapping):
        rewards = [_reward(given)]
    elif isinstance(given, Sequence):
        rewards = [_reward(item) for item in given]
    else:
        rewards = []
    if not rewards:
        raise TokenCreditError(
            f"`reward` must be a name, a list or a mapping of weights, got {shown(given)}", hint="module:function"
        )
    names = [reward.name for reward in rewards]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise TokenCreditError(f"the reward {repeated!r} is named twice", hint="name it once, with a weight")
    return rewards


def _reward(item: Any) -> Reward:
    if isinstance(item, str):
        item = {"reward": item}
    if not isinstance(item, Mapping) or "reward" not in item:
        raise TokenCreditError(f"a reward must be a name or {{reward: …, weight: …}}, got {shown(item)}")
    for key in item:
        if key not in ("reward", "weight"):
            raise unknown("key of a reward", key, ("reward", "weight"))
    name, weight = item["reward"], item.get("weight", 1.0)
    if not TEXT.accepts(name):
        raise TokenCreditError(
            f"a reward must be named by a text, got {shown(name)}", hint="module:function, or a reward model"
        )
    if not is_number(weight):
        raise TokenCreditError(f"the weight of the reward {name!r} must be a number, got {shown(weight)}")
    return Reward(name, float(weight))
