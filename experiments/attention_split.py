"""Attention entropy on a lab model: what it correlates with, how anchors and explorers split, whose gradient counts.

A0: Pearson of Ê with the policy's entropy, surprisal, position and the attention on the first key, layer by layer; the
two ways of averaging heads, the two rows. A3: the gradient of each fifth of the tokens against the whole gradient, with
random fifths to calibrate. Statics of one model, no training; seeds differ in the rollouts. One thread, a minute.

    python experiments/attention_split.py
    python experiments/attention_split.py --seeds 3 --responses 1024
"""

import argparse
import os
import statistics
import warnings
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from concentration import GROUP, Responses, rollouts
from torch import Tensor

from tokencredit.batch.masked import positions, response_lengths
from tokencredit.batch.records import TokenBatch
from tokencredit.collect.attention.entropies import attention_entropies, attention_layers, middle_layer, probe_attention
from tokencredit.collect.attention.rows import row_statistics
from tokencredit.collect.head.logprobs import head_logprobs
from tokencredit.collect.logprobs import token_logprobs
from tokencredit.collect.models import backbone_of
from tokencredit.lab import data
from tokencredit.lab.model import warm_start
from tokencredit.methods.controls import position_matched_shuffle
from tokencredit.methods.selection import lowest_or_highest
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import get_pipeline
from tokencredit.progress import track
from tokencredit.seeds import generator

SUBSETS = {
    "anchors (20 % lowest Ê)": "anchors",
    "explorers (20 % highest Ê)": "explorers",
    "20 % lowest policy entropy": "predictive_low",
    "20 % highest policy entropy": "predictive_high",
    "first fifth": "first_fifth",
    "last fifth": "last_fifth",
    "front half": "front_half",
    "back half": "back_half",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="countdown")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--draws", type=int, default=8, help="of random fifths")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    correlations: dict[str, list[float]] = {}
    splits: dict[str, list[tuple[float, ...]]] = {}
    for seed in track(range(args.seeds), "seeds"):
        model = data.load_model(warm_start(args.task))
        got = rollouts(model, args.task, args.responses, seed)
        logprobs, entropies = token_logprobs(model, *got.span)
        for name, value in correlate(model, got, logprobs, entropies).items():
            correlations.setdefault(name, []).append(value)
        batch = token_batch(model, got, logprobs, entropies)
        for name, values in geometry(model, got, batch, args.draws, seed).items():
            splits.setdefault(name, []).append(values)
    print(f"{args.task}, {args.responses} responses in groups of {GROUP}, one number per seed")
    for name, values in correlations.items():
        print(f"{name:58s}" + "".join(f"{value:8.3f}" for value in values))
    print(f"\n{'tokens':30s} Ê      policy H  surprisal  place    ‖g_S‖/‖g‖       cos             projection")
    for name, rows in splits.items():
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        spreads = [f"({min(column):.2f}-{max(column):.2f})" for column in list(zip(*rows, strict=True))[4:]]
        cells = [f"{mean:.2f} {spread}" for mean, spread in zip(means[4:], spreads, strict=True)]
        print(f"{name:30s}" + "".join(f"{mean:7.3f}  " for mean in means[:4]) + "  " + "  ".join(cells))


def token_batch(model: Any, got: Responses, logprobs: Tensor, entropies: Tensor) -> TokenBatch:
    return TokenBatch(
        response_ids=got.ids,
        response_mask=got.mask,
        rewards=got.correct,
        group_ids=torch.arange(len(got.ids)) // GROUP,
        old_logprobs=logprobs,
        entropies=entropies,
        attention_entropies=attention_entropies(model, *got.span),
        progress=0.0,
    )


