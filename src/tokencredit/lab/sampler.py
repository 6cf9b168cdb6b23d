"""Sampling from a small Qwen3 or Llama model: a key-value-cache loop that also returns what it knows about each token.

It reads the live weights of the model and no more: module hooks do not fire and dropout is off. Anything that the loop
does not know is refused by `unsupported`, and Hugging Face `generate` remains the way to sample from it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokencredit.errors import TokenCreditError

MODEL_TYPES = ("llama", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose angles do not depend on the length of the text
LAB_VOCABULARY = 256  # the lab's tokenizers know single characters
COMPACT_BELOW = 0.875  # share of unfinished rows under which the finished ones are dropped from the cache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Sampled responses; `mask` is True up to and including the end token, everything outside is padding."""

    ids: Int[Tensor, "batch response"]
    mask: Bool[Tensor, "batch response"]
    logprobs: Float[Tensor, "batch response"]  # nats, at the sampling temperature; 0 outside the mask
    entropies: Float[Tensor, "batch response"]  # nats, over the whole vocabulary; 0 outside the mask


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one block; q, k, v and gate, up are stacked so that each pair of steps is one product."""

    input_norm: Tensor
    qkv: tuple[Tensor, Tensor | None]
    cos: Tensor  # [position, heads + kv_heads, head_dim], the norm weights of q and k and the score scale folded in
    sin: Tensor
    out: tuple[Tensor, Tensor | None]
    mlp_norm: Tensor
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    act: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Weights:
    embed: Tensor
    layers: list[_Layer]
    norm: Tensor
    head: tuple[Tensor, Tensor | None]
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qk_normed: bool


# One (keys [row, kv_head, head_dim, position], values [row, kv_head, position, head_dim]) for each layer.
# Keys lie transposed: the batched product q·kᵀ then reads them in order.
_Cache = list[tuple[Tensor, Tensor]]


def unsupported(model: nn.Module) -> str | None:
    """Why `sample` cannot run this model, or None if it can."""
    base = _base(model)
    config = getattr(base, "config", None)
    kind = getattr(config, "model_type", type(base).__name__)
    if kind not in MODEL_TYPES:
        return f"model type {kind!r} is not one of {', '.join(MODEL_TYPES)}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        return f"rope type {rope!r} is not one of {', '.join(ROPE_TYPES)}"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "the model has layers with sliding-window attention"
    linears = [m for layer in base.model.layers for m in (*_projections(layer.self_attn), *_projections(layer.mlp))]
    odd = next((m for m in (*linears, base.lm_head) if not _is_plain(m)), None)
    if odd is not None:
        return f"a projection is a {type(odd).__name__}, neither a linear layer nor plain LoRA"
    return _unread_module(model, base, [*linears, base.lm_head])


def is_lab_model(model: nn.Module) -> bool:
    """Whether `build_model` made this model (or LoRA was put on one that it made).

    `sampler: auto` takes this sampler only for such models. On any other model the host samples, in the precision and
    with the kernels that the policy is trained with. Only the config is read, so a saved and reloaded model counts.
    """
    config = getattr(_base(model), "config", None)
    return (
        getattr(config, "model_type", None) == "qwen3"
        and (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, None)
        and config.tie_word_embeddings
        and config.max_position_embeddings == 512
        and config.vocab_size < LAB_VOCABULARY
    )


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token id that ends a response: that of the tokenizer, and those of the model's generation config.

    A chat model often ends its turn with another token than the tokenizer's EOS. This is the rule of TRL and of Hugging
    Face `generate`.
    """
    declared = getattr(getattr(_base(model), "generation_config", None), "eos_token_id", None)
    ids = [declared] if isinstance(declared, int) else list(declared or ())
    own = getattr(getattr(tokenizer, "tokenizer", tokenizer), "eos_token_id", None)  # a processor holds a tokenizer
    ids = ids if own is None or own in ids else [own, *ids]
    if not ids:
        raise TokenCreditError(
            "neither the tokenizer nor the model's generation config names a token that ends a response",
            hint="set `tokenizer.eos_token`, or `eos_token_id` in generation_config.json",
        )
    return [int(token) for token in ids]


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt_ids: Int[Tensor, "prompts prompt"],
    prompt_mask: Bool[Tensor, "prompts prompt"] | Int[Tensor, "prompts prompt"],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    generator: torch.Generator,
    temperature: float = 1.0,
    num_return: int | Sequence[int] = 1,
) -> Samples:
    """Sample `num_return` responses to each left-padded prompt (one number for all, or one for each prompt).

        token = min { v : Σ_{w ≤ v} π(w) > u },   u uniform in [0, 1),   π = softmax(logits / temperature)

    One u for each row and step, drawn at the start from `generator` (on the CPU): a row's text does not depend on when
    other rows end. Responses to one prompt are adjacent rows. `temperature=0` takes the most probable token and reports
    log-probabilities and entropies at temperature 1. Ids outside the mask are the model's padding id.
    """
    _check(model, prompt_mask, temperature)
    base = _base(model)
    repeats = torch.as_tensor(num_return, device=prompt_ids.device).expand(len(prompt_ids))
    weights = _read_weights(base, prompt_ids.shape[1] + max_new_tokens)
    draws = torch.rand(int(repeats.sum()), max_new_tokens, generator=generator, dtype=torch.float64)
    ends = torch.as_tensor(eos_token_id, device=prompt_ids.device).reshape(-1)
    pad = base.config.pad_token_id
    samples = _decode(
        weights,
        prompt_ids,
        prompt_mask.bool(),
        repeats,
        _Choice(draws.to(prompt_ids.device), temperature, ends, int(ends[0]) if pad is None else pad),
    )
    if not torch.isfinite(samples.logprobs).all():
        raise TokenCreditError(
            f"the model gave logits that are not finite at temperature {temperature}",
            hint="look for NaN in its weights; a lower learning rate often helps",
        )
    return samples


