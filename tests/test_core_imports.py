"""What `import tokencredit` loads, and that it needs torch, numpy and jaxtyping alone. Each in a fresh process."""

import subprocess
import sys

HOSTS = ("transformers", "trl", "verl", "matplotlib", "rich", "peft", "accelerate", "datasets", "scipy", "yaml")

LOADED = f"""
import sys
import tokencredit
from tokencredit import assign_credit, get_pipeline
print([name for name in {HOSTS!r} if name in sys.modules])
"""

# Everything that pip installed is hidden, except the core's dependencies and theirs.
ALONE = """
import re, sys
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

allowed, queue = set(), ["torch", "numpy", "jaxtyping", "tokencredit"]
while queue:
    name = normal(queue.pop())
    if name in allowed:
        continue
    allowed.add(name)
    if name == "tokencredit":
        continue
    try:
        needs = requires(name) or []
    except PackageNotFoundError:
        continue  # a dependency of another platform
    queue += [re.match(r"[\\w.-]+", need).group() for need in needs if "extra ==" not in need]

hidden = {
    module for module, owners in packages_distributions().items()
    if not {normal(owner) for owner in owners} & allowed
}
assert {"trl", "transformers", "rich", "scipy"} <= hidden, hidden

class Hide(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {fullname!r}, hidden by the test")

sys.meta_path.insert(0, Hide())
import torch
import tokencredit
from tokencredit import PRESETS, TokenBatch, assign_credit, get_pipeline
from tokencredit.progress import track

for name in PRESETS:
    get_pipeline(name)
batch = TokenBatch(
    response_ids=torch.zeros(2, 2).long(), response_mask=torch.ones(2, 2).bool(), rewards=torch.tensor([1.0, 0.0]),
    group_ids=torch.zeros(2).long(), entropies=torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
)
assert list(track([1, 2], "counting")) == [1, 2]
print(assign_credit("hapo", batch).sum(0).abs().max().item() < 1e-6)
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_no_host_and_no_plotting_library() -> None:
    assert run(LOADED) == "[]"


def test_the_core_runs_on_its_own_dependencies() -> None:
    assert run(ALONE) == "True"
