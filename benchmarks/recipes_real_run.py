"""A real recipe search: a pool of mixed quality, a tiny model, 15 fine-tune-and-evaluate runs, and a confirmation.

    python benchmarks/recipes_real_run.py --out runs/recipes-real

Pool: 20,000 samples from reasoning-gym families, of which about half are clean traces of the three target families; the
rest are wrong traces, duplicates and off-task text. Every subset gets the same number of optimizer steps. Killed at any
point, the same command goes on. Prints the table of the docs.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import reasoning_gym

from tokencredit.diagnostics.stats import seed_interval
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.recipes.confirm import Arm, Confirmation, confirm_arms, save_summary
from tokencredit.recipes.evaluate.sft import SftSettings, fine_tune
from tokencredit.recipes.evaluate.table import make_evaluator
from tokencredit.recipes.pool.ingest import canonicalise
from tokencredit.recipes.pool.samples import load_pool
from tokencredit.recipes.program.recipe import make_recipe
from tokencredit.recipes.report import confirm_lines
from tokencredit.recipes.search.config import SearchConfig, make_config
from tokencredit.recipes.search.loop import Search
from tokencredit.recipes.signals.computation import Sources, compute
from tokencredit.recipes.signals.store import load_materials
from tokencredit.seeds import derive

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
TASKS = ("sum", "reverse", "sort")
SIZES = {"clean": 9600, "wrong": 4400, "copies": 3000, "off-task": 3000}
OFF_TASK = ("caesar_cipher", "leg_counting", "simple_equations")
STEPS, BATCH = 80, 16
SELECTORS: dict[str, dict] = {
    "low perplexity": {"op": "top", "signal": "ppl", "descending": False},
    "IFD": {"op": "top", "signal": "ifd"},
    "entropy": {"op": "top", "signal": "entropy"},
    "high EL2N": {"op": "top", "signal": "el2n"},
    "low EL2N": {"op": "top", "signal": "el2n", "descending": False},
    "relevance": {"op": "top_union", "signals": [f"rel.{task}" for task in TASKS]},
}


def entries(task: str, split: str, count: int) -> list[dict]:
    """Problems of a family; the streams of different splits are independent."""
    names = {"sum": "chain_sum", "reverse": "spell_backward", "sort": "number_sorting"}
    options = {
        "sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        "reverse": {"min_word_len": 3, "max_word_len": 5},
        "sort": {"min_numbers": 3, "max_numbers": 4, "max_decimals": 0},
    }
    name = names.get(task, task)
    seed = derive("real run", task, split) % 2**31
    return list(reasoning_gym.create_dataset(name, size=count, seed=seed, **options.get(task, {})))


def trace(task: str, entry: dict) -> tuple[str, str, str]:
    """Prompt, worked response and answer."""
    if task == "sum":
        terms = entry["question"].split(":")[-1].strip().rstrip("=").split()
        total, steps = int(terms[0]), []
        for sign, number in zip(terms[1::2], terms[2::2], strict=True):
            after = total + int(number) if sign == "+" else total - int(number)
            steps.append(f"{total}{sign}{number}={after}")
            total = after
        return "sum " + "".join(terms), ", ".join(steps) + f" so {total}", str(total)
    if task == "reverse":
        word = entry["question"].split(":")[-1].strip().lower()
        return f"reverse {word}", f"{'-'.join(word[::-1])} so {word[::-1]}", word[::-1]
    numbers = [abs(int(float(number))) for number in entry["metadata"]["original_numbers"]]
    ordered = ",".join(map(str, sorted(numbers)))
    return "sort " + ",".join(map(str, numbers)), f"low to high so {ordered}", ordered


def spoil(response: str, rng: random.Random) -> str:
    """A trace whose answer is wrong: characters of its last word are changed."""
    head, answer = response.rsplit(" ", 1)
    letters = list(answer)
    for place in rng.sample(range(len(letters)), min(2, len(letters))):
        if letters[place].isalnum():
            options = "0123456789" if letters[place].isdigit() else "abcdefghijklmnopqrstuvwxyz"
            letters[place] = rng.choice([c for c in options if c != letters[place]])
    return f"{head} {''.join(letters)}"


def problems(split: str, count: int) -> Iterator[dict]:
    """Distinct problems of a split, the families in turn."""
    seen: set[str] = set()
    streams = {task: iter(entries(task, split, count)) for task in TASKS}
    while len(seen) < count:
        for task, stream in streams.items():
            prompt, response, answer = trace(task, next(stream))
            if prompt not in seen:
                seen.add(prompt)
                yield {"task": task, "prompt": prompt, "response": response, "answer": answer, "id": str(len(seen))}


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def build_data(out: Path) -> None:
    """Pool, queries and splits; a problem of one split occurs in no other."""
    held_out: set[str] = set()
    for split, count in (("search", 450), ("confirm", 900), ("dev", 192)):
        items = [item for item in problems(split, count) if item["prompt"] not in held_out]
        held_out |= {item["prompt"] for item in items}
        write(out / f"{split}.jsonl", items)
        for task in TASKS if split == "dev" else ():
            write(out / f"queries-{task}.jsonl", [item for item in items if item["task"] == task])
    needed = SIZES["clean"] + SIZES["wrong"] + 3000
    fresh = [item for item in problems("train", needed + 1500) if item["prompt"] not in held_out][:needed]
    base, clean, wrong = fresh[:3000], fresh[3000 : 3000 + SIZES["clean"]], fresh[3000 + SIZES["clean"] :]
    write(out / "base.jsonl", base)
    rng = random.Random(derive("real run", "pool"))
    pool = [{**item, "source": item["task"]} for item in clean]
    pool += [{**item, "response": spoil(item["response"], rng), "source": item["task"]} for item in wrong]
    for item in rng.choices(pool, k=SIZES["copies"]):
        near = rng.random() < 0.5
        pool.append({**item, "response": item["response"].replace(" so ", " and so ") if near else item["response"]})
    for name in OFF_TASK:
        for entry in entries(name, "pool", SIZES["off-task"] // len(OFF_TASK)):
            texts = ("".join(c for c in text if c in ALPHABET) for text in (entry["question"][:80], entry["answer"]))
            pool.append({**dict(zip(("prompt", "response"), texts, strict=True)), "source": name})
    rng.shuffle(pool)
    keep = ("prompt", "response", "source")
    write(out / "pool.jsonl", [{key: item[key] for key in keep} for item in pool])


def base_model(out: Path) -> Path:
    """The lab's tiny model after a short training on clean traces that are not in the pool."""
    folder = out / "base-model"
    if (folder / "done").is_file():
        return folder
    tokenizer = build_tokenizer(ALPHABET)
    model = build_model(tokenizer, seed=1)
    model.save_pretrained(out / "fresh-model")
    tokenizer.save_pretrained(out / "fresh-model")
    settings = SftSettings(model=str(out / "fresh-model"), splits={}, steps=600, batch_size=32)
    lines = [json.loads(line) for line in (out / "base.jsonl").read_text().splitlines()]
    chats = [
        [{"role": "user", "content": item["prompt"]}, {"role": "assistant", "content": item["response"]}]
        for item in lines
    ]
    model, tokenizer, _ = fine_tune(settings, chats, 1, out / "scratch")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "done").touch()
    return folder


