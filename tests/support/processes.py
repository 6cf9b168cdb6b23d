"""Ranks for tests: processes forked from a server that has imported the hosts once, so that each costs little."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tokencredit.adapters.trl.trainer", "tokencredit.lab.model", "trl_setup"])


def run_ranks(
    world: int, folder: Path, function: Callable[..., Any], *arguments: Any, timeout: float = 900.0
) -> list[int]:
    """Exit codes of `world` processes that call `function(*arguments)` as ranks of one gloo group.

    What they print lies in `folder/rank<N>.txt`. One that does not end within `timeout` is killed: -9.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    started = [
        CONTEXT.Process(target=_run, args=(rank, world, port, str(folder), function, arguments))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in started]


def printed(folder: Path) -> str:
    """What all ranks printed."""
    return "".join(path.read_text() for path in sorted(folder.glob("rank*.txt")))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _run(
    rank: int, world: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} if world > 1 else {}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"}
    output = os.open(f"{folder}/rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))  # gloo now and then aborts an interpreter that shuts down
