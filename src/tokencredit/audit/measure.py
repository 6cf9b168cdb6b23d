"""From responses to the credit of every method: fields are collected once, pipelines share them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencredit import seeds
from tokencredit.adapters.trl.collectors import built_in
from tokencredit.audit import sample, sources
from tokencredit.audit.settings import AuditSettings
from tokencredit.batch.records import OPTIONAL_FIELDS, TokenBatch
from tokencredit.collect.load import load_model, load_tokenizer
from tokencredit.collect.logprobs import token_logprobs
from tokencredit.collect.models import is_peft_model
from tokencredit.collect.rollout import Rollout
from tokencredit.collect.table import resolve_options
from tokencredit.collect.teacher.build import build_teacher
from tokencredit.collect.token_texts import batch_token_texts
from tokencredit.diagnostics.agreement import agreement_table
from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.labels import label_of
from tokencredit.pipeline.pipeline import Pipeline
from tokencredit.progress import track
from tokencredit.report.audit_page import Audit

PRIVILEGED = {"kind": "self", "template": "answer"}  # the model itself, shown the answer
UNIFORM = "grpo"  # what a response's own advantage is taken from

Collectors = Mapping[str, Callable[[Rollout], Tensor]]


def run_audit(settings: AuditSettings) -> Audit:
    """Sample or read responses, and give every method's credit on them.

    Raises:
      TokenCreditError: before a model is loaded where a method cannot be read; after it where none can be computed.
    """
    pipelines = {label_of(credit): Pipeline.parse(credit) for credit in settings.credit}
    if settings.source is not None and (settings.source / "records").is_dir():
        batch, tokens, prompts, facts = sources.read_run(settings.source)
        collectors: Collectors = {}
        rollout = None
    else:
        rollout, collectors, facts = _responses(settings, pipelines)
        batch = _measured(rollout, settings)
        tokens = batch_token_texts(rollout.tokenizer, [row.tolist() for row in rollout.response_ids])
        prompts = rollout.tokenizer.batch_decode(rollout.prompts(), skip_special_tokens=False)
    fields, refused = _collect(pipelines, batch, rollout, collectors)
    batch = _with_fields(batch, fields)
    advantages, left_out = _credit(pipelines, batch, refused, settings)
    uniform = assign_credit(UNIFORM, batch)
    return Audit(
        title=f"{', '.join(advantages)} on {facts.get('task', 'responses')}",
        batch=batch,
        tokens=tokens,
        prompts=prompts,
        advantages=advantages,
        bases=torch.where(batch.response_mask, uniform, 0.0).sum(1) / batch.response_mask.sum(1).clamp_min(1),
        facts=facts | _counts(batch, settings),
        warnings=[*_warnings(batch, settings), *left_out],
    )


def _responses(
    settings: AuditSettings, pipelines: Mapping[str, Pipeline]
) -> tuple[Rollout, Collectors, dict[str, str]]:
    """A model's responses to a task, or a file's, scored by a model."""
    if settings.model is None:
        raise TokenCreditError(
            "responses from a file have no log-probs of their own: an audit needs the model that gave them",
            hint="add `--model FOLDER`",
        )
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(settings.model)
    problems = None if settings.task is None else sample.problems_of(settings, tokenizer)
    model = load_model(settings.model).to(device)
    facts = {"model": settings.model}
    if problems is None:
        assert settings.source is not None
        rollout = sources.read_responses(settings.source, model, tokenizer, settings)
        extra: Collectors = {}
        facts["responses from"] = str(settings.source)
    else:
        rollout = sample.sample_rollout(model, tokenizer, problems, settings)
        extra = problems.collectors
        facts |= {"task": str(settings.task), "sampling": f"temperature {settings.temperature}, seed {settings.seed}"}
    required = {name for pipeline in pipelines.values() for name in pipeline.requires}
    section = settings.teacher or PRIVILEGED
    teacher = build_teacher(section) if any(name.startswith("teacher_") for name in required) else None
    if teacher is not None:
        teacher.check(tokenizer, policy=model, rows=list(rollout.columns), temperature=settings.temperature)
        facts["teacher"] = ", ".join(f"{key} {value}" for key, value in section.items())
    options, functions = resolve_options(settings.collectors)
    built = built_in(options, teacher, adapter=is_peft_model(model))
    return replace(rollout, teacher=teacher), {**built, **functions, **extra}, facts


def _measured(rollout: Rollout, settings: AuditSettings) -> TokenBatch:
    """The batch with the policy's own log-probs and entropies."""
    logprobs, entropies = [], []
    parts = list(rollout.parts())
    for part in track(parts, "scoring"):
        one = token_logprobs(part.model, part.sequences(), rollout.temperature)
        logprobs.append(one[0])
        entropies.append(one[1])
    mask = rollout.response_mask
    progress, step = settings.schedule
    return TokenBatch(
        response_ids=rollout.response_ids,
        response_mask=mask,
        rewards=rollout.rewards,
        group_ids=rollout.group_ids,
        scored=rollout.scored,
        old_logprobs=torch.where(mask, torch.cat(logprobs), 0.0).clamp_max(0.0),
        entropies=torch.where(mask, torch.cat(entropies), 0.0).clamp_min(0.0),
        progress=progress,
        step=step,
    )