def prepare(out: Path) -> SearchConfig:
    """Data, base model and signals; returns the search."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "pool" / "index.arrow").is_file():
        build_data(out)
        canonicalise([out / "pool.jsonl"], out / "pool")
    model = base_model(out)
    pool = load_pool(out / "pool")
    sources = Sources(
        model=str(model),
        max_length=256,
        queries={task: out / f"queries-{task}.jsonl" for task in TASKS},
        splits=(out / "search.jsonl", out / "confirm.jsonl"),
    )
    names = [
        "len.ws",
        "unigram_entropy",
        "ppl",
        "ifd",
        "entropy",
        "varentropy",
        "el2n",
        "len.response",
        "hashed",
        "rel",
    ]
    started = time.perf_counter()
    compute(out / "pool", pool, names, sources)
    print(f"pool {len(pool)} samples, signals ready after {time.perf_counter() - started:.0f} s", flush=True)
    return make_config(
        {
            "pool": str(out / "pool"),
            "evaluator": {
                "kind": "sft",
                "model": str(model),
                "splits": {"search": str(out / "search.jsonl"), "confirm": str(out / "confirm.jsonl")},
                "steps": STEPS,
                "batch_size": BATCH,
                "max_new_tokens": 32,
                "max_length": 96,
                "learning_rate": 1e-3,
            },
            "objective": {"noise_sd": 1.0},
            "search": {"seed": 1, "operators": ["top", "top_union", "semdedup", "random_k", "exact_dedup"]},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes-real"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stop-after", choices=("data", "search"))
    options = parser.parse_args()
    started = time.perf_counter()
    config = prepare(options.out)
    if options.stop_after == "data":
        return
    materials = load_materials(options.out / "pool")
    evaluator = make_evaluator(config.evaluator, materials.pool)
    search = Search(config=config, materials=materials, evaluator=evaluator, folder=options.out / "run")
    for evaluation in search.run():
        print(f"{evaluation.slot:3d} {evaluation.kind:8s} {evaluation.score or float('nan'):6.2f} "
              f"{evaluation.samples:6d} {evaluation.seconds:5.1f} s  {evaluation.recipe}", flush=True)  # fmt: skip
    if options.stop_after == "search":
        return
    confirm(search, options.seeds)
    print(f"wall time {time.perf_counter() - started:.0f} s in this call")


def confirm(search: Search, seeds: int) -> None:
    """Finalist, random of equal tokens and full data first, then each selector alone at the finalist's size."""
    finalist = search.finalists(1)[0]
    print(f"finalist: slot {finalist.slot}, {finalist.samples} samples, {finalist.recipe}", flush=True)
    arms = [
        Arm(name="finalist", recipe=finalist.recipe),
        Arm(name="random, equal tokens", recipe=None, tokens=finalist.tokens),
        Arm(name="full data", recipe=make_recipe([])),
    ]
    show(search, confirm_arms(search, arms, seeds))
    same = make_recipe([{"op": "random_k", "k": finalist.samples, "seed": 1}])
    arms.append(Arm(name="random, equal samples", recipe=same, redraw=True))
    for name, step in SELECTORS.items():
        arms.append(Arm(name=name, recipe=make_recipe([{**step, "k": _size(step, finalist.samples, search)}])))
    for name, steps in (("exact dedup", {"op": "exact_dedup"}), ("semdedup .9", {"op": "semdedup", "cosine": 0.9})):
        arms.append(Arm(name=name, recipe=make_recipe([steps])))
    show(search, confirm_arms(search, arms, seeds))


def show(search: Search, results: Confirmation) -> None:
    for line in confirm_lines(save_summary(search, results)):
        print(line, flush=True)
    for name, scores in results.scores().items():
        mean, low, high = seed_interval(scores)
        print(f"{name:22s} {mean:6.2f} [{low:6.2f}, {high:6.2f}] {results.samples[name]:6d} samples", flush=True)


def _size(step: dict, samples: int, search: Search) -> int:
    """The k that gives a selector the finalist's number of samples; the union of three tasks needs a search."""
    if step["op"] != "top_union":
        return samples
    low, high = 1, samples
    while low < high:
        middle = (low + high + 1) // 2
        if len(search.chooser.executor.run(make_recipe([{**step, "k": middle}]))) <= samples:
            low = middle
        else:
            high = middle - 1
    return low


if __name__ == "__main__":
    main()
