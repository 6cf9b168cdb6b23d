"""How the cost of the benchmark grows with prompts and with accepted responses.

Run: python benchmarks/exact_scaling.py [--most 10]. One thread, seconds of this thread, a model with random weights of
the lab's shape (0.34 M parameters), so nothing is trained. Each line is the median of three; the last column is the
cost of a unit against the first line, 1.0 where it grows linearly.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from tokencredit.collect.exact.gradient import advantage_weights, score_gradients
from tokencredit.collect.exact.trie import build_trie
from tokencredit.collect.exact.values import encode_accepted, exact_credit
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.tasks import chain_task, get_task
from tokencredit.lab.tasks.chain import problem_of
from tokencredit.seeds import generator

REPEATS = 3
METHODS = 25


def seconds(run: Callable[[], object]) -> float:
    """Median of the thread's time over a few runs."""
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def report(title: str, unit: str, rows: Sequence[tuple[int, float]]) -> None:
    print(f"\n{title}\n\n| {unit} | seconds | per {unit}, ms | against the first |\n|---|---|---|---|")
    first = rows[0][1] / rows[0][0]
    for count, spent in rows:
        print(f"| {count} | {spent:.2f} | {1000 * spent / count:.2f} | {spent / count / first:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=10, help="largest multiple of the default size of 64 prompts")
    most = parser.parse_args().most
    torch.set_num_threads(1)
    task = get_task("countdown")
    tokenizer = build_tokenizer(task.alphabet)
    model = build_model(tokenizer)
    multiples = [m for m in (1, 2, 5, 10, 20) if m <= most]

    problems = task.problems("train", 64 * multiples[-1])
    prompts = tokenizer([problem.prompt for problem in problems])["input_ids"]
    accepted = [encode_accepted(tokenizer, task.accepted(problem)) for problem in problems]
    eos = tokenizer.eos_token_id
    rows = []
    for m in multiples:
        n = 64 * m
        rows.append((n, seconds(lambda n=n: exact_credit(model, prompts[:n], accepted[:n], eos_token_id=eos))))
    report("exact values, countdown", "prompts", rows)

    rows = []
    for sums in (3, 5, 7, 9):
        wide = chain_task(terms=10, sums=9)
        expression = "9" + "".join("+5" if k < sums else "-1" for k in range(9))
        responses = encode_accepted(tokenizer, wide.accepted(problem_of(expression)))
        prompt = tokenizer([f"{expression}:"])["input_ids"]
        spent = seconds(lambda p=prompt, r=responses: exact_credit(model, p, [r], eos_token_id=eos))
        rows.append((len(responses), spent))
    report("exact values, one chain prompt of 2^k accepted responses", "accepted responses", rows)

    rng = generator("scaling")
    rows = []
    for m in multiples:
        n = 64 * m

        def gradients(n: int = n) -> None:
            for prompt in range(0, n, 16):  # every 16th prompt: the figure is the same a prompt
                trie = build_trie([accepted[prompt]])
                given = torch.randn(METHODS, *trie.paths[:, 1:].shape, generator=rng)
                weights = advantage_weights(trie, list(given), 0)
                score_gradients(model, prompts[prompt], trie, 0, weights)

        rows.append((n // 16, seconds(gradients)))
    report(f"gradients of {METHODS} independent methods on a prompt's trie, countdown", "prompts", rows)
    print(f"\npeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
