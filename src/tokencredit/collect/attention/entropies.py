"""Attention entropies of a Hugging Face model during an ordinary forward pass: no [heads, T, T], no patched model.

An attention function is registered with transformers' `AttentionInterface`; it sees queries and keys after norms and
rotary embeddings, takes what it is asked for from the layers it is asked about, and hands on to the model's own
attention. The mask that the model built is the truth: padding, sliding windows, chunks, packed sequences are in it.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokencredit.collect.attention.parts import AttentionRows, Context, Heads, Visibility
from tokencredit.collect.attention.rows import row_statistics
from tokencredit.collect.logprobs import layout_pass
from tokencredit.collect.models import backbone_of, causal_of, eval_mode
from tokencredit.collect.rollout import Sequences, takes
from tokencredit.errors import TokenCreditError

NAME = "tokencredit_rows"
SEEN = -1e4  # an additive mask hides what lies below

Measure = Callable[[AttentionRows], Any]
Place = Literal["predicting", "own"]  # of a token: the row that predicts it, or its own


@dataclass
class AttentionProbe:
    """What to take from which layers; `found[layer]` holds one result per forward call."""

    layers: tuple[int, ...]
    measure: Measure
    original: str
    stop_early: bool
    with_grad: bool = False
    found: dict[int, list[Any]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every layer has answered, for early stopping."""
        return set(self.layers) == set(self.found)


_ACTIVE: ContextVar[AttentionProbe | None] = ContextVar("tokencredit_attention_probe", default=None)


class EnoughError(Exception):
    """Raised inside the forward pass once the last wanted layer has answered."""


@takes(Sequences, after=1)
@torch.no_grad()
def attention_entropies(
    model: nn.Module,
    sequences: Sequences,
    layer: int | Sequence[int] | None = None,
    heads: Heads = "mean_rows",
    drop_sink: int = 0,
    row: Place = "predicting",
    context: Context = "visible",
    stop_early: bool = True,
) -> Float[Tensor, "batch response"]:
    """Ê of each response token, in [0, 1]: one no-grad pass up to the layer, in eval mode.

        Ê_t = −Σ_s ā_{t,s} ln ā_{t,s} / ln N_t,   ā the attention row averaged over the heads, N_t the keys it sees

    * `layer`: zero-based; None is the middle one, ⌊L/2⌋ (in hybrids the nearest with full attention); a list is
      averaged.
    * `row`: "predicting" is the row that predicts the token, at prompt_length − 1 + t; "own" the token's own.
    * `heads`, `drop_sink`, `context`: see `row_statistics`. Columns that are padding are 0.
    * `stop_early` leaves the pass after the last wanted layer; turn it off under FSDP, whose hooks want the whole pass.
    """
    before = 1 if row == "predicting" else 0
    columns = sequences.response_columns
    rows = slice(columns.start - before, columns.stop - before)

    def measure(seen: AttentionRows) -> Tensor:
        attention = replace(seen, rows=rows)
        return row_statistics(attention, heads=heads, drop_sink=drop_sink, context=context).entropies

    return torch.stack(probed_pass(model, sequences, _layers(model, layer), measure, stop_early)).mean(0)


@contextmanager
def tap_entropies(
    model: nn.Module,
    response_length: int,
    *,
    layer: int | Sequence[int] | None = None,
    heads: Heads = "mean_rows",
    drop_sink: int = 0,
    row: Place = "predicting",
    context: Context = "visible",
) -> Iterator[list[Float[Tensor, "batch response"]]]:
    """Inside, every pass of the model is measured, with gradients or without; the list is filled at the end.

    One entry a pass, what `attention_entropies` gives for the last `response_length` columns of its rows. Put it around
    a pass that a host runs anyway. Dropout of that pass is in the numbers.
    """
    before = 1 if row == "predicting" else 0

    def measure(seen: AttentionRows) -> Tensor:
        width = seen.query.shape[2]
        attention = replace(seen, rows=slice(width - response_length - before, width - before))
        return row_statistics(attention, heads=heads, drop_sink=drop_sink, context=context).entropies

    with _tapped(model, _layers(model, layer), measure) as found:
        yield found