@dataclass(frozen=True, slots=True)
class _Choice:
    """How a token is chosen, and when a row ends."""

    draws: Tensor  # [row, step] float64
    temperature: float
    ends: Tensor
    pad: int


def _decode(weights: _Weights, prompt_ids: Tensor, prompt_mask: Tensor, repeats: Tensor, choice: _Choice) -> Samples:
    """Prefill each prompt once, copy its cache to its rows, then one token at a time until every row has ended."""
    width, steps, device = prompt_ids.shape[1], choice.draws.shape[1], prompt_ids.device
    shape = (len(choice.draws), steps)
    ids = torch.full(shape, choice.pad, dtype=torch.long, device=device)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    logprobs, entropies = torch.zeros(shape, device=device), torch.zeros(shape, device=device)

    logits, cache = _prefill(weights, prompt_ids, prompt_mask, width + steps)
    source = torch.repeat_interleave(torch.arange(len(prompt_ids), device=device), repeats)
    logits, cache = logits[source], _take(cache, source)
    bias = None if prompt_mask.all() else _padding_bias(prompt_mask, width + steps, logits.dtype)[source]
    rows = torch.arange(len(source), device=device)  # the output row of each row in the cache
    live = torch.ones_like(rows, dtype=torch.bool)
    for step in range(steps):
        token, logprob, entropy = _choose(logits, choice.draws[rows, step], choice.temperature)
        at = rows[live], step
        ids[at], mask[at], logprobs[at], entropies[at] = token[live], True, logprob[live], entropy[live]
        live = live & ~torch.isin(token, choice.ends)
        if step + 1 == steps or not live.any():
            break
        if live.sum() <= COMPACT_BELOW * len(live):
            keep = live.nonzero().squeeze(1)
            token, rows, live = token[keep], rows[keep], live[keep]
            cache = _take(cache, keep)
            bias = None if bias is None else bias[keep]
        logits = _forward(weights, cache, token[:, None], bias, width + step)
    used = int(mask.any(0).sum())
    return Samples(ids=ids[:, :used], mask=mask[:, :used], logprobs=logprobs[:, :used], entropies=entropies[:, :used])


def _take(cache: _Cache, rows: Tensor) -> _Cache:
    return [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in cache]


