"""`tokencredit train --launch torchrun`: start the processes, pass their exit code on, say once what stopped them."""

import logging
import os
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokencredit.errors import TokenCreditError
from tokencredit.runs import processes
from tokencredit.runs.stop import RESUME


class Ended(NamedTuple):
    """How the processes of a run ended: an exit code, and what to tell the user unless it is 0."""

    code: int
    message: str = ""
    hint: str | None = None


def launch(arguments: Sequence[str], process_count: int) -> Ended:
    """Run `tokencredit ARGUMENTS` in `process_count` processes of this machine, through torchrun's agent.

    The exit code is that of the process which failed first, 128 + n where signal n ended it.
    """
    check(process_count)
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[processes.LAUNCHED] = str(process_count)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, which it warns of
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice on unused parameters, once a rank
    command = ["--standalone", "--nproc-per-node", str(process_count), "-m", "tokencredit.cli.main", *arguments]
    logging.disable(logging.ERROR)  # the agent's own tables; the reason follows in one line
    try:
        torchrun.run(torchrun.parse_args(command))
    except ChildFailedError as error:
        return _explain(error.failures)
    except SignalException as error:
        return Ended(128 + int(error.sigval), f"stopped by {error.sigval.name}", RESUME)
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[processes.LAUNCHED]
    return Ended(0)


def default_processes() -> int:
    """One for each GPU that this process sees."""
    import torch

    if not torch.cuda.is_available():
        raise TokenCreditError("`--launch` needs `--nproc-per-node` where there is no GPU", hint="--nproc-per-node 2")
    return torch.cuda.device_count()


def check(process_count: int) -> None:
    """Refuse a number that cannot be started, and a launcher inside a launcher."""
    if process_count < 1:
        raise TokenCreditError(f"`--nproc-per-node` must be at least 1, got {process_count}")
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        raise TokenCreditError(
            "`--launch` inside a launcher: RANK is set already", hint="leave out --launch under torchrun and accelerate"
        )


def _explain(failures: dict[int, Any]) -> Ended:
    """Why the first process stopped; those that only lost it do not count."""
    causes = {rank: failure for rank, failure in failures.items() if not _reason(failure).get("lost")} or failures
    # torchrun ends the others with SIGTERM, so that is the least of reasons.
    rank = min(causes, key=lambda rank: (causes[rank].exitcode == -signal.SIGTERM, causes[rank].timestamp, rank))
    failure, reason = causes[rank], _reason(causes[rank])
    if failure.exitcode < 0:
        return Ended(128 - int(failure.exitcode), f"rank {rank} was ended by {failure.signal_name()}", RESUME)
    if not reason:
        return Ended(int(failure.exitcode), f"rank {rank} ended with exit code {failure.exitcode}; its words are above")
    everywhere = all(_reason(item).get("text") == reason["text"] for item in failures.values())
    where = "" if everywhere and len(failures) > 1 else f"rank {rank}: "
    return Ended(int(failure.exitcode), f"{where}{reason['text']}", reason["hint"])


def _reason(failure: Any) -> dict[str, Any]:
    """What `processes.leave_reason` left for the launcher; empty where a process said nothing."""
    message = failure.error_file_data.get("message") if isinstance(failure.error_file_data, dict) else None
    if not isinstance(message, dict) or "lost" not in message.get("extraInfo", {}):
        return {}
    return {"text": message["message"], "hint": message["extraInfo"]["hint"], "lost": message["extraInfo"]["lost"]}
