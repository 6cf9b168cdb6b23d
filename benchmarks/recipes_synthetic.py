"""Search policies on synthetic surfaces with a known truth, and what a search reports where nothing is to be found.

    OMP_NUM_THREADS=1 python benchmarks/recipes_synthetic.py [--searches 60] [--surfaces mono hump flat] [--policies …]

For each policy: true value of the returned recipe (mean ± standard error over searches), and reported minus true. For
`flat`: the four numbers that tell luck from gain, and the share of confirmations at three seeds that call it a gain.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from recipes_surfaces import SyntheticEvaluator, SyntheticPool, surface, synthetic_pool

from tokencredit.recipes.confirm import Arm, confirm_arms, differences, shrunken
from tokencredit.recipes.search.config import make_config
from tokencredit.recipes.search.loop import Search

NOISE = 0.5


def search(pool: SyntheticPool, name: str, folder: Path, **settings: object) -> Search:
    """One finished search."""
    pool.materials.evaluated.clear()
    made = Search(
        config=make_config(
            {
                "pool": "synthetic",
                "evaluator": {"kind": "synthetic"},
                "objective": {"scale": 1.0, "noise_sd": NOISE},
                "search": settings,
            }
        ),
        materials=pool.materials,
        evaluator=SyntheticEvaluator(pool=pool, surface=surface(name), noise_sd=NOISE),
        folder=folder,
    )
    made.run()
    return made


def policy_row(pool: SyntheticPool, name: str, policy: str, searches: int, **settings: object) -> str:
    """Truth and optimism of a policy on a surface."""
    truths, reported, started = [], [], time.process_time()
    for seed in range(searches):
        with tempfile.TemporaryDirectory() as folder:
            found = search(pool, name, Path(folder), seed=seed, policy=policy, **settings)
        finalist = found.finalists(1)[0]
        truths.append(surface(name)(pool, found.chooser.seen[finalist.subset_hash]))
        good = [evaluation for evaluation in found.history if evaluation.ok]
        posterior = float(found.chooser.posterior(good).max()) if policy == "default" else finalist.value
        reported.append(posterior)
    truth, error = np.mean(truths), np.std(truths, ddof=1) / np.sqrt(searches)
    seconds = (time.process_time() - started) / searches
    optimism = np.mean(reported) - truth
    return f"{name:5s} {policy:8s} {truth:6.2f} ± {error:.2f}  reported − true {optimism:+.2f}  {seconds:.1f} CPU s"


def noise_row(pool: SyntheticPool, searches: int, seeds: int = 3, **settings: object) -> dict[str, float]:
    """On `flat`: raw best − control, shrunken gain, posterior − truth, confirmed finalist − control and verdicts."""
    raw, gains, posterior, confirmed, verdicts = [], [], [], [], []
    for seed in range(searches):
        with tempfile.TemporaryDirectory() as folder:
            found = search(pool, "flat", Path(folder), seed=seed, **settings)
            control = next(evaluation for evaluation in found.history if evaluation.kind == "control")
            raw.append(max(e.score for e in found.history) - control.score)
            gains.append(shrunken(found.history, NOISE).gain)
            posterior.append(float(found.chooser.posterior(found.history).max()) - 40.0)
            finalist = found.finalists(1)[0]
            arms = [
                Arm(name="finalist", recipe=finalist.recipe),
                Arm(name="control", recipe=None, tokens=finalist.tokens),
            ]
            gap = differences(confirm_arms(found, arms, seeds))[0]
            confirmed.append(gap.mean)
            verdicts.append(gap.confirmed)
    return {
        "raw best − control": float(np.mean(raw)),
        "shrunken gain": float(np.mean(gains)),
        "shrunken gain, median": float(np.median(gains)),
        "posterior − truth": float(np.mean(posterior)),
        "confirmed − control": float(np.mean(confirmed)),
        "its sd": float(np.std(confirmed, ddof=1)),
        "share called confirmed": float(np.mean(verdicts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=60)
    parser.add_argument("--samples", type=int, default=9000)
    parser.add_argument("--surfaces", nargs="*", default=["mono", "hump", "flat"])
    parser.add_argument("--policies", nargs="*", default=["default", "random", "paper", "single"])
    options = parser.parse_args()
    pool = synthetic_pool(options.samples)
    print(f"{options.samples} samples, {options.searches} searches of 15 evaluations, noise sd {NOISE}")
    for name in options.surfaces:
        if name == "flat":
            for label, value in noise_row(pool, options.searches).items():
                print(f"flat  {label:26s} {value:+.3f}", flush=True)
            continue
        for policy in options.policies:
            print(policy_row(pool, name, policy, options.searches), flush=True)


if __name__ == "__main__":
    main()