def correlate(model: Any, got: Responses, logprobs: Tensor, entropies: Tensor) -> dict[str, float]:
    """Pearson over the chosen tokens, and how far the anchors of two definitions overlap."""
    mask = got.mask
    place = positions(mask).float() / response_lengths(mask)
    found = {}
    for layer in attention_layers(model):
        kinds = {"": {}, ", mean of head entropies": {"heads": "mean_entropy"}, ", own row": {"row": "own"}}
        rows = {kind: _entropies(model, got, layer, options) for kind, options in kinds.items()}
        rows[", sink dropped"] = _entropies(model, got, layer, {"drop_sink": 1})
        middle = " (middle)" if layer == middle_layer(model) else ""
        head = f"layer {layer}{middle}: Ê with "
        others = {"policy entropy": entropies, "surprisal": -logprobs, "place in the response": place}
        others["attention on the first key"] = sink_mass(model, got, layer)
        for name, other in others.items():
            found[head + name] = pearson(rows[""][mask], other[mask])
        for kind in list(rows)[1:]:
            found[head + "Ê" + kind] = pearson(rows[""][mask], rows[kind][mask])
        low = [lowest_or_highest(rows[kind], mask, 0.2, "low") for kind in ("", ", mean of head entropies")]
        found[f"layer {layer}{middle}: anchors shared by both averages"] = float((low[0] & low[1]).sum() / low[0].sum())
    return found


def _entropies(model: Any, got: Responses, layer: int, options: dict[str, Any]) -> Tensor:
    return attention_entropies(model, *got.span, layer=layer, **options)


@torch.no_grad()
def sink_mass(model: Any, got: Responses, layer: int) -> Tensor:
    rows = slice(got.prompt_length - 1, got.prompt_length - 1 + got.ids.shape[1])
    measure = lambda seen: row_statistics(replace(seen, rows=rows))  # noqa: E731
    with probe_attention(model, [layer], measure) as probe:
        model(got.sequences, attention_mask=got.attention_mask)
    return probe.found[layer][0].sink_mass


def pearson(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((x.double(), y.double())))[0, 1])


def geometry(model: Any, got: Responses, batch: TokenBatch, draws: int, seed: int) -> dict[str, tuple[float, ...]]:
    """Mean signals of each subset, then norm ratio, cosine and projection of its gradient against the whole one.

    Every gradient divides by all tokens: the "all" normaliser, the same for all subsets.
    """
    whole = gradient(model, got, assign_credit(get_pipeline("grpo"), batch))
    found = {}
    for name, preset in SUBSETS.items():
        found[name] = _row(model, got, batch, assign_credit(get_pipeline(preset, normalize="all"), batch), whole)
    random = [
        _row(
            model,
            got,
            batch,
            assign_credit(get_pipeline("random_tokens", normalize="all"), batch, generator=draw),
            whole,
        )
        for draw in (generator("attention split", seed, index) for index in range(draws))
    ]
    found["random 20 %"] = tuple(statistics.mean(column) for column in zip(*random, strict=True))
    shares = position_matched(batch, seed)
    found["anchors, position-matched"] = _row(model, got, batch, shares, whole)
    return found


def position_matched(batch: TokenBatch, seed: int) -> Tensor:
    """Anchors of a signal that was permuted over the batch within tenths of the response."""
    shuffled = position_matched_shuffle(batch, generator=generator("matched", seed))
    return assign_credit(get_pipeline("anchors", normalize="all"), replace(batch, attention_entropies=shuffled))


def _row(model: Any, got: Responses, batch: TokenBatch, credit: Tensor, whole: Tensor) -> tuple[float, ...]:
    kept = credit != 0
    signals = (batch.attention_entropies, batch.entropies, -batch.old_logprobs)
    place = positions(got.mask).double() / response_lengths(got.mask)
    means = [float(signal[kept].double().mean()) for signal in (*signals, place)]
    part = gradient(model, got, credit)
    size, cosine = float(part.norm() / whole.norm()), float(part @ whole / (part.norm() * whole.norm()))
    return (*means, size, cosine, size * cosine)


def gradient(model: Any, got: Responses, credit: Tensor) -> Tensor:
    """Gradient of the policy objective with this credit, over all parameters, divided by the number of tokens."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    states = backbone_of(model)(input_ids=got.sequences, attention_mask=got.attention_mask).last_hidden_state
    rows = states[:, got.prompt_length - 1 : got.prompt_length - 1 + got.ids.shape[1]][got.mask]
    logprobs, _ = head_logprobs(rows, model.get_output_embeddings().weight, got.ids[got.mask])
    loss = (logprobs * credit[got.mask]).sum() / got.mask.sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()


if __name__ == "__main__":
    main()
