"""What the model card and the sampling of a run say is what was done."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from trl import GRPOTrainer
from trl_setup import ALPHABET, config, saved_model, trainer

from tokencredit.adapters.trl.card import is_hub_id
from tokencredit.adapters.trl.sampling import plain_sampling, shipped_settings
from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.lab.model import build_model, build_tokenizer


def card_of(folder: Path, **extra: Any) -> tuple[dict, str]:
    built = trainer(CreditGRPOTrainer, config(folder, max_steps=1), **extra)
    built.create_model_card(model_name="mine")
    head, text = (folder / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(head), text


@pytest.mark.parametrize("credit", ["grpo", "hapo", "0.5 * grpo + 0.5 * surprisal", [lambda batch: batch.rewards]])
def test_the_card_names_method_and_papers(credit: Any, tmp_path: Path) -> None:
    head, text = card_of(tmp_path, credit=credit)
    assert head["model_name"] == "mine"
    assert {"tokencredit", "trl", "grpo"} <= set(head["tags"])
    assert "base_model" not in head
    assert "None" not in text
    assert "a model that was built for this run" in text
    if credit == "hapo":
        assert "Method: `hapo`" in text
        assert "https://arxiv.org/abs/2604.11056" in text


def test_every_link_of_the_card_leads_somewhere(tmp_path: Path) -> None:
    head, text = card_of(
        tmp_path / "out", credit="arca", model=saved_model(tmp_path / "start"), peft_config=LoraConfig(r=2)
    )
    assert head["library_name"] == "peft"
    assert "base_model" not in head  # a folder is not a model of the hub
    assert "a LoRA adapter for the model in the folder `start`" in text
    assert str(tmp_path) not in text
    assert all(link.startswith("https://arxiv.org/abs/") for link in re.findall(r"\]\(([^)]*)\)", text))


def test_a_model_of_the_hub_is_linked(tmp_path: Path) -> None:
    model = build_model(build_tokenizer(ALPHABET), layers=1, width=16, heads=2, seed=1)
    model.config._name_or_path = "some-org/Some-Model.1"
    head, text = card_of(tmp_path, credit="hapo", model=model)
    assert head["base_model"] == "some-org/Some-Model.1"
    assert "[some-org/Some-Model.1](https://huggingface.co/some-org/Some-Model.1)" in text
    assert is_hub_id("gpt2")
    assert not is_hub_id("/models/mine")
    assert not is_hub_id("runs/a/model")
    assert not is_hub_id(str(tmp_path))


@pytest.mark.parametrize(
    "shipped", [{"min_p": 0.9}, {"typical_p": 0.05}, {"suppress_tokens": [3]}, {"min_new_tokens": 8}]
)
def test_samples_ignore_what_the_model_ships(shipped: dict[str, Any], tmp_path: Path) -> None:
    def sampled(settings: dict[str, Any]) -> list[str]:
        model = build_model(build_tokenizer(ALPHABET), layers=1, width=16, heads=2, seed=1)
        model.generation_config.update(**settings)
        seen: list[str] = []

        def keep(completions: list[str], **_: Any) -> list[float]:
            seen.extend(completions)
            return [float(len(text)) for text in completions]

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            built = trainer(CreditGRPOTrainer, config(tmp_path, max_steps=1), model=model, reward_funcs=keep)
        named = [str(item.message) for item in caught if "generation config" in str(item.message)]
        assert len(named) == len(settings)
        built.train()
        for name, value in settings.items():
            assert getattr(built.model.generation_config, name) == value, "what is saved with the model stays"
        return seen

    assert sampled(shipped) == sampled({})


def test_the_trainers_own_settings_are_kept() -> None:
    model = build_model(build_tokenizer(ALPHABET), layers=1, width=16, heads=2, seed=1)
    model.generation_config.update(min_p=0.5, top_p=0.2, num_beams=1)
    given = SimpleNamespace(top_p=0.9)
    assert shipped_settings(model, given) == {"min_p": 0.5}
    original = model.generation_config
    with plain_sampling(model, given):
        assert (model.generation_config.min_p, model.generation_config.top_p) == (None, 0.2)
    assert model.generation_config is original


def test_the_hosts_trainer_does_apply_what_the_model_ships(tmp_path: Path) -> None:
    """If this fails, TRL has changed and `trl_sampling` can go."""
    drawn = []
    for settings in ({}, {"min_p": 0.99}):
        model = build_model(build_tokenizer(ALPHABET), layers=1, width=16, heads=2, seed=1)
        model.generation_config.update(**settings)
        built = trainer(GRPOTrainer, config(tmp_path, max_steps=1), model=model)
        built.train()
        drawn.append([value.detach().clone() for value in built.model.parameters()])
    assert not all(torch.equal(one, two) for one, two in zip(*drawn, strict=True))
