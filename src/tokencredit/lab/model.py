"""A tiny causal language model with a character tokenizer, built on the spot in Hugging Face format."""

import hashlib
import inspect
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.lab import supervised, tasks
from tokencredit.lab.cache import cache_root, cached_folder, fingerprint
from tokencredit.lab.success import success_probability
from tokencredit.seeds import derive

PAD, EOS = "<pad>", "<eos>"

LEARNING_RATE = 3e-3


class Size(NamedTuple):
    """Layers, width and attention heads; the head dimension is width / heads."""

    layers: int
    width: int
    heads: int


SIZES: dict[str, Size] = {"tiny": Size(3, 96, 4), "small": Size(4, 128, 4)}


class Stage(NamedTuple):
    """A stage of training: it goes on from stage `after` for `length` times the first stage's steps."""

    after: str | None
    length: float
    solved_share: float | None  # None: the caller's


STAGES: dict[str, Stage] = {
    "start": Stage(None, 1.0, None),
    "middle": Stage("start", 0.5, 0.6),
    "late": Stage("middle", 0.5, 0.95),
}


def build_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token per character of `alphabet`, padding on the left, EOS but no BOS.

    Decoding joins the characters as they were. A character outside the alphabet is an error, never an unknown token.
    """
    if len(set(alphabet)) != len(alphabet) or not alphabet:
        raise TokenCreditError(f"`alphabet` must be distinct characters, at least one, got {alphabet!r}")
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *alphabet])}
    inner = Tokenizer(tokenizers.models.WordLevel(vocabulary))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, layers: int = 3, width: int = 96, heads: int = 4, seed: int = 0
) -> Qwen3ForCausalLM:
    """A Qwen3 model with fresh weights that depend on `seed` alone; under a million parameters up to 4 x 128."""
    if width % heads or (width // heads) % 2:
        raise TokenCreditError(f"`width` / `heads` must be an even number, got width {width} and heads {heads}")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive("lab weights", layers, width, heads, seed))
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def warm_start(
    task: str | tasks.Task,
    *,
    size: str = "tiny",
    stage: str = "start",
    seed: int = 0,
    solved_share: float = 0.3,
    steps: int | None = None,
    batch: int = 32,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of a model that writes the task's traces and solves some problems, built on first use.

    Supervised on random traces, `solved_share` of which solve their problem: without any, reinforcement learning finds
    nothing to reinforce. A task that is `solved_first` begins on solved traces alone. Stage "middle" goes on from
    "start" for half as many steps with 60 % solved, "late" from "middle" for as many with 95 %. More `steps` (the
    task's `warm_steps` if None), a larger `size` and a later stage make a teacher.

    The folder holds weights, tokenizer and `tokencredit.json`: resolved settings, versions, exact success on held-out
    problems. It is cached under `cache_dir`, `$TOKENCREDIT_CACHE` or `~/.cache/tokencredit`, by settings and code.
    """
    task = tasks.get_task(task) if isinstance(task, str) else task
    steps = task.warm_steps if steps is None else steps
    settings = _settings(task, size, stage, seed=seed, solved_share=solved_share, steps=steps, batch=batch)
    folder = cache_root(cache_dir) / f"{task.name}-{size}-{stage}-{fingerprint(settings)}"
    again = partial(
        warm_start,
        task,
        size=size,
        seed=seed,
        solved_share=solved_share,
        steps=steps,
        batch=batch,
        cache_dir=cache_dir,
    )

    def build(path: Path) -> dict[str, Any]:
        after = STAGES[stage].after
        earlier = None if after is None else again(stage=after)
        return _build(path, task, settings, earlier)

    return cached_folder(folder, settings, build)


def _settings(task: tasks.Task, size: str, stage: str, **given: Any) -> dict[str, Any]:
    """The resolved settings of a warm start; refuses what cannot be."""
    if size not in SIZES:
        raise unknown("model size", size, SIZES)
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    if not 0 <= given["solved_share"] <= 1:
        raise TokenCreditError(f"`solved_share` must be in [0, 1], got {given['solved_share']}")
    for name in ("steps", "batch"):
        if given[name] < 1:
            raise TokenCreditError(f"`{name}` must be at least 1, got {given[name]}")
    return {
        "task": task.name,
        "alphabet": task.alphabet,
        "size": size,
        **SIZES[size]._asdict(),
        "stage": stage,
        "learning_rate": LEARNING_RATE,
        "code": _code_version(task),
        **given,
    }


def _build(path: Path, task: tasks.Task, settings: dict[str, Any], earlier: Path | None) -> dict[str, Any]:
    """Train and save a model in `path`; what goes on its card besides the settings."""
    start = time.monotonic()
    stage = STAGES[settings["stage"]]
    tokenizer = build_tokenizer(task.alphabet)
    if earlier is None:
        shape = SIZES[settings["size"]]._asdict()
        model = build_model(tokenizer, **shape, seed=settings["seed"])
    else:
        model = Qwen3ForCausalLM.from_pretrained(earlier, dtype=torch.float32, local_files_only=True)
    loss = math.nan
    solved_share = settings["solved_share"] if stage.solved_share is None else stage.solved_share
    for phase in _plan(task, settings["steps"], settings["batch"], settings["stage"], solved_share):
        loss = supervised.fit(
            model,
            tokenizer,
            phase.task,
            solved_share=phase.solved_share,
            steps=phase.steps,
            batch=phase.rows,
            learning_rate=settings["learning_rate"] * phase.rate,
            seed=settings["seed"],
        )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    success = success_probability(model, tokenizer, task, task.problems("test", 64))
    return {
        "parameters": model.num_parameters(),
        "loss": loss,
        "test_success": success.mean().item(),
        "seconds": time.monotonic() - start,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


class Phase(NamedTuple):
    """One call of supervised training; `rate` is a factor on the learning rate."""

    task: tasks.Task
    steps: int
    rows: int
    solved_share: float
    rate: float = 1.0


def _plan(task: tasks.Task, steps: int, batch: int, stage: str, solved_share: float) -> list[Phase]:
    """What a stage trains on.

    A task with an easier version has long rows: the first stage learns the format on the easier one, then goes on with
    two thirds of the steps and half of the rows. A task that is `solved_first` sees solved traces alone for the first
    three fifths, then the mixture at half the rate: it can solve before it learns to miss.
    """
    total = max(1, round(STAGES[stage].length * steps))
    first = STAGES[stage].after is None
    if task.easier is not None:
        long = Phase(task, max(1, total * 2 // 3), max(1, batch // 2), solved_share)
        return [Phase(task.easier, total, batch, solved_share), long] if first else [long]
    if first and task.solved_first and total > 1:
        alone = total * 3 // 5
        return [Phase(task, alone, batch, 1.0), Phase(task, total - alone, batch, solved_share, rate=0.5)]
    return [Phase(task, total, batch, solved_share)]


def _code_version(task: tasks.Task) -> str:
    """A hash of the source that decides what a warm start of `task` is."""
    sources = [__file__, supervised.__file__, inspect.getfile(tasks.Task), inspect.getfile(task.verify)]
    return hashlib.blake2b(b"".join(Path(path).read_bytes() for path in sources), digest_size=8).hexdigest()
