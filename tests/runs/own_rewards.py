"""Reward functions that a config names as module:function."""


def constant(completions, **columns):
    return [0.5] * len(completions)


def not_a_number(completions, **columns):
    return [float("nan")] * len(completions)


def shorter_is_better(completion_ids, **columns):
    return [1.0 / len(ids) for ids in completion_ids]
