"""The shipped accelerate configs as accelerate reads them, and what `doctor` says of launchers."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from tokencredit.doctor import launchers

EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}


def launched(name: str) -> Any:
    """The arguments that `accelerate launch` goes on with, after it has read the file."""
    line = ["--config_file", str(EXAMPLES / f"{name}.yaml"), "--num_processes", "2"]
    parsed = launch_command_parser().parse_args([*line, "-m", "tokencredit.cli.main", "train", "config.yaml"])
    return _validate_launch_command(parsed)[0]


def test_every_shipped_file_is_tested() -> None:
    assert sorted(path.stem for path in EXAMPLES.iterdir()) == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_shipped_configs(name: str) -> None:
    found = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert isinstance(found, ClusterConfig)
    assert str(found.distributed_type.value) == KINDS[name]
    arguments = launched(name)
    assert (arguments.num_processes, arguments.module, arguments.use_cpu) == (2, True, False)
    assert arguments.training_script == "tokencredit.cli.main"
    flags = arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed
    assert flags == (KINDS[name] == "MULTI_GPU", KINDS[name] == "FSDP", KINDS[name] == "DEEPSPEED")
    # A key that the launcher does not know would be dropped without a word.
    for section in (found.fsdp_config or {}, found.deepspeed_config or {}):
        assert [key for key in section if not hasattr(arguments, key)] == []


@pytest.mark.parametrize(("name", "stage"), [("deepspeed_zero2", 2), ("deepspeed_zero3", 3)])
def test_the_stage_of_zero(name: str, stage: int) -> None:
    assert int(launched(name).zero_stage) == stage


def test_the_fsdp_config_is_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in prepare_multi_gpu_env(launched("fsdp2")).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.parametrize(
    ("environment", "gpus", "status", "words"),
    [
        ({}, 0, "note", "one"),
        ({}, 4, "note", "4 GPUs: the others stay idle"),
        ({"WORLD_SIZE": "2"}, 0, "fail", "RANK=(unset)"),
        ({"RANK": "0"}, 0, "fail", "WORLD_SIZE=(unset)"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, 0, "fail", "do not belong together"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 0, "ok", "rank 1 of 2"),
        ({"WORLD_SIZE": "8", "RANK": "1", "LOCAL_WORLD_SIZE": "8"}, 4, "fail", "8 processes on this machine share 4"),
    ],
)
def test_variables_of_a_launcher(environment: dict[str, str], gpus: int, status: str, words: str) -> None:
    found = launchers.processes(environment, gpus)
    assert found["status"] == status and words in found["found"]
    assert bool(found["fix"]) == (status == "fail")


@pytest.mark.parametrize(
    ("visible", "gpus", "nvidia", "status", "words"),
    [
        (None, 0, False, "note", "no GPU"),
        ("", 0, True, "fail", "hides every GPU"),
        ("-1", 0, True, "fail", "hides every GPU"),
        (None, 0, True, "fail", "does not see it"),
        ("0,1,7", 2, True, "fail", "names 3 GPUs, torch sees 2"),
        ("0,1", 2, True, "ok", "2 GPU"),
    ],
)
def test_devices(visible: str | None, gpus: int, nvidia: bool, status: str, words: str) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = launchers.devices(environment, gpus, nvidia=nvidia)
    assert found["status"] == status and words in found["found"]


@pytest.mark.parametrize(
    ("changes", "gpus", "status", "words"),
    [
        ({"num_processes": 8}, 8, "ok", "8 processes, MULTI_GPU"),
        ({"num_processes": 1}, 8, "fail", "8 GPUs: the others stay idle"),
        ({"num_processes": 4, "use_cpu": True}, 0, "fail", "starts one process"),
        ({"num_processes": 4, "distributed_type": "MULTI_CPU"}, 0, "fail", "starts one process"),
        ({"num_processes": 4, "distributed_type": "NO"}, 0, "fail", "starts one process"),
        ({"num_processes": 4, "distributed_type": "FSDP"}, 0, "note", "weights are not sharded"),
    ],
)
def test_the_users_accelerate_config(
    tmp_path: Path, changes: dict[str, Any], gpus: int, status: str, words: str
) -> None:
    path = tmp_path / "default_config.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU"} | changes))
    found = launchers.accelerate(path, gpus)
    assert found["status"] == status and words in found["found"]
    assert bool(found["fix"]) == (status == "fail")


def test_a_config_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- 1")
    assert launchers.accelerate(tmp_path / "missing.yaml", 0)["status"] == "note"
    assert launchers.accelerate(tmp_path / "broken.yaml", 0)["status"] == "fail"
    assert launchers.accelerate(tmp_path / "list.yaml", 0)["status"] == "fail"
    assert launchers.default_config({"HF_HOME": "/somewhere"}) == Path("/somewhere/accelerate/default_config.yaml")


def test_threads_of_several_processes() -> None:
    assert launchers.threads({"LOCAL_WORLD_SIZE": "1"})["status"] == "ok"
    crowded = launchers.threads({"LOCAL_WORLD_SIZE": "1000"})
    assert crowded["status"] == "fail" and crowded["fix"] == "set OMP_NUM_THREADS=1"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: [", b"- 1\n", b"[" * 3000])
def test_an_unreadable_config_of_accelerate_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "default_config.yaml"
    path.write_bytes(content)
    found = launchers.accelerate(path, gpus=0)
    assert found["status"] == "fail"
    assert "\n" not in found["found"]
