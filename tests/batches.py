"""Batches and cases that the tests share: random but seeded, with holes, ragged rows and groups of several sizes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from tokencredit.batch.masked import response_lengths
from tokencredit.batch.records import OPTIONAL_FIELDS, TOKEN_FIELDS, TokenBatch
from tokencredit.methods.spec import MethodSpec
from tokencredit.methods.table import estimators, transforms
from tokencredit.seeds import generator

GROUP_SIZES = (4, 3, 1, 3)
RAGGED = (12, 7, 9, 0, 3, 12, 1, 5, 12, 2, 8)  # one row is empty; the columns behind are padding


def make_batch(
    *,
    seed: int = 0,
    groups: Sequence[int] = GROUP_SIZES,
    response: int = 12,
    holes: bool = True,
    host_advantages: bool = False,
    without: Sequence[str] = (),
    **given: Any,
) -> TokenBatch:
    """A batch with every optional field filled but the host's advantages, `without` some; `given` replaces fields.

    Rows of a group are not neighbours, group ids are neither sorted nor consecutive, rewards are 0 or 1 and all
    equal in the last group. `host_advantages=True` fills those of the host as well.
    """
    rng = generator("tests", "batch", seed)
    group_ids = torch.cat([torch.full((size,), 17 * k - 20 * (k % 2)) for k, size in enumerate(groups)])
    rows = len(group_ids)
    lengths = torch.tensor([RAGGED[i % len(RAGGED)] for i in range(rows)]).clamp(max=response)
    mask = torch.arange(response) < lengths[:, None]
    if holes:
        mask &= torch.rand(rows, response, generator=rng) > 0.25
        mask[0, 0] = True
    rewards = (torch.rand(rows, generator=rng) < 0.5).float()
    rewards[:3] = torch.tensor([1.0, 0.0, 0.0])[:rows]
    rewards[group_ids == group_ids[-1]] = 1.0
    contents: dict[str, Any] = {
        "response_ids": torch.randint(0, 1000, (rows, response), generator=rng),
        "response_mask": mask,
        "rewards": rewards,
        "group_ids": group_ids,
        "step_ids": (torch.rand(rows, response, generator=rng) < 0.4).long().cumsum(1),
        "progress": 0.25,
        "step": 20,
    }
    contents |= {name: _token_field(name, (rows, response), rng) for name in TOKEN_FIELDS}
    per_response = [name for name in OPTIONAL_FIELDS if name not in (*TOKEN_FIELDS, "host_advantages")]
    contents |= {name: 1.0 + torch.rand(rows, generator=rng) for name in per_response}
    if host_advantages:
        contents["host_advantages"] = torch.randn(rows, generator=rng)
    order = torch.randperm(rows, generator=rng)
    shuffled = {name: value[order] if isinstance(value, Tensor) else value for name, value in contents.items()}
    kept = {name: value for name, value in shuffled.items() if name not in without}
    return TokenBatch(**(kept | given))


def _token_field(name: str, shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    exponential = -torch.log(1.0 - torch.rand(shape, generator=rng))  # right-skewed, as entropies are
    if name.endswith("logprobs"):
        return -exponential
    return torch.rand(shape, generator=rng) * 0.9 + 0.05 if name == "values" else exponential


def fill_outside(batch: TokenBatch, value: float | Tensor) -> TokenBatch:
    """`batch` with `value` (or one value a column) in every token field outside the mask, and with other ids there."""
    changed = {}
    for name, tensor in batch.tensors().items():
        if tensor.ndim == 2 and tensor.is_floating_point():
            changed[name] = torch.where(batch.response_mask, tensor, value)
    for name in ("response_ids", "step_ids"):
        ids = getattr(batch, name)
        if ids is not None:
            changed[name] = torch.where(batch.response_mask, ids, 123_456_789 - ids)
    return replace(batch, **changed)


def permuted(batch: TokenBatch, order: Tensor) -> TokenBatch:
    """The rows of `batch` in another order, or some of them."""
    return replace(batch, **{name: tensor[order] for name, tensor in batch.tensors().items()})


def widened(batch: TokenBatch, columns: Tensor, response: int) -> TokenBatch:
    """`batch` with its columns moved to `columns` of a wider one; what lies between is unchosen, NaN and garbage."""
    changed = {}
    for name, tensor in batch.tensors().items():
        if tensor.ndim == 2:
            blank = torch.nan if tensor.is_floating_point() else (False if tensor.dtype == torch.bool else 987)
            wide = torch.full((tensor.shape[0], response), blank, dtype=tensor.dtype)
            wide[:, columns] = tensor
            changed[name] = wide
    return replace(batch, **changed)


def token_advantages(batch: TokenBatch) -> Tensor:
    """Advantages that differ between the tokens of a response, for trying a transform; of either sign, some 0.

    They are a function of the batch's rewards, groups and ids alone, so that they move along with rows and columns.
    """
    rewards = batch.rewards.detach().double()
    same = batch.group_ids[:, None] == batch.group_ids
    centred = rewards - (same * rewards).sum(1) / same.sum(1)
    return 3.0 * centred[:, None] * (0.5 + (batch.response_ids * 0.618034) % 1.0)


class Case:
    """One row of the tables at one choice of hyperparameters."""

    def __init__(self, kind: str, name: str, spec: MethodSpec, given: Mapping[str, Any]) -> None:
        self.kind, self.name, self.spec, self.given = kind, name, spec, dict(given)

    def __repr__(self) -> str:
        return "-".join((self.name, *(f"{key}={value}" for key, value in self.given.items())))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return self.spec.defaults | self.given

    @property
    def steps(self) -> tuple[Any, ...]:
        """The steps of a pipeline that ends in this case."""
        own = {self.name: self.given}
        return (own,) if self.kind == "estimator" else ("group_normalized", own)

    def raw(
        self, batch: TokenBatch, advantages: Tensor | None = None, *, base: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """What the function itself returns, as `assign_credit` would call it but with nothing around it."""
        advantages = token_advantages(batch) if advantages is None else advantages
        supplied: dict[str, Any] = self.hyperparameters
        if self.spec.draws:
            supplied["generator"] = generator("tests", "draws", seed)
        if self.spec.takes_base:
            # The estimator's result, with another mass than the advantages have.
            supplied["base"] = 1.7 * token_advantages(batch) if base is None else base
        inputs = (batch,) if self.kind == "estimator" else (advantages, batch)
        return self.spec.fn(*inputs, **supplied)


def all_cases() -> list[Case]:
    """Every row of both tables at its defaults and at every choice, switch and end of a closed domain."""
    tables: dict[str, Callable[[], Mapping[str, MethodSpec]]] = {"estimator": estimators, "transform": transforms}
    return [
        Case(kind, name, spec, given)
        for kind, table in tables.items()
        for name, spec in table().items()
        for given in _variants(spec)
    ]


def _variants(spec: MethodSpec) -> list[dict[str, Any]]:
    annotations = get_type_hints(spec.fn, include_extras=True)
    found: list[dict[str, Any]] = [{}]
    for name, default in spec.defaults.items():
        annotation = annotations[name]
        choices: list[Any] = []
        if get_origin(annotation) is Literal:
            choices = list(get_args(annotation))
        elif annotation is bool:
            choices = [True, False]
        elif name in spec.domains:
            number = int if annotation in (int, int | None) else float
            choices = [number(end) for end in _closed_ends(spec.domains[name])]
        found += [{name: choice} for choice in choices if choice != default]
    return found


def _closed_ends(domain: str) -> list[float]:
    low, high = (float(end) for end in domain[1:-1].split(","))
    return [*([low] if domain[0] == "[" else []), *([high] if domain[-1] == "]" else [])]


def empty_like(batch: TokenBatch) -> TokenBatch:
    """The same batch with no chosen token at all."""
    return replace(batch, response_mask=torch.zeros_like(batch.response_mask))


def tokens_of(batch: TokenBatch) -> int:
    """Number of chosen tokens."""
    return int(response_lengths(batch.response_mask).sum())


def field_names() -> frozenset[str]:
    """Names of all fields of a batch."""
    return frozenset(item.name for item in fields(TokenBatch))