@contextmanager
def tap_spans(
    model: nn.Module,
    spans: Sequence[tuple[int, int, int]],
    *,
    layer: int | Sequence[int] | None = None,
    heads: Heads = "mean_rows",
    drop_sink: int = 0,
    row: Place = "predicting",
    context: Context = "visible",
) -> Iterator[list[Float[Tensor, " token"]]]:
    """`tap_entropies` for sequences that lie anywhere: `spans` are (row, first, stop) of each, packed or padded.

    One flat entry a pass, the spans one after another; place i of a span holds Ê of token i + 1, as a host's log-probs
    do, and its last place means nothing. A span sees itself alone, whatever the host's kernel is told of packing.
    """

    def measure(seen: AttentionRows) -> Tensor:
        parts = []
        for index, first, stop in spans:
            own = Visibility(*(_of_span(plane, index, first, stop) for plane in seen.visibility))
            near, far = (x[index : index + 1, :, first:stop] for x in (seen.query, seen.key))
            span = replace(seen, query=near, key=far, visibility=own)
            part = row_statistics(span, heads=heads, drop_sink=drop_sink, context=context).entropies[0]
            parts.append(part.roll(-1) if row == "own" else part)
        return torch.cat(parts)

    with _tapped(model, _layers(model, layer), measure) as found:
        yield found


@contextmanager
def _tapped(model: nn.Module, layers: Sequence[int], measure: Measure) -> Iterator[list[Tensor]]:
    """What `measure` says of every pass, the mean over the layers; the list is filled at the end."""
    found: list[Tensor] = []
    with probe_attention(model, layers, measure, with_grad=True) as probe:
        yield found
    found += [torch.stack(answers).mean(0) for answers in zip(*(probe.found[index] for index in layers), strict=True)]


def _of_span(plane: Callable[..., Tensor] | None, index: int, first: int, stop: int) -> Callable[..., Tensor] | None:
    """The part of a mask that lies inside one span."""
    if plane is None:
        return None
    return lambda _, rows: plane(index, slice(rows.start + first, rows.stop + first))[..., first:stop]


@contextmanager
def probe_attention(
    model: nn.Module, layers: Sequence[int], measure: Measure, *, stop_early: bool = False, with_grad: bool = False
) -> Iterator[AttentionProbe]:
    """Inside, every forward of the model also calls `measure(rows)` at the layers, with an `AttentionRows` of all rows.

    The outputs of the model are its own, and gradients are untouched: a forward that has gradients on is measured only
    `with_grad`, and then without gradients. A backward must lie outside: with checkpointing it runs layers again. Use
    it around a forward that is run anyway; then `stop_early` must be False.
    """
    usable = attention_layers(model)
    for layer in layers:
        if layer not in usable:
            raise TokenCreditError(
                f"layer {layer} has no attention rows to take; layers that have: {list(usable)}",
                hint="indices are zero-based; linear-attention and state-space layers have no such rows",
            )
    config = usable[layers[0]].config
    if not hasattr(config, "_attn_implementation"):
        raise TokenCreditError(f"{type(model).__name__} does not use transformers' AttentionInterface")
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _make_mask)
    probe = AttentionProbe(tuple(layers), measure, config._attn_implementation, stop_early, with_grad)
    token = _ACTIVE.set(probe)
    config._attn_implementation = NAME
    try:
        yield probe
    finally:
        config._attn_implementation = probe.original
        _ACTIVE.reset(token)
    if not probe.complete:
        missing = sorted(set(probe.layers) - set(probe.found))
        raise TokenCreditError(
            f"no attention was seen at layers {missing}",
            hint="run a forward without gradients inside the probe, of a model that uses the AttentionInterface",
        )


def probed_pass(
    model: nn.Module, sequences: Sequences, layers: Sequence[int], measure: Measure, stop_early: bool = True
) -> list[Any]:
    """What `measure` gives at each of the layers, from one pass in eval mode up to the last of them.

    `stop_early` leaves the pass after the last wanted layer; turn it off under FSDP, whose hooks want the whole pass.
    """
    one = layout_pass(model, sequences)
    with (
        eval_mode(model),
        probe_attention(model, layers, measure, stop_early=stop_early) as probe,
        suppress(EnoughError),
    ):
        one.run(model)
    return [answers[0] for answers in probe.found.values()]


def attention_layers(model: nn.Module) -> dict[int, Any]:
    """Modules with softmax attention that the probe can reach, by layer index, in order.

    Such a module has a layer index and a config of its own, and its forward calls transformers' AttentionInterface.
    Names of classes say nothing: linear-attention and state-space layers carry "Attention" in theirs too.
    """
    modules = [
        module
        for module in backbone_of(model).modules()
        if isinstance(getattr(module, "layer_idx", None), int) and _uses_interface(type(module).forward)
    ]
    found = {module.layer_idx: module for module in modules if hasattr(module, "config")}
    if not found or min(found) < 0:
        raise TokenCreditError(
            f"{type(causal_of(model)).__name__} has no attention layers whose rows can be read: they must use "
            "transformers' AttentionInterface and know their index",
            hint="use a method that needs no attention, or a collector of your own",
        )
    return dict(sorted(found.items()))


