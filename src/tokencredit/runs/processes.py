"""The processes of one run, as torchrun and `accelerate launch` start them: who speaks, who writes, how they leave."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tokencredit.errors import TokenCreditError

Result = TypeVar("Result")

# Set by `tokencredit train --launch`, whose own process then tells what went wrong: how many processes it started.
LAUNCHED = "TOKENCREDIT_LAUNCHED"
# Where torchrun's agent looks for the reason of a failure.
REASON = "TORCHELASTIC_ERROR_FILE"

# What gloo and NCCL say where another process has gone; none of it is the reason why a run stops.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Socket Timeout",
)

MET: set[int] = set()  # this process, once it has waited for the others


def size() -> int:
    """How many processes train together; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """The number of this process among them."""
    return _number("RANK", 0)


def is_main() -> bool:
    """Whether this process writes the results."""
    return rank() == 0


def _number(name: str, default: int) -> int:
    given = os.environ.get(name, "").strip()
    return int(given) if given.isdigit() else default  # `check` refuses what is no number


def check() -> None:
    """Refuse an environment that would train something else than what was asked for."""
    for name in ("WORLD_SIZE", "RANK"):
        given = os.environ.get(name, "").strip()
        if given and not given.isdigit():
            raise TokenCreditError(f"{name} must be a whole number, got {given!r}", hint=f"unset {name}")
    expected = os.environ.get(LAUNCHED)
    if expected is not None and int(expected) != size():
        raise TokenCreditError(f"{expected} processes were asked for, WORLD_SIZE is {size()}", hint="unset WORLD_SIZE")
    if size() > 1 and "RANK" not in os.environ:
        raise TokenCreditError(
            f"WORLD_SIZE is {size()}, but RANK is not set: one process would wait for the others forever",
            hint="start with `tokencredit train --launch torchrun --nproc-per-node N`, or unset WORLD_SIZE",
        )
    if not 0 <= rank() < size():
        raise TokenCreditError(f"RANK must be below WORLD_SIZE, got RANK={rank()} and WORLD_SIZE={size()}")


def from_main(work: Callable[[], Result]) -> Result:
    """What `work` returns on the main process, on every process; nobody goes on before it is done."""
    if size() == 1:
        return work()
    import torch

    MET.add(os.getpid())
    torch.distributed.barrier()  # whoever still reads what `work` changes is done first
    shared: list[Any] = [work() if is_main() else None]
    torch.distributed.broadcast_object_list(shared, src=0)
    result: Result = shared[0]
    return result


def lost_another(error: BaseException) -> bool:
    """Whether `error` only says that another process has gone."""
    return size() > 1 and any(words in str(error) for words in LOST)


def speaks() -> bool:
    """Whether this process tells the user what is wrong, so that it is told once.

    Before the processes have met all of them find the same; afterwards the one that fails speaks. Under
    `tokencredit train --launch` the launching process does, from what `leave_reason` left.
    """
    alone = is_main() or rank() >= size()  # the second is what `check` refuses
    return LAUNCHED not in os.environ and (alone or os.getpid() in MET)


def name() -> str:
    """What to put in front of a message: the rank, once the processes have met."""
    return f"rank {rank()}: " if size() > 1 and os.getpid() in MET else ""


def _together() -> bool:
    if "torch" not in sys.modules:  # nothing can have met
        return False
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave_reason(message: str, hint: str | None = None, *, lost: bool = False) -> None:
    """Leave the reason of a failure to the launcher; `lost`: it is only that another process has gone."""
    path = os.environ.get(REASON)
    if not path or size() == 1:
        return
    more = {"timestamp": str(int(time.time())), "hint": hint, "lost": lost, "py_callstack": message}
    Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": more}}))


def leave(code: int) -> int:
    """`code`; one process of several ends here, as gloo now and then aborts an interpreter that shuts down."""
    if size() == 1 or not _together():
        return code
    if code == 0:
        with suppress(RuntimeError):  # whoever leaves first closes the connection; all results are written
            import torch

            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
