"""The `reward:` key of a config, in all its forms."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokencredit.errors import TokenCreditError, shown, unknown
from tokencredit.settings import is_number

FORMS = "module:function, or a reward model"


class Reward(NamedTuple):
    """One reward of a run: a function as module:function, or a reward model by folder or hub name, and its weight."""

    name: str
    weight: float


def parse_rewards(value: Any) -> tuple[Reward, ...]:
    """Read `reward:` in any of its forms.

    Accepted are a text, a list of texts, a mapping from names to weights, and a list of `{reward: name, weight: w}`.
    Null means no reward.
    """
    if value is None:
        return ()
    items: Sequence[Any] = ()
    if isinstance(value, Mapping) and "reward" not in value:
        items = [{"reward": name, "weight": weight} for name, weight in value.items()]
    elif isinstance(value, str | Mapping):
        items = [value]
    elif isinstance(value, Sequence):
        items = value
    if not items:
        raise TokenCreditError(
            f"`reward` must be a name, a list or a mapping of weights, got {shown(value)}", hint="module:function"
        )
    rewards = tuple(_parse_item(item) for item in items)
    names = [reward.name for reward in rewards]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise TokenCreditError(f"the reward {repeated!r} is named twice", hint="name it once, with a weight")
    return rewards


def _parse_item(item: Any) -> Reward:
    if isinstance(item, str):
        item = {"reward": item}
    if not isinstance(item, Mapping) or "reward" not in item:
        raise TokenCreditError(f"a reward must be a name or {{reward: …, weight: …}}, got {shown(item)}")
    for key in item:
        if key not in ("reward", "weight"):
            raise unknown("key of a reward", key, ("reward", "weight"))
    name, weight = item["reward"], item.get("weight", 1.0)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise TokenCreditError(f"a reward must be named by a text, got {shown(name)}", hint=FORMS)
    if not is_number(weight):
        raise TokenCreditError(f"the weight of the reward {name!r} must be a number, got {shown(weight)}")
    return Reward(name, float(weight))
