"""What a run is about to do, for the user to read before the first step."""

from typing import Any, NamedTuple

from tokencredit.adapters.trl.checks import resolve_timing
from tokencredit.collect.prompts import prompt_ids
from tokencredit.errors import TokenCreditError
from tokencredit.runs import processes
from tokencredit.runs.checks import Ready

SHOWN_CHARACTERS = 1200  # of the first prompt


class Plan(NamedTuple):
    """Lines of a label and a text."""

    rows: tuple[tuple[str, str], ...]

    def text(self) -> str:
        """The plan as a table of two columns."""
        width = max(len(label) for label, _ in self.rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in self.rows)


def make_plan(ready: Ready, model: Any, sampler: Any) -> Plan:
    """Describe a run.

    Args:
      ready: the run.
      model: the model that is trained, with its adapter.
      sampler: the function that samples instead of the host; None for the host.
    """
    config, material, arguments = ready.config, ready.material, ready.arguments
    rewards = ", ".join(reward.name + _times(reward.weight) for reward in config.rewards)
    schedule = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
    timing = resolve_timing(config.timing, config.pipeline, arguments)
    no_reward = "of the task" if config.task else "none: the teacher is the only signal"
    who = "the host's" if sampler is None else "the lab's"
    return Plan(
        (
            ("model", f"{config.model}, {_parameters(model)}"),
            ("prompts from", f"{config.source}, {len(material.dataset):,} rows"),
            ("reward", rewards or no_reward),
            ("credit", f"{config.label}, timing {timing}"),
            ("learning rate", f"{arguments.learning_rate:g}, {schedule}, {config.steps} steps"),
            ("step", _step(ready)),
            ("response", f"at most {arguments.max_completion_length} tokens, sampled by {who} sampler"),
            ("precision", _precision(model, arguments)),
            ("memory", _memory(model, arguments)),
            ("evaluation", _evaluation(ready)),
            *(("note", note) for note in material.notes),
            ("trackers", ", ".join(arguments.report_to) or "none; trainer.report_to names them"),
            ("folder", f"{ready.folder}, {_saving(arguments)}"),
            ("first prompt", first_prompt(material, arguments)),
        )
    )


def _times(weight: float) -> str:
    return "" if weight == 1 else f" × {weight:g}"


def _parameters(model: Any) -> str:
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = "all of them trained" if trained == total else f"{trained:,} of them trained"
    return f"{total:,} parameters, {share}"


def _step(ready: Ready) -> str:
    arguments = ready.arguments
    prompts, generations = int(ready.config.prompts_per_step or 1), arguments.num_generations
    split = (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps, processes.size())
    return (
        f"{prompts} prompts × {generations} generations = {prompts * generations} rows = micro-batch {split[0]} "
        f"× accumulation {split[1]} × processes {split[2]}"
    )


def _precision(model: Any, arguments: Any) -> str:
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    kinds = {"bfloat16 autocast": arguments.bf16, "float16 autocast": arguments.fp16, "no autocast": True}
    return f"weights {weights}, {next(kind for kind, on in kinds.items() if on)}"


def _memory(model: Any, arguments: Any) -> str:
    sizes = [(weight.numel() * weight.element_size(), weight.requires_grad) for weight in model.parameters()]
    trained = sum(size for size, learns in sizes if learns)
    gigabytes = (sum(size for size, _ in sizes) + 3 * trained) / 1e9  # what is trained has a gradient and two moments
    checkpointed = "on" if arguments.gradient_checkpointing else "off"
    return f"about {gigabytes:.2g} GB for weights, gradients and Adam; activation checkpointing {checkpointed}"


def _evaluation(ready: Ready) -> str:
    settings, dataset, rows = ready.config.evaluation, ready.config.dataset, ready.material.evaluation
    when = f"every {settings.every} steps"
    if ready.config.task is not None:
        return f"{settings.problems} problems of the task's test split, exact, {when}"
    if rows is None:
        return "no evaluation set: only training rewards are shown; set dataset.evaluation or dataset.evaluation_split"
    split = f", split {dataset.evaluation_split}" if dataset.evaluation_split else ""
    return (
        f"{dataset.evaluation or dataset.path}{split}: {len(rows)} problems × {settings.samples} samples, {when}; "
        f"correct means a reward above {settings.threshold:g}"
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
    prompt, tokenizer = material.dataset[0]["prompt"], material.tokenizer
    try:
        ids = prompt_ids(tokenizer, prompt, chat_template_kwargs=arguments.chat_template_kwargs)
    except TokenCreditError as error:
        return error.message
    text = repr(tokenizer.decode(ids, skip_special_tokens=False))
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
    wrapped = getattr(tokenizer, "chat_template", None) is not None and isinstance(prompt, str)
    note = " (plain text; the tokenizer has a chat template that is not used)" if wrapped else ""
    return f"{len(ids)} tokens{note}: {shown}"
