"""Recurrences along the tokens of a response in a number of passes that grows with the logarithm of its length."""

import torch
from jaxtyping import Float
from torch import Tensor


def linear_recurrence(
    factors: Float[Tensor, "batch response"], addends: Float[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """y_t = factor_t · y_{t−1} + addend_t along each row, from y = 0.

    By doubling: after k passes y_t is what the last 2^k tokens make of it, and the product of their factors is what
    they make of everything before.
    """
    total, product = addends.clone(), factors.clone()
    step = 1
    while step < total.shape[1]:
        total[:, step:] += product[:, step:] * total[:, :-step]
        product[:, step:] = product[:, step:] * product[:, :-step]
        step *= 2
    return total


def reverse_recurrence(
    factors: Float[Tensor, "batch response"], addends: Float[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """y_t = factor_t · y_{t+1} + addend_t along each row, from y = 0 behind the last token."""
    return torch.flip(linear_recurrence(factors.flip(1), addends.flip(1)), (1,))
