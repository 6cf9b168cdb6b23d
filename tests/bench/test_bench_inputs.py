"""What a benchmark takes: pipelines, settings, prompts and lists of a user, and tokenizers with several spellings."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import fakecuda
from support.bench_task import Letters, model_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokencredit import TokenBatch, TokenCreditError
from tokencredit.bench import entries as pipelines
from tokencredit.bench.config import BenchConfig
from tokencredit.bench.figures import _around
from tokencredit.bench.problem import encode_listed, encode_prompt, load_world
from tokencredit.bench.run import run_bench
from tokencredit.bench.sampling import draw, sample_responses, seeded
from tokencredit.cli.bench import config_of, print_notes, print_table
from tokencredit.cli.main import build_parser, main
from tokencredit.report.bench_page import render_bench
from tokencredit.report.bench_table import estimate_text, notes

TEMPLATE = (
    "{% for m in messages %}<s>[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def doubled(advantages: torch.Tensor, batch: TokenBatch, *, by: float = 2.0) -> torch.Tensor:
    """A transform of one's own."""
    return advantages * by


def spelled(vocabulary: str = "ab:>[]user", template: str | None = None) -> PreTrainedTokenizerFast:
    """Letters, the token "ab" beside them, and a BOS that the tokenizer writes itself."""
    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<s>", *vocabulary, "ab"])}
    backend = Tokenizer(models.BPE(vocab, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Split(":", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


def spelled_folder(where: Path) -> str:
    """A tiny random model of that tokenizer; it likes to say "ab" both ways."""
    tokenizer = spelled("ab:")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return str(where)


class Spelled:
    """Say "ab", listed as `listed` says."""

    max_response = 3

    def __init__(self, listed: list[Any] | None = None) -> None:
        self.listed = ["ab"] if listed is None else listed

    def problems(self, split: str, count: int, seed: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(prompt="a" * (1 + index) + ":") for index in range(count)]

    def verify(self, problem: SimpleNamespace, response: str) -> bool:
        return response == "ab"

    def accepted(self, problem: SimpleNamespace) -> list[Any]:
        return self.listed


one_spelling = Spelled([[6]])  # the token "ab" alone
both_spellings = Spelled([[6], [3, 4, 1]])  # EOS may be there or not
as_text = Spelled()
unlikely = Letters(listed=("aaa",), right=("aaa",))


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(model_folder(tmp_path_factory.mktemp("letters")))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return spelled_folder(tmp_path_factory.mktemp("words"))


def small(**changes: Any) -> BenchConfig:
    options = {
        "prompts": 2,
        "rollouts": 64,
        "replicates": 2,
        "resamples": 20,
        "pipelines": ("grpo",),
        "controls": False,
    }
    return BenchConfig(**(options | changes))


def test_whatever_compare_takes(letters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    credits = [
        *("grpo", "{hapo: {alpha: .5}}", "[group_normalized, test_bench_inputs:doubled]"),
        *("[hapo, {test_bench_inputs:doubled: {by: 3.0}}]", "0.5 * grpo + 0.5 * hapo"),
    ]
    command = [
        "bench",
        "--model",
        letters,
        "--task",
        "support.bench_task:letters",
        "--prompts",
        "2",
        "--rollouts",
        "16",
    ]
    options = ["--credit", *credits, "--no-controls", "--set", "resamples=20", "--out", str(tmp_path / "out"), "--json"]
    assert main([*command, *options]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    names = [method["name"] for method in cell["methods"] if not method["matched"]]
    assert names == [
        *("grpo", "hapo(alpha=0.5)", "group_normalized → test_bench_inputs:doubled"),
        *("hapo → test_bench_inputs:doubled(by=3.0)", "0.5 * grpo + 0.5 * hapo"),
    ]
    figures = {method["name"]: method["figures"] for method in cell["methods"] if not method["matched"]}
    # twice the credit has the same direction
    assert figures[names[2]]["direction"][0] == pytest.approx(figures["grpo"]["direction"][0], abs=1e-6)
    assert cell["controls"] == []


def test_pipelines_of_a_file_and_settings_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "bench.yaml"
    path.write_text("pipelines: [[group_normalized, shuffle_within_response], {hapo: {alpha: 3e-1}}]\ngain: 5e-2\n")
    flags = ["--set", "teacher.kind=self", "--set", "gain=1e-1", "--set", "prompts=3", "--no-controls"]
    config = config_of(build_parser("bench").parse_args(["bench", str(path), *flags]))
    assert (config.gain, config.prompts, config.controls) == (0.1, 3, False)
    assert config.teacher == {"kind": "self"}
    found, _ = pipelines.entries(config.pipelines, controls=False, collectors={})
    assert [entry.name for entry in found if not entry.matched] == [
        "group_normalized → shuffle_within_response",
        "hapo(alpha=0.3)",
    ]
    assert config_of(build_parser("bench").parse_args(["bench", "--set", "controls=false"])).controls is False
    for text in ("gain", "=3", "a..b=3"):
        with pytest.raises(TokenCreditError, match="--set takes key=value"):
            config_of(build_parser("bench").parse_args(["bench", "--set", text]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": 3}, "`tasks` must be a name or a list of names, got 3"),
        ({"tasks": {"a": 1}}, "`tasks` must be a name"),
        ({"stages": ["start", 2]}, "`stages` must be a name"),
        ({"pipelines": 3}, "`pipelines` is a list with one item per pipeline, got 3"),
        ({"pipelines": [3]}, "`pipelines` is a list with one item per pipeline"),
        ({"model": 3}, "`model` must be a text, or null, got 3"),
        ({"controls": "no"}, "`controls` must be true or false"),
        ({"seed": 1.5}, "`seed` must be a whole number"),
        ({"level": "high"}, "`level` must be a number"),
        ({"threads": 10**30}, "`threads` must be a whole number of at least 1 and of at most 1,024"),
        ({"gain": float("nan")}, "`gain` must be a number above 0"),
        ({"chat": "sometimes"}, "`chat` must be true, false or auto"),
        ({"teacher": [1]}, "`teacher` must be a mapping"),
        ({"teacher": {"kind": {1, 2}}}, "which YAML reads as set"),
        ({"baseline": None}, "`baseline` must be a text"),
    ],
)
def test_every_key_has_a_type(given: dict, message: str) -> None:
    with pytest.raises(TokenCreditError, match=message):
        BenchConfig.read(given)


def test_methods_and_files_that_cannot_be_used(letters: str, tmp_path: Path) -> None:
    config = small(model=letters, tasks=("support.bench_task:letters",))
    with pytest.raises(TokenCreditError, match="'hapo' is named twice"):
        run_bench(config.replace(pipelines=("hapo", "hapo")), tmp_path / "a")
    with pytest.raises(TokenCreditError, match="takes \\(advantages, batch"):
        run_bench(config.replace(pipelines=("test_bench_inputs:doubled",)), tmp_path / "a")
    with pytest.raises(TokenCreditError, match="did you mean 'grpo'"):
        run_bench(config.replace(baseline="grpoo"), tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenCreditError, match="cannot create the folder"):
        run_bench(config, tmp_path / "file" / "out")
    run_bench(config, tmp_path / "b")
    for name, content in (("config.json", b"{"), ("support.bench_task.letters-given/cell.json", b"\xff\xfe")):
        kept = (tmp_path / "b" / name).read_bytes()
        (tmp_path / "b" / name).write_bytes(content)
        with pytest.raises(TokenCreditError, match=name.rpartition("/")[2]):
            run_bench(config, tmp_path / "b")
        (tmp_path / "b" / name).write_bytes(kept)


def test_a_damaged_part_is_measured_again_and_an_older_folder_goes_on(letters: str, tmp_path: Path) -> None:
    config = small(model=letters, tasks=("support.bench_task:letters",), chat=False)
    whole = run_bench(config, tmp_path)
    folder = tmp_path / "support.bench_task.letters-given"
    for content in (b"", b"\x00" * 300):
        (folder / "cell.json").unlink()
        (folder / "part-000.safetensors").write_bytes(content)
        again = run_bench(config, tmp_path)
        assert again["cells"][0]["methods"] == whole["cells"][0]["methods"]
    old = json.loads((tmp_path / "config.json").read_text())
    del old["chat"]  # as a folder that was begun before the key existed
    (tmp_path / "config.json").write_text(json.dumps(old))
    run_bench(config, tmp_path)
    with pytest.raises(TokenCreditError, match="chat = False, asked for is True"):
        run_bench(config.replace(chat=True), tmp_path)


def test_other_spellings_are_counted_and_the_success_is_a_lower_bound(words: str, tmp_path: Path) -> None:
    config = small(model=words, dtype="float64", rollouts=2000)
    worlds = {
        name: load_world(config, f"test_bench_inputs:{name}", "given")
        for name in ("one_spelling", "both_spellings", "as_text")
    }
    listed, both, text = (float(world.credit.prompt_values.mean()) for world in worlds.values())
    assert text == pytest.approx(both)  # a text stands for all its spellings
    sampled = draw(worlds["one_spelling"], config, 0)
    share = float(sampled.respelled.double().mean())
    assert share > 0 and not bool(sampled.batch.rewards[sampled.respelled].any())
    assert share == pytest.approx(both - listed, abs=4 * (share / 4000) ** 0.5)  # the mass that the list leaves out
    assert not bool(draw(worlds["both_spellings"], config, 0).respelled.any())
    results = run_bench(config.replace(tasks=("test_bench_inputs:one_spelling",)), tmp_path)
    (cell,) = results["cells"]
    assert cell["success"]["other_spellings"] > 0
    assert "at least" in render_bench(results) and any("as token ids" in note for note in notes(cell))


def test_a_list_that_misses_a_text_is_still_refused(words: str, tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match="the verifier and the list disagree"):
        run_bench(small(model=words, tasks=("test_bench_inputs:wrong_text",), rollouts=300), tmp_path)


wrong_text = Spelled(["ba"])


def test_nothing_to_compare_is_said_instead_of_a_table(
    letters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_bench(small(model=letters, tasks=("test_bench_inputs:unlikely",), rollouts=2), tmp_path)
    (cell,) = results["cells"]
    assert cell["methods"] == [] and cell["nothing"] == "no sampled response was right"
    print_table(cell)
    print_notes(cell)
    assert "nothing can be compared: no sampled response was right" in capsys.readouterr().out
    assert "nothing can be compared" in render_bench(results)


def test_cosines_stay_cosines() -> None:
    draws = torch.linspace(0.5, 1.5, 101).double().numpy()
    one = torch.ones(1).double().numpy()
    assert _around(one * 0.9, one * 0.5, draws, 0.95, 1.0)[:] == pytest.approx((0.9, 0.925, 1.0))
    assert estimate_text([0.9, 0.8, 1.26], "expected_direction") == "0.90 [0.80, 1.00*]"
    assert estimate_text([-3.87, -3.93, -3.79], "expected_direction") == "noise*"
    assert estimate_text([3.59, None, None], "expected_direction") == "noise*"
    assert estimate_text([1.0 + 1e-12, 0.9, 1.0], "expected_direction") == "1.00 [0.90, 1.00]"
    assert estimate_text([6.82, 1.08, 21.66], "signal_to_noise") == "6.82 [1.08, 21.66]"
    assert estimate_text(None) == estimate_text([None, None, None]) == "–"


def test_prompts_are_what_training_sees() -> None:
    plain, chat = spelled(), spelled(template=TEMPLATE)
    bos, end = 2, plain.convert_tokens_to_ids(">")
    assert encode_prompt(plain, "ab:", "auto") == [bos, 13, 5]
    for prompt, asked in (("ab", "auto"), ("ab", True), ([{"role": "user", "content": "ab"}], False)):
        ids = encode_prompt(chat, prompt, asked)
        assert ids.count(bos) == 1 and ids[0] == bos and ids[-1] == end
    assert encode_prompt(chat, "ab", False) == [bos, 13]
    rendered = "<s>[user]ab>"  # the template was applied by the task: neither it nor a second BOS comes on top
    assert encode_prompt(chat, rendered, "auto") == encode_prompt(chat, "ab", True)
    for prompt, asked, message in (
        ("", "auto", None),
        (3, "auto", "is a text or a list of messages"),
        ([{"role": "user"}], "auto", "is a text or a list of messages"),
        ("ab", True, "has no chat template"),
    ):
        if message is None:
            assert encode_prompt(plain, prompt, asked) == [bos]
            continue
        with pytest.raises(TokenCreditError, match=message):
            encode_prompt(plain, prompt, asked)


def test_accepted_responses_as_ids() -> None:
    tokenizer = spelled()
    assert encode_listed(tokenizer, [[3, 4], [13, 1]]) == [[3, 4, 1], [13, 1]]
    for wrong in ([3, 99], ["a"], 3, [True], [-1]):
        with pytest.raises(TokenCreditError, match="a text or a list of token ids below 14"):
            encode_listed(tokenizer, [wrong])


def test_the_models_own_generation_settings_change_nothing(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokencredit.lab import sampler

    monkeypatch.setattr(sampler, "unsupported", lambda model: "another kind")
    world = load_world(small(model=words), "test_bench_inputs:one_spelling", "given")
    plain = sample_responses(world, 50, "test")[0]
    world.model.generation_config.repetition_penalty = 1e6
    world.model.generation_config.top_p = 0.1
    assert torch.equal(sample_responses(world, 50, "test")[0], plain)
    assert world.model.generation_config.top_p == 0.1


def test_seeding_moves_no_other_stream() -> None:
    state = torch.get_rng_state()
    with seeded(torch.device("cpu"), 3):
        first = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, torch.rand(2, generator=torch.Generator().manual_seed(3)))
    fakecuda.require()
    with fakecuda.session():
        kept = torch.cuda.get_rng_state()
        with seeded(torch.device("cpu"), 3):
            assert torch.equal(torch.cuda.get_rng_state(), kept)  # a model on the CPU leaves the device alone
        with seeded(torch.device("cuda:0"), 3):
            once = torch.rand(2, device="cuda")
        with seeded(torch.device("cuda:0"), 3):
            assert torch.equal(torch.rand(2, device="cuda"), once)
        assert torch.equal(torch.cuda.get_rng_state(), kept)


def test_markup_and_control_characters_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"direction": [0.5, 0.4, 0.6]}
    cell = {
        "task": "[/b]\x1b[31m", "stage": "given", "success": {"exact": 0.1, "sampled": 0.1},
        "sizes": {"prompts": 1, "accepted": 1}, "left_out": {"[/x]": "reason"}, "controls": ["m:f(layers=[a, b])"],
        "methods": [{"name": "m:f(layers=[a, b])", "matched": False, "figures": figures}],
    }  # fmt: skip
    print_table(cell)
    print_notes(cell)
    text = capsys.readouterr().out
    assert "m:f(layers=[a, b])" in text and "\x1b" not in text and "[/x]" in text
