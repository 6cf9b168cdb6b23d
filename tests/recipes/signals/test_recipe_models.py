"""Models of other families: logits as they compute them, end tokens as they declare them, modes as they were."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.recipes.evaluate.sft import SftSettings, generate, make_sft_evaluator
from tokencredit.recipes.export import export_subset
from tokencredit.recipes.pool.encode import encode
from tokencredit.recipes.pool.ingest import canonicalise
from tokencredit.recipes.signals.forward import Scorer, score_samples
from tokencredit.recipes.signals.logits import hidden_states, reader_of

TOKENIZER = build_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789 +=?")
TALK = [{"role": "user", "content": "what is 2+2?"}, {"role": "assistant", "content": "it is four"}]
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
OWN = ("head_dim", "num_key_value_heads")  # which some configs do not know
WITH_HEAD_DIM = ("Llama", "Granite", "Cohere", "Gemma2")
FAMILIES = {
    "Llama": {},
    "Granite": {"logits_scaling": 7.0, "embedding_multiplier": 5.0},
    "Cohere": {"logit_scale": 0.125},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "GPTNeoX": {},
    "Phi": {},  # its head has a bias
}


def model_of(family: str):
    torch.manual_seed(0)
    options = {key: value for key, value in SIZES.items() if family in WITH_HEAD_DIM or key not in OWN}
    config = getattr(transformers, f"{family}Config")(**options, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.ndim == 2 else parameter.add_(0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_models_own_logits(family: str) -> None:
    model = model_of(family)
    columns, _ = score_samples(Scorer(model=model, tokenizer=TOKENIZER, name="m", revision="r"), [TALK])
    encoded = encode(TOKENIZER, TALK, 64)
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([encoded.ids])).logits[0].double().log_softmax(-1)
    mask = torch.from_numpy(encoded.mask)[1:]
    losses = -logprobs[:-1].gather(1, torch.tensor(encoded.ids[1:])[:, None])[:, 0]
    entropies = torch.special.entr(logprobs.exp()).sum(1)[:-1]
    assert columns["loss"][0] == pytest.approx(float(losses[mask].mean()), rel=1e-4)
    assert columns["entropy"][0] == pytest.approx(float(entropies[mask].mean()), rel=1e-3)


def test_a_factor_that_no_table_knows_is_read_off() -> None:
    model = model_of("Llama")
    plain = model.lm_head.forward
    model.lm_head.forward = lambda states: plain(states) * 0.37
    ids = torch.tensor([[3, 4, 5, 6]])
    read = reader_of(model, [[3, 4, 5]])
    with torch.no_grad():
        own = model(input_ids=ids).logits[0]
        torch.testing.assert_close(read(hidden_states(model, ids, torch.ones_like(ids))[0]), own)
    model.lm_head.forward = lambda states: plain(states) ** 3
    model.forward = lambda **inputs: transformers.modeling_outputs.CausalLMOutput(
        logits=torch.randn(1, 3, len(TOKENIZER))
    )
    with pytest.raises(TokenCreditError, match="the logits of LlamaForCausalLM cannot be rebuilt"):
        reader_of(model, [[3, 4, 5]])


def test_a_response_ends_with_any_end_token_of_the_model() -> None:
    end, other = TOKENIZER.eos_token_id, TOKENIZER("z")["input_ids"][0]
    prompt, answer = TOKENIZER("a+b=")["input_ids"], TOKENIZER("7")["input_ids"]
    row = torch.tensor([[*prompt, *answer, other, *TOKENIZER("junk")["input_ids"]]])
    for family in ("Llama", "GPTNeoX"):  # the lab's sampler, and Hugging Face's
        options = {key: value for key, value in SIZES.items() if family == "Llama" or key not in OWN}
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**options | {"hidden_size": 32})
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            model(input_ids=row, labels=row).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.generation_config.eos_token_id = [end, other]
        model.generation_config.repetition_penalty = 30.0  # would forbid what the prompt has
        model.train()
        settings = SftSettings(model="m", splits={}, max_new_tokens=8)
        assert generate(settings, model, TOKENIZER, ["a+b="]) == ["7"], family
        assert model.training and model.generation_config.repetition_penalty == 30.0


def test_generation_without_a_pad_token() -> None:
    tokenizer = build_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789 +=?")
    model = build_model(tokenizer, layers=1, width=16, heads=2, seed=0)
    settings = SftSettings(model="m", splits={}, max_new_tokens=3)
    padded = generate(settings, model, tokenizer, ["a", "what is 1+1?"])
    tokenizer.pad_token = None
    assert generate(settings, model, tokenizer, ["a", "what is 1+1?"]) == padded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "many"}, "`evaluator.steps` must be a whole number of at least 1, got 'many'"),
        ({"learning_rate": 0}, "`evaluator.learning_rate` must be a number above 0, got 0"),
        ({"splits": ["a"]}, "`evaluator.splits` must be a mapping"),
        ({"answer": "("}, "not a regular expression"),
        ({"answer": "x"}, "needs a group"),
    ],
)
def test_settings_of_the_sft_evaluator_are_typed(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "raw.jsonl").write_text(json.dumps({"messages": TALK}))
    pool, _ = canonicalise([tmp_path / "raw.jsonl"], tmp_path / "pool")
    (tmp_path / "p.jsonl").write_text(json.dumps({"task": "t", "prompt": "p", "answer": "a"}))
    config = {"model": "m", "splits": {"search": str(tmp_path / "p.jsonl")}, **change}
    with pytest.raises(TokenCreditError, match=message):
        make_sft_evaluator(config, pool)


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_the_exported_script_runs(tmp_path: Path, chat: bool) -> None:
    tokenizer = build_tokenizer("\n" + "".join(map(chr, range(32, 127))))
    if chat:  # without generation marks, as most templates are
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '#' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
        )
    build_model(tokenizer, layers=1, width=16, heads=2, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "raw.jsonl").write_text(json.dumps({"messages": [*TALK, *TALK], "system": "brief"}))
    pool, _ = canonicalise([tmp_path / "raw.jsonl"], tmp_path / "pool")
    model = str(tmp_path / "model")
    export_subset(pool, np.array([0], np.int32), tmp_path / "out", "trl", model=model)
    script = tmp_path / "out" / "train_trl.py"
    script.write_text(script.read_text().replace("num_train_epochs=3", "max_steps=1, use_cpu=True, report_to='none'"))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