def _collect(
    pipelines: Mapping[str, Pipeline], batch: TokenBatch, rollout: Rollout | None, collectors: Collectors
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Fields that the pipelines read and the batch does not carry, and why some cannot be had."""
    wanted = {name for pipeline in pipelines.values() for name in pipeline.requires} - batch.carried
    fields: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for name in track(sorted(wanted & set(OPTIONAL_FIELDS)), "collecting"):
        if name == "current_logprobs" and batch.old_logprobs is not None:
            fields[name] = batch.old_logprobs  # before the first update the two are one
        elif rollout is None or name not in collectors:
            continue
        else:
            try:
                fields[name] = collectors[name](rollout).detach()
            except TokenCreditError as error:
                refused[name] = error.message
    return fields, refused


def _with_fields(batch: TokenBatch, fields: Mapping[str, Tensor]) -> TokenBatch:
    filled: dict[str, Any] = dict(fields)
    return replace(batch, **filled)


def _credit(
    pipelines: Mapping[str, Pipeline], batch: TokenBatch, refused: Mapping[str, str], settings: AuditSettings
) -> tuple[dict[str, Tensor], list[str]]:
    """Advantages by label, and a sentence for every method that is left out."""
    advantages, left_out = {}, []
    for label, pipeline in pipelines.items():
        generator = seeds.generator("audit credit", settings.seed)
        try:
            advantages[label] = assign_credit(pipeline, batch, generator=generator)
        except TokenCreditError as error:
            reasons = [refused[name] for name in sorted(pipeline.requires) if name in refused]
            left_out.append(f"{label} is left out: {(reasons or [error.message])[0]}")
    if not advantages:
        raise TokenCreditError(f"no method can be shown: {left_out[0]}")
    return advantages, left_out


def _counts(batch: TokenBatch, settings: AuditSettings) -> dict[str, str]:
    rows = len(batch.rewards)
    groups = len(batch.group_ids.unique())
    correct = int((batch.rewards > settings.threshold).sum())
    return {
        "responses": f"{rows} to {groups} prompts, {int(batch.response_mask.sum())} tokens",
        "correct": f"{correct} of {rows} (reward above {settings.threshold:g})",
        "mixed groups": f"{_mixed(batch, settings)} of {groups}",
    }


def _mixed(batch: TokenBatch, settings: AuditSettings) -> int:
    """Groups with responses of both kinds."""
    correct = batch.rewards > settings.threshold
    return sum(len(correct[batch.group_ids == group].unique()) > 1 for group in batch.group_ids.unique().tolist())


def _warnings(batch: TokenBatch, settings: AuditSettings) -> list[str]:
    if _mixed(batch, settings):
        return []
    all_right = bool((batch.rewards > settings.threshold).all())
    advice = "choose harder problems" if all_right else "choose easier problems, more samples or longer responses"
    return [
        "No prompt has both correct and wrong responses, so a baseline over the group leaves nothing to assign: "
        f"{advice}."
    ]


def summary_of(audit: Audit) -> dict[str, Any]:
    """The audit in numbers, for `--json`."""
    table = agreement_table(dict(audit.advantages), audit.batch.response_mask)
    pairs = {f"{first} ~ {second}": mean.value for (first, second), mean in table.items()}
    return {"facts": dict(audit.facts), "warnings": list(audit.warnings), "agreement": pairs}


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run with records."""
    return (path / "records").is_dir()