@cache
def _uses_interface(forward: Callable[..., Any]) -> bool:
    """Whether the forward of a module asks the AttentionInterface for its attention function."""
    function = inspect.unwrap(forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(function, "__code__", None), "co_names", ())


def full_layers(model: nn.Module) -> list[int]:
    """Indices of the layers with full attention; of all layers with attention where none is full."""
    usable = attention_layers(model)
    kinds = getattr(next(iter(usable.values())).config, "layer_types", None) or []
    full = [layer for layer in usable if layer < len(kinds) and kinds[layer] == "full_attention"]
    return full or list(usable)


def middle_layer(model: nn.Module) -> int:
    """⌊L/2⌋, or in models that mix kinds of layers the nearest with full attention, else the nearest with any."""
    middle = causal_of(model).config.get_text_config().num_hidden_layers // 2
    return min(full_layers(model), key=lambda layer: (abs(layer - middle), layer))


def _layers(model: nn.Module, layer: int | Sequence[int] | None) -> tuple[int, ...]:
    if layer is None:
        return (middle_layer(model),)
    return (layer,) if isinstance(layer, int) else tuple(layer)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered function. Checkpointed layers run twice, the second time with gradients on: measured once."""
    probe = _ACTIVE.get()
    if probe is None:
        raise TokenCreditError(f"the attention {NAME!r} works inside `probe_attention` only")
    layer = getattr(module, "layer_idx", None)
    if layer in probe.layers and (probe.with_grad or not torch.is_grad_enabled()):
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        sizes = query.shape[2], key.shape[2]
        visibility = visibility_of(attention_mask, *sizes, probe.original, kwargs, device=query.device)
        seen = AttentionRows(query, key, visibility, scale, kwargs.get("softcap"))
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):  # of the host; it would round scores
            answer = probe.measure(seen)
        probe.found.setdefault(layer, []).append(answer)
        if probe.stop_early and probe.complete:
            raise EnoughError
    with _named(module.config, probe.original):
        return _original(module, probe.original)(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def _named(config: Any, name: str) -> Iterator[None]:
    """The config as the model's own attention knows it: flash attention loads the kernel that is named there."""
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = NAME


def _original(module: nn.Module, name: str) -> Callable[..., Any]:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def _make_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    probe = _ACTIVE.get()
    name = "sdpa" if probe is None else probe.original
    return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, **kwargs)


def visibility_of(
    mask: Any,
    queries: int,
    keys: int,
    implementation: str,
    kwargs: dict[str, Any],
    *,
    device: torch.device | None = None,
) -> Visibility:
    """Reads the model's mask: None, [batch, keys] (flash), or [batch, 1, queries, keys], bool or additive.

    `device` is where the queries lie: a flash kernel that is told a window alone gets no tensor to go by.
    """
    flash = "flash" in implementation
    window = kwargs.get("sliding_window") if flash else None
    packed = kwargs.get("cu_seq_lens_q") if flash else None
    if mask is not None and not isinstance(mask, Tensor):
        raise TokenCreditError(
            f"cannot read the mask of the attention {implementation!r}, a {type(mask).__name__}",
            hint="load the model with attn_implementation='sdpa' or 'eager'",
        )
    if mask is None and window is None and packed is None:
        return Visibility()
    if mask is None or mask.ndim == 2:
        return Visibility(_from_lengths(mask, queries, keys, window, packed, device))
    shared = mask.shape[0] == 1
    plane = lambda sequence, rows: mask[0 if shared else sequence, 0, rows, :keys]  # noqa: E731
    if mask.dtype == torch.bool:
        return Visibility(plane)
    return Visibility(lambda sequence, rows: plane(sequence, rows) > SEEN, plane)


def _from_lengths(
    padding: Tensor | None,
    queries: int,
    keys: int,
    window: int | None,
    packed: Tensor | None,
    device: torch.device | None,
) -> Callable[[int | slice, slice], Tensor]:
    """Visible keys where a flash kernel gets lengths in place of a mask."""

    def visible(sequence: int | slice, rows: slice) -> Tensor:
        own = torch.arange(rows.start, rows.stop, device=device)[:, None] + keys - queries
        other = torch.arange(keys, device=device)[None]
        seen = other <= own
        if window is not None:
            seen = seen & (other > own - window)
        if packed is not None:
            segment = lambda place: torch.searchsorted(packed, place, right=True)  # noqa: E731
            seen = seen & (segment(own) == segment(other))
        if padding is not None:
            real = padding[sequence].bool()
            seen = seen & real[..., None, :keys] & real[..., own[:, 0].clamp_max(keys - 1)].unsqueeze(-1)
        return seen

    return visible
