"""The model card of a run: what was trained, from what, with which credit, and the papers behind it."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from tokencredit import __version__
from tokencredit.files import write_text
from tokencredit.pipeline.pipeline import Pipeline

HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def save_card(trainer: Any, pipeline: Pipeline, model_name: str | None = None, folder: Path | None = None) -> None:
    """Write `README.md` into `folder`, by default the trainer's output folder."""
    folder = Path(trainer.args.output_dir) if folder is None else folder
    write_text(folder / "README.md", card_text(trainer, pipeline, model_name))


def card_text(trainer: Any, pipeline: Pipeline, model_name: str | None = None) -> str:
    """The whole card: metadata for the hub, then Markdown."""
    base = base_model(trainer.model)
    adapter = hasattr(trainer.model, "peft_config")
    name = model_name or Path(trainer.args.output_dir).name
    data = ModelCardData(
        base_model=base if base and is_hub_id(base) else None,
        library_name="peft" if adapter else "transformers",
        model_name=name,
        tags=["generated_from_trainer", "tokencredit", *sorted({"trl", "grpo", *(getattr(trainer, "_tag_names", ()))})],
    )
    parts = (
        f"---\n{data.to_yaml()}\n---",
        f"# Model Card for {name}",
        _origin(base, adapter),
        "## Quick start",
        _quick_start(trainer, base, adapter),
        "## Credit assignment",
        _credit(pipeline),
        "## Training",
        _training(trainer.args),
    )
    return "\n\n".join(parts) + "\n"


def base_model(model: Any) -> str | None:
    """Where the weights came from before this training: a name of the hub, a folder, or None for a fresh model."""
    return getattr(model.config, "_name_or_path", None) or None


def is_hub_id(name: str) -> bool:
    """Whether a model of this name is one of the hub: not a path, and no folder of this machine."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _origin(base: str | None, adapter: bool) -> str:
    what = "a LoRA adapter for" if adapter else "a fine-tuned version of"
    if base is None:
        which = f"{what} a model that was built for this run"
    elif is_hub_id(base):
        which = f"{what} [{base}](https://huggingface.co/{base})"
    else:
        which = f"{what} the model in the folder `{Path(base).name}`"
    return (
        f"This model is {which}. It was trained with tokencredit {__version__}, which changes one tensor of TRL's GRPO "
        "trainer: the advantages, one per token instead of one per response."
    )


def _quick_start(trainer: Any, base: str | None, adapter: bool) -> str:
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    chat = getattr(tokenizer, "chat_template", None) is not None
    place = getattr(trainer, "hub_model_id", None) or "path/to/this/model"
    prompt = '[{"role": "user", "content": "Your question"}]' if chat else '"Your prompt"'
    note = "\n\nThe adapter is loaded with its base model; `peft` must be installed." if adapter and base else ""
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'generator = pipeline("text-generation", model="{place}")\n'
        f"print(generator({prompt}, max_new_tokens={trainer.args.max_completion_length}, return_full_text=False))\n"
        f"```{note}"
    )


def _credit(pipeline: Pipeline) -> str:
    steps = [step for chain in pipeline.chains for step in chain.active]
    rows = list(dict.fromkeys(f"- `{step.name}`: {_linked(step.spec.paper)}" for step in steps))
    config = json.dumps(pipeline.to_config(), indent=2, default=str)
    return f"Method: `{pipeline.name}`\n\n```json\n{config}\n```\n\nPapers of its steps:\n\n" + "\n".join(rows)


def _linked(paper: str | None) -> str:
    """The paper with links to arXiv; steps without one are the library's or the user's own."""
    if not paper or paper == "-":
        return "no paper"
    return ARXIV.sub(lambda found: f"[{found[0]}](https://arxiv.org/abs/{found[1]})", paper)


def _training(arguments: Any) -> str:
    names = ("learning_rate", "loss_type", "beta", "temperature", "num_generations", "num_iterations", "max_steps")
    settings = [f"- {name}: {getattr(arguments, name)}" for name in names if hasattr(arguments, name)]
    packages = [f"- {name}: {version(name)}" for name in ("trl", "transformers", "torch")]
    return "\n".join([*settings, "", "Versions:", "", f"- tokencredit: {__version__}", *packages])
