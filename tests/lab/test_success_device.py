"""Exact success of a model that lives on a GPU, on the suite's pretend CUDA device."""

import pytest
import torch

from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.success import success_probability
from tokencredit.lab.tasks import get_task

fakecuda = pytest.importorskip("support.fakecuda", reason="the pretend CUDA device is not in this tree")


def test_success_is_measured_on_the_models_device() -> None:
    fakecuda.require()
    task = get_task("countdown")
    tokenizer = build_tokenizer(task.alphabet)
    model = build_model(tokenizer, layers=1, width=16, heads=2, seed=1)
    model.set_attn_implementation("eager")
    problems = task.problems("test", 3)
    expected = success_probability(model, tokenizer, task, problems)
    with fakecuda.session():  # a tensor of the CPU in an operation with one of the device raises, as on CUDA
        found = success_probability(fakecuda.move_module(model), tokenizer, task, problems)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
