"""Running a command that ends with this process: whatever ends the search ends the command and its workers."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.evaluate.records import EvaluationFailed

RUNNING = ".running"

# A process of its own, outside our process group: it sees the pipe close when we are gone, however we went.
_WATCH = """
import os, signal, sys
group = sys.stdin.readline().strip()
sys.stdin.read()
if group:
    try:
        os.killpg(int(group), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def run_command(arguments: Sequence[str], folder: Path, log: Path, timeout: float) -> int:
    """Run a command to its end and return its exit status; its output goes to `log`.

    The command and the processes that it started are killed when the time is up, when this process is interrupted, and
    also when it is killed.

    Raises:
      EvaluationFailed: no end within `timeout` seconds.
      TokenCreditError: the command cannot be started, or an earlier one still runs in `folder`.
    """
    with _held(folder) as lock, _watcher() as watcher:
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[lock],
                )
        except (OSError, ValueError) as error:
            raise TokenCreditError(
                f"the evaluator's command cannot be started: {error}", hint="check `evaluator.command`"
            ) from error
        try:
            assert watcher.stdin is not None
            watcher.stdin.write(f"{process.pid}\n".encode())
            watcher.stdin.flush()
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise EvaluationFailed(f"no result after {timeout:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # a command that starts workers must not leave them behind
            process.wait()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[int]:
    """Lock a run's folder with a file that the command inherits, so that the lock lasts as long as the command."""
    try:
        descriptor = os.open(folder / RUNNING, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise TokenCreditError(f"cannot write {str(folder / RUNNING)!r}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TokenCreditError(
                f"the command of an earlier search still runs in {folder}",
                hint="wait until it ends, or end it; two commands in one folder would mix their results",
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _watcher() -> Iterator[subprocess.Popen[bytes]]:
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCH],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield watcher
    finally:
        watcher.kill()  # before the pipe closes: the command has ended and its id may be another's soon
        watcher.wait()
        if watcher.stdin is not None:
            with contextlib.suppress(OSError):
                watcher.stdin.close()
