"""`tokencredit recipes`: data recipes for SFT on one fixed pool."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencredit.errors import TokenCreditError
from tokencredit.progress import printable

if TYPE_CHECKING:
    from tokencredit.recipes.search.loop import Search

DESCRIPTION = """Search over short programs of filters, dedups and sampling on one fixed pool.

  signals   read the pool and compute its signals        run      materialise one recipe, no training
  search    pay for 15 fine-tune-and-evaluate runs        confirm  fresh seeds on fresh problems
  report    table and a self-contained HTML page          export   the data, or a trainer's config
"""
FAILED, INTERRUPTED = 3, 130


def add_parser(subparsers: Any) -> None:
    """Register the verb and its sub-verbs."""
    parser = subparsers.add_parser(
        "recipes",
        help="data recipes for SFT: signals, run, search, confirm, report, export",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="recipes_verb", required=True, metavar="VERB")
    for add in (_add_signals, _add_run, _add_search, _add_confirm, _add_report, _add_export):
        add(verbs)


def _verb(verbs: Any, name: str, handler: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print JSON to stdout")
    parser.set_defaults(handler=handler)
    return parser


def _add_signals(verbs: Any) -> None:
    parser = _verb(verbs, "signals", _signals, "read a pool (JSONL, Parquet, dataset folder) and compute its signals")
    parser.add_argument("pool", nargs="+", type=Path, help="data files or folders, or a pool folder made before")
    parser.add_argument("--out", type=Path, required=True, help="the pool folder")
    parser.add_argument("--signals", default="len.ws,unigram_entropy", help="comma-separated, such as ppl,ifd,rds,rel")
    parser.add_argument("--model", help="a local model or a name on the hub")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a sample that the model reads")
    parser.add_argument(
        "--queries", action="append", default=[], metavar="TASK=FILE", help="queries of a task, for rel"
    )
    parser.add_argument("--splits", nargs="*", type=Path, default=[], help="problems that no query may repeat")
    parser.add_argument("--sae", type=Path, help="encoder of a sparse autoencoder (safetensors), for the signal sae")
    parser.add_argument("--sae-layer", type=int, default=-1, help="hidden state that it reads; -1 is the last")
    parser.add_argument("--embeddings", type=Path, help="features of your own: .npy in pool order or .npz by id")
    parser.add_argument("--query-embeddings", action="append", default=[], metavar="TASK=FILE")
    parser.add_argument("--column", action="append", default=[], metavar="NAME=FILE", help="a signal of your own")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out bad lines, and samples that the chat template refuses; they are counted and listed",
    )


def _add_run(verbs: Any) -> None:
    parser = _verb(verbs, "run", _run, "materialise a recipe: counts, tokens, state; no training")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--pool", type=Path, required=True, help="the pool folder")
    parser.add_argument("--out", type=Path, help="write train.jsonl and train.ids here")
    parser.add_argument("--trace", action="store_true", help="print what each step keeps")


def _add_search(verbs: Any) -> None:
    parser = _verb(verbs, "search", _search, "search for a recipe; after an interruption the same command goes on")
    parser.add_argument("config", type=Path, help="search file in YAML")
    parser.add_argument("--out", type=Path, help="run folder; runs/<name of the search file> by default")
    parser.add_argument("--budget", type=int)
    parser.add_argument("--policy", choices=("default", "paper", "random", "single"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--resume", action="store_true", help="fail if there is nothing to go on with")
    parser.add_argument("--dry-run", action="store_true", help="materialise the warm-up and print sizes; train nothing")


def _add_confirm(verbs: Any) -> None:
    parser = _verb(verbs, "confirm", _confirm, "fresh seeds on the confirm split for finalist and controls")
    parser.add_argument("run", type=Path)
    parser.add_argument("--finalists", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--split", default="confirm")
    parser.add_argument("--redraw", action="store_true", help="redraw the finalist's random_k with every seed")


def _add_report(verbs: Any) -> None:
    parser = _verb(verbs, "report", _report, "table on stdout and report.html in the run folder")
    parser.add_argument("run", type=Path)


def _add_export(verbs: Any) -> None:
    parser = _verb(verbs, "export", _export, "write the data of a recipe, or a trainer's config for it")
    parser.add_argument("source", type=Path, help="a run folder (its finalist) or a recipe file")
    parser.add_argument("--format", default="jsonl", choices=("jsonl", "ids", "trl", "llamafactory", "axolotl"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--pool", type=Path, help="the pool folder, for a recipe file")
    parser.add_argument("--model", help="what the TRL script trains; by default the model of the pool's signals")


def _pairs(items: Sequence[str], flag: str) -> dict[str, Path]:
    pairs = {}
    for item in items:
        name, _, path = item.partition("=")
        if not name or not path:
            raise TokenCreditError(f"{flag} must be NAME=FILE, got {item!r}")
        pairs[name] = Path(path)
    return pairs


def _show(args: argparse.Namespace, content: Any, lines: Sequence[str]) -> int:
    from tokencredit.recipes.pool.lines import json_line

    if args.json:
        print(json_line(content).decode().rstrip())
    else:
        print("\n".join(map(printable, lines)))
    return 0


def _signals(args: argparse.Namespace) -> int:
    from tokencredit.files import lock_folder

    with lock_folder(args.out):
        return _signals_in(args)


def _signals_in(args: argparse.Namespace) -> int:
    from tokencredit.recipes.pool.ingest import canonicalise
    from tokencredit.recipes.pool.samples import INDEX, load_pool
    from tokencredit.recipes.signals.computation import Sources, add_column, compute, write_unread

    rejected: list[Any] = []
    if len(args.pool) == 1 and (args.pool[0] / INDEX).is_file():
        if args.pool[0].resolve() != args.out.resolve():
            raise TokenCreditError(f"{args.pool[0]} is a pool folder already", hint=f"pass --out {args.pool[0]}")
        pool = load_pool(args.out)
    else:
        pool, rejected = canonicalise(args.pool, args.out, skip_bad=args.skip_bad)
    sources = Sources(
        model=args.model,
        max_length=args.max_length,
        queries=_pairs(args.queries, "--queries"),
        splits=args.splits,
        embeddings=args.embeddings,
        sae=args.sae,
        sae_layer=args.sae_layer,
        query_embeddings=_pairs(args.query_embeddings, "--query-embeddings"),
        skip_bad=args.skip_bad,
    )
    columns = _pairs(args.column, "--column")
    for name, path in columns.items():  # first: a file that does not fit shows before the pass of a model
        add_column(args.out, pool, name, path)
    written = [*columns, *compute(args.out, pool, [name for name in args.signals.split(",") if name], sources)]
    facts = {"pool": pool.hash, "samples": len(pool), "rejected": len(rejected), "written": written}
    facts["unread"] = len(sources.unread)
    lines = [f"pool {pool.hash[:12]}: {len(pool)} samples, {len(rejected)} bad lines left out"]
    if sources.unread:
        path = write_unread(args.out, sources.unread)
        lines.append(f"{len(sources.unread)} samples have no signals of the model: it refuses them, see {path}")
    lines.append(f"signals written: {', '.join(written) or 'none, all were there'}")
    return _show(args, facts, lines)


def _run(args: argparse.Namespace) -> int:
    from tokencredit.recipes.export import export_subset
    from tokencredit.recipes.program.execute import Executor
    from tokencredit.recipes.program.recipe import load_recipe
    from tokencredit.recipes.program.state import StateReader
    from tokencredit.recipes.signals.store import load_materials

    recipe, written_for = load_recipe(args.recipe)
    materials = load_materials(args.pool)
    if written_for not in {None, materials.pool.hash}:
        print(printable(f"note: {args.recipe} was written for pool {str(written_for)[:12]}"), file=sys.stderr)
    subset = Executor(materials=materials).run(recipe)
    graph = materials.graph(1000) if any(step.op == "semdedup" for step in recipe.steps) else None
    state = StateReader(materials=materials, graph=graph).read(subset.positions)
    tokens = int(materials.pool.words[subset.positions].sum())
    lines = [f"{len(subset)} of {len(materials.pool)} samples, {tokens} words, subset {subset.hash[:12]}"]
    if args.trace:
        lines += [
            f"  {s.op:14s} {s.samples_before:8d} → {s.samples:8d}  {s.seconds:6.3f} s {s.note}" for s in subset.trace
        ]
    relative = {"mean_ifd": "mean.ifd / pool's", "mean_varentropy": "mean.varentropy / pool's"}
    lines += [f"  {relative.get(name, name):24s} {value: .4f}" for name, value in state.items()]
    if args.out:
        export_subset(materials.pool, subset.positions, args.out, "jsonl")
        export_subset(materials.pool, subset.positions, args.out, "ids")
    facts = {"samples": len(subset), "tokens": tokens, "subset_hash": subset.hash, "recipe_hash": subset.recipe_hash}
    return _show(args, facts | {"state": state, "trace": [asdict(step) for step in subset.trace]}, lines)


def _open(folder: Path, overrides: dict[str, Any] | None = None) -> "Search":
    from tokencredit.recipes.search.runs import open_run

    return open_run(folder, overrides)


def _search(args: argparse.Namespace) -> int:
    from tokencredit.files import lock_folder
    from tokencredit.recipes.search.config import load_config
    from tokencredit.recipes.search.runs import CONFIG, dry_run, make_search, save_config

    folder = args.out or Path("runs") / args.config.stem
    overrides = {"budget": args.budget, "policy": args.policy, "seed": args.seed}
    config = load_config(args.config, overrides)
    if args.dry_run:
        draws = dry_run(config, folder)
        line = "{samples:8d} samples  {token_ratio:.3f} of the tokens  {recipe}"
        return _show(args, draws, [line.format(**draw) for draw in draws])
    if args.resume and not (folder / CONFIG).is_file():
        raise TokenCreditError(f"{folder} holds no search to go on with", hint="leave out --resume to start one")
    search = make_search(config, folder)  # before anything is written, so that a refusal leaves nothing behind
    with lock_folder(folder):
        save_config(config, folder)
        try:
            history = search.run()
        except KeyboardInterrupt:
            print(f"stopped; `tokencredit recipes search {args.config} --out {folder}` goes on", file=sys.stderr)
            return INTERRUPTED
    lines = [_history_line(evaluation) for evaluation in history]
    if not any(evaluation.ok for evaluation in history):
        print(printable(f"every evaluation failed: {history[-1].reason}"), file=sys.stderr)
        return FAILED
    finalist = search.finalists(1)[0]
    lines.append(f"finalist: slot {finalist.slot}, {finalist.recipe}")
    lines.append(f"next: tokencredit recipes confirm {folder}")
    return _show(args, {"history": [asdict(e) for e in history], "finalist": finalist.slot}, lines)


def _history_line(e: Any) -> str:
    score = f"{e.score:8.2f}" if e.ok else "  failed"
    return f"{e.slot:3d} {e.kind:8s} {score} {e.samples:8d} samples  {e.recipe}{'' if e.ok else '  ' + e.reason}"


def _confirm(args: argparse.Namespace) -> int:
    from tokencredit.files import lock_folder
    from tokencredit.recipes.confirm import confirm_arms, power_lines, save_summary, standard_arms

    options = {"finalists": args.finalists, "seeds": args.seeds, "redraw": args.redraw or None}
    search = _open(args.run, {name: value for name, value in options.items() if value is not None})
    for line in power_lines(search.config.noise_sd, search.config.confirm.seeds):
        print(line, file=sys.stderr)
    with lock_folder(args.run):
        result = confirm_arms(search, standard_arms(search), search.config.confirm.seeds, args.split)
    if not result.scores()["finalist"]:
        print("every run of the finalist failed", file=sys.stderr)
        return FAILED
    content = save_summary(search, result)
    from tokencredit.recipes.report import confirm_lines

    return _show(args, content, confirm_lines(content))


def _report(args: argparse.Namespace) -> int:
    from tokencredit.recipes.report import build_report, report_lines

    content = build_report(_open(args.run))
    return _show(args, content, report_lines(content))


def _export(args: argparse.Namespace) -> int:
    from tokencredit.recipes.export import PLACEHOLDER, export_subset
    from tokencredit.recipes.program.execute import Executor
    from tokencredit.recipes.program.recipe import load_recipe
    from tokencredit.recipes.signals.store import load_materials

    if args.source.is_dir():
        search = _open(args.source)
        materials, recipe = search.materials, search.finalists(1)[0].recipe
        executor = search.chooser.executor
    else:
        if args.pool is None:
            raise TokenCreditError("a recipe file needs --pool")
        recipe, _ = load_recipe(args.source)
        materials = load_materials(args.pool)
        executor = Executor(materials=materials)
    positions = executor.run(recipe).positions
    paths = export_subset(materials.pool, positions, args.out, args.format, model=args.model)
    if args.format == "trl" and PLACEHOLDER in paths[-1].read_text(encoding="utf-8"):
        print(f"note: the pool knows no model; write its name into {paths[-1]}, or pass --model", file=sys.stderr)
    return _show(args, {"files": [str(path) for path in paths]}, [str(path) for path in paths])
