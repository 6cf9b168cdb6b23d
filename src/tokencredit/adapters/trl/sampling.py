"""Sampling as the trainer's arguments say, and nothing else.

Hugging Face `generate` fills what a trainer leaves open (`min_p`, `typical_p`, …) from the generation config that ships
with the model. Then responses come from another distribution than the one whose log-probs are trained.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Settings of a generation config that change which tokens are sampled, with the values that switch them off.
NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "top_h": None,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "num_beams": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "watermarking_config": None,
}


def shipped_settings(model: Any, given: Any) -> dict[str, Any]:
    """The sampling settings that `generate` would take from the model because `given` leaves them open."""
    own = getattr(_base(model), "generation_config", None)
    found = {name: getattr(own, name, None) for name in NEUTRAL if getattr(given, name, None) is None}
    return {name: value for name, value in found.items() if value is not None and value != NEUTRAL[name]}


@contextmanager
def plain_sampling(model: Any, given: Any) -> Iterator[None]:
    """Inside, the model's own generation config holds no sampling setting that `given` leaves open."""
    base, shipped = _base(model), shipped_settings(model, given)
    if not shipped:
        yield
        return
    original = base.generation_config
    base.generation_config = copy.deepcopy(original)
    for name in shipped:
        setattr(base.generation_config, name, NEUTRAL[name])
    try:
        yield
    finally:
        base.generation_config = original


def warn_of_shipped(model: Any, given: Any) -> None:
    """Say once which of the model's own sampling settings training leaves out."""
    shipped = shipped_settings(model, given)
    if shipped:
        listed = ", ".join(f"{name}={value!r}" for name, value in shipped.items())
        warnings.warn(
            f"responses are sampled without {listed} of the model's generation config: log-probs are of the plain "
            "softmax. Put a setting into the trainer's arguments (or `generation_kwargs`) to sample with it",
            stacklevel=3,
        )


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