def _choose(logits: Tensor, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """One token for each row by inverse CDF, its log-probability, and the entropy of the row."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    probs = logprobs.exp()
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        # float32 sums lose the tail of a large vocabulary; `right=True` never picks a token of probability 0.
        cdf = probs.double().cumsum(-1)
        total = cdf[:, -1]
        below = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cdf, below[:, None], right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    return token, logprobs.gather(1, token[:, None]).squeeze(1), torch.special.entr(probs).sum(-1)


def _prefill(weights: _Weights, prompt_ids: Tensor, prompt_mask: Tensor, length: int) -> tuple[Tensor, _Cache]:
    rows, width = prompt_ids.shape
    like = weights.embed
    shape = (rows, weights.kv_heads)
    cache = [
        (like.new_zeros(*shape, weights.head_dim, length), like.new_zeros(*shape, length, weights.head_dim))
        for _ in weights.layers
    ]
    causal = torch.full((width, width), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device).triu(1)
    # A padding query sees padding only. The finite minimum keeps its row finite, and no real token ever reads it.
    bias = torch.minimum(causal, _padding_bias(prompt_mask, width, like.dtype))
    return _forward(weights, cache, prompt_ids, bias, 0), cache


def _padding_bias(prompt_mask: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[row, 1, length]: the lowest number where a prompt is padding, 0 elsewhere."""
    bias = torch.zeros(len(prompt_mask), 1, length, dtype=dtype, device=prompt_mask.device)
    bias[:, 0, : prompt_mask.shape[1]].masked_fill_(~prompt_mask, torch.finfo(dtype).min)
    return bias


def _forward(w: _Weights, cache: _Cache, ids: Tensor, bias: Tensor | None, start: int) -> Tensor:
    """Logits [row, vocab] behind the last of `ids` [row, query], which stand at positions `start`, `start + 1`, …

    Positions count columns, padding included: rotary scores depend on differences of positions alone.
    """
    linear = _linear(ids.device.type == "cpu" and w.embed.dtype == torch.float32)
    stop = start + ids.shape[1]
    x = F.embedding(ids, w.embed)
    for layer, (keys, values) in zip(w.layers, cache, strict=True):
        normed = F.rms_norm(x, x.shape[-1:], layer.input_norm, w.eps)
        qkv = linear(normed, *layer.qkv).unflatten(-1, (-1, w.head_dim))  # [row, query, head, head_dim]
        qk, value = qkv.split([w.heads + w.kv_heads, w.kv_heads], dim=2)
        if w.qk_normed:
            qk = F.rms_norm(qk, (w.head_dim,), None, w.eps)
        turned = qk.roll(w.head_dim // 2, -1)
        qk = torch.addcmul(qk * layer.cos[start:stop], turned, layer.sin[start:stop])
        keys[..., start:stop] = qk[:, :, w.heads :].permute(0, 2, 3, 1)
        values[:, :, start:stop] = value.transpose(1, 2)
        mixed = _attend(qk[:, :, : w.heads], keys[..., :stop], values[:, :, :stop], bias)
        x = x + linear(mixed, *layer.out)
        normed = F.rms_norm(x, x.shape[-1:], layer.mlp_norm, w.eps)
        gate, up = linear(normed, *layer.gate_up).chunk(2, dim=-1)
        x = x + linear(layer.act(gate) * up, *layer.down)
    return F.linear(F.rms_norm(x[:, -1], x.shape[-1:], w.norm, w.eps), *w.head)


def _attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of q [row, query, head, head_dim] over the cache; heads that share keys are one product."""
    rows, n, heads, head_dim = q.shape
    kv_heads, length = keys.shape[1], keys.shape[3]
    q = q.transpose(1, 2).reshape(rows * kv_heads, -1, head_dim)  # [row · kv_head, share · query, head_dim]
    scores = torch.bmm(q, keys.flatten(0, 1))
    if bias is not None:
        scores.view(rows, heads, n, length).add_(bias[:, None, :, :length])
    mixed = torch.bmm(torch.softmax(scores, dim=-1), values.flatten(0, 1))
    return mixed.view(rows, heads, n, head_dim).transpose(1, 2).reshape(rows, n, heads * head_dim)


def _read_weights(base: Any, length: int) -> _Weights:
    """The weights as they are now, adapters included."""
    config, body = base.config, base.model
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    positions = torch.arange(length, device=body.embed_tokens.weight.device)[None]
    cos, sin = (table[0].float() for table in body.rotary_emb(body.embed_tokens.weight, positions))
    sin = torch.cat((-sin[:, : head_dim // 2], sin[:, head_dim // 2 :]), dim=-1)
    layers = [_read_layer(layer, (cos, sin), heads, kv_heads) for layer in body.layers]
    return _Weights(
        embed=body.embed_tokens.weight,
        layers=layers,
        norm=body.norm.weight,
        head=_effective(base.lm_head),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        qk_normed=hasattr(body.layers[0].self_attn, "q_norm"),
    )


def _read_layer(layer: Any, rope: tuple[Tensor, Tensor], heads: int, kv_heads: int) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    cos, sin = rope
    # rope(g ⊙ x) = x ⊙ (g ⊙ cos) + roll(x) ⊙ (roll(g) ⊙ ±sin): the weights g of the q and k norms go into the tables.
    ones = torch.ones(cos.shape[1], device=cos.device)
    scaled = (attention.q_norm.weight.float() if hasattr(attention, "q_norm") else ones) * attention.scaling
    plain = attention.k_norm.weight.float() if hasattr(attention, "k_norm") else ones
    gain = torch.cat((scaled.expand(heads, -1), plain.expand(kv_heads, -1)))  # [heads + kv_heads, head_dim]
    dtype = layer.input_layernorm.weight.dtype
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=_stack(attention.q_proj, attention.k_proj, attention.v_proj),
        cos=(cos[:, None] * gain).to(dtype),
        sin=(sin[:, None] * gain.roll(cos.shape[1] // 2, -1)).to(dtype),
        out=_effective(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=_stack(mlp.gate_proj, mlp.up_proj),
        down=_effective(mlp.down_proj),
        act=mlp.act_fn,
    )


def _stack(*modules: Any) -> tuple[Tensor, Tensor | None]:
    weights, biases = zip(*(_effective(module) for module in modules), strict=True)
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)


def _effective(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer, with its active LoRA adapters added."""
    if isinstance(module, nn.Linear):
        return module.weight, module.bias
    base = module.base_layer
    if module.disable_adapters or module.merged:
        return base.weight, base.bias
    active = [name for name in module.active_adapters if name in module.lora_A]
    return base.weight + sum(module.get_delta_weight(name) for name in active), base.bias


def _unread_module(model: Any, base: Any, projections: list[Any]) -> str | None:
    """Names a part of the model that `sample` would read past.

    Only projections are read together with their adapters. Anything else that PEFT or a user puts around or in place of
    a module (LoRA on the embedding, `modules_to_save`, trainable tokens, soft prompts) would be left out of the samples.
    """
    configs = getattr(model, "peft_config", None) or {}
    if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        return "its adapter adds virtual tokens to the prompt"
    read = {id(module) for projection in projections for module in projection.modules()}
    for name, module in base.named_modules():
        if id(module) not in read and not type(module).__module__.startswith(("transformers.", "torch.")):
            kind = f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"
            return f"{name or 'the model'} is a {kind}, which the sampler does not read"
    return None


def _is_plain(module: Any) -> bool:
    if type(module) is nn.Linear:
        return True
    lora = type(getattr(module, "base_layer", None)) is nn.Linear and hasattr(module, "get_delta_weight")
    return lora and not getattr(module, "lora_variant", None) and not any(getattr(module, "lora_bias", {}).values())


def _projections(block: Any) -> list[Any]:
    return [module for name, module in block.named_children() if name.endswith("_proj")]


def _base(model: Any) -> Any:
    """The causal language model inside a PEFT wrapper; untyped, as its parts are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check(model: nn.Module, prompt_mask: Tensor, temperature: float) -> None:
    if reason := unsupported(model):
        raise TokenCreditError(f"the fast sampler cannot run this model: {reason}", hint="use the model's `generate`")
    if not 0 <= temperature < float("inf"):
        raise TokenCreditError(f"`temperature` must be 0 (greedy) or positive and finite, got {temperature}")
    mask = prompt_mask.bool()
    if not (mask[:, -1].all() and (mask[:, 1:] >= mask[:, :-1]).all()):
        raise TokenCreditError("`prompt_mask` must be padded on the left and hold one token in every row at least")


@functools.cache
def _linear(float32_on_cpu: bool) -> Callable[..., Tensor]:
    """`F.linear`, or oneDNN's where MKL is known to be the slower one: AVX-512 machines of AMD.

    The rule looks at the machine and not at a clock, so that a resumed run rounds as the first one did.
    """
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    capable = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.backends.mkldnn.is_available()
    if not (float32_on_cpu and amd and capable and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return F.linear
    return lambda x, weight, bias=None: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
