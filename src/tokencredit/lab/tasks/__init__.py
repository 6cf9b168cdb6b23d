"""Verifiable tasks whose accepted responses can be listed, built on `reasoning-gym`."""

from tokencredit.errors import unknown
from tokencredit.lab.tasks.base import SPLITS, Problem, Task
from tokencredit.lab.tasks.carry import carry_task
from tokencredit.lab.tasks.chain import chain_task
from tokencredit.lab.tasks.countdown import countdown_task

__all__ = ["SPLITS", "TASKS", "Problem", "Task", "carry_task", "chain_task", "countdown_task", "get_task"]

TASKS: dict[str, Task] = {
    "countdown": countdown_task(),
    "carry": carry_task(),
    "chain": chain_task(),
}


def get_task(name: str) -> Task:
    """The task called `name`."""
    if not isinstance(name, str) or name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
