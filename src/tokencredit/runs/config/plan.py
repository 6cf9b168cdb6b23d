"""What a run is about to do, for the user to read before the first step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokencredit.pipeline.pipeline import Pipeline
from tokencredit.runs import processes
from tokencredit.runs.config.types import reward_list
from tokencredit.runs.folders import label_of

SHOWN_CHARACTERS = 1200  # of the first prompt


class Plan(NamedTuple):
    """Lines of a label and a text."""

    rows: tuple[tuple[str, str], ...]

    def text(self) -> str:
        """The plan as a table of two columns."""
        width = max(len(label) for label, _ in self.rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in self.rows)


def make_plan(
    config: Mapping[str, Any], material: Any, arguments: Any, folder: Path, model: Any, *, sampler: str
) -> Plan:
    """Describe a run.

    Args:
      config: the resolved config.
      material: what the run trains on.
      arguments: TRL's GRPOConfig of the run.
      folder: the folder of the results.
      model: the model that is trained, with its adapter.
      sampler: who samples, in words.
    """
    from tokencredit.adapters.trl.checks import resolve_timing

    pipeline = Pipeline.parse(config["credit"])
    rewards = reward_list(config["reward"])
    reward = ", ".join(item.name + ("" if item.weight == 1 else f" × {item.weight:g}") for item in rewards)
    source = config["task"] or config["dataset"]["path"]
    schedule = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
    trackers = ", ".join(arguments.report_to)
    return Plan(
        (
            ("model", f"{config['model']}, {_parameters(model)}"),
            ("prompts from", f"{source}, {len(material.dataset):,} rows"),
            ("reward", reward or ("of the task" if config["task"] else "none: the teacher is the only signal")),
            ("credit", f"{label_of(config['credit'])}, timing {resolve_timing(config['timing'], pipeline, arguments)}"),
            ("learning rate", f"{arguments.learning_rate:g}, {schedule}, {config['steps']} steps"),
            ("step", _step(config, arguments)),
            ("response", f"at most {arguments.max_completion_length} tokens, sampled by {sampler} sampler"),
            ("precision", _precision(model, arguments)),
            ("memory", _memory(model, arguments)),
            ("evaluation", _evaluation(config, material)),
            *(("note", note) for note in getattr(material, "notes", ())),
            ("trackers", trackers or "none; trainer.report_to names them"),
            ("folder", f"{folder}, {_saving(arguments)}"),
            ("first prompt", first_prompt(material, arguments)),
        )
    )


def _parameters(model: Any) -> str:
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = "all of them trained" if trained == total else f"{trained:,} of them trained"
    return f"{total:,} parameters, {share}"


def _step(config: Mapping[str, Any], arguments: Any) -> str:
    prompts, generations = config["prompts_per_step"], arguments.num_generations
    split = (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps, processes.size())
    return (
        f"{prompts} prompts × {generations} generations = {prompts * generations} rows = micro-batch {split[0]} "
        f"× accumulation {split[1]} × processes {split[2]}"
    )


def _precision(model: Any, arguments: Any) -> str:
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    autocast = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None
    return f"weights {weights}, " + (f"{autocast} autocast" if autocast else "no autocast")


def _memory(model: Any, arguments: Any) -> str:
    sizes = [(weight.numel() * weight.element_size(), weight.requires_grad) for weight in model.parameters()]
    trained = sum(size for size, learns in sizes if learns)
    gigabytes = (sum(size for size, _ in sizes) + 3 * trained) / 1e9  # what is trained has a gradient and two moments
    checkpointed = "on" if arguments.gradient_checkpointing else "off"
    return f"about {gigabytes:.2g} GB for weights, gradients and Adam; activation checkpointing {checkpointed}"


def _evaluation(config: Mapping[str, Any], material: Any) -> str:
    section, dataset = config["evaluation"], config["dataset"]
    when = f"every {section['every']} steps"
    if config["task"] is not None:
        return f"{section['problems']} problems of the task's test split, exact, {when}"
    if material.evaluation is None:
        return "no evaluation set: only training rewards are shown; set dataset.evaluation or dataset.evaluation_split"
    path = dataset["evaluation"] or dataset["path"]
    split = f", split {dataset['evaluation_split']}" if dataset["evaluation_split"] else ""
    return (
        f"{path}{split}: {len(material.evaluation)} problems × {section['samples']} samples, {when}; "
        f"correct means a reward above {section['threshold']:g}"
    )


def _saving(arguments: Any) -> str:
    strategy = getattr(arguments.save_strategy, "value", arguments.save_strategy)
    if strategy == "no":
        return "no checkpoints: a killed run starts again"
    every = f"every {arguments.save_steps} steps" if strategy == "steps" else f"by {strategy}"
    limit = f", the last {arguments.save_total_limit} kept" if arguments.save_total_limit else ""
    return f"a checkpoint {every}{limit}"


def first_prompt(material: Any, arguments: Any) -> str:
    """The first row's prompt as the model reads it: chat template applied, special tokens shown, text in quotes."""
    prompt = material.dataset[0]["prompt"]
    tokenizer = material.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer(text=[prompt])["input_ids"][0]
    else:
        try:
            encoded = tokenizer.apply_chat_template(
                [prompt],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **(arguments.chat_template_kwargs or {}),
            )
            ids = encoded["input_ids"][0]
        except Exception as error:  # a template is a program of the model's author, with its own errors
            return f"the chat template refuses it: {' '.join(str(error).split())}"
    text = repr(tokenizer.decode(ids, skip_special_tokens=False))
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
    wrapped = getattr(tokenizer, "chat_template", None) is not None and isinstance(prompt, str)
    note = " (plain text; the tokenizer has a chat template that is not used)" if wrapped else ""
    return f"{len(ids)} tokens{note}: {shown}"
