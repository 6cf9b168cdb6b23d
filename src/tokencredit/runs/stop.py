"""Ctrl-C and SIGTERM: finish the step, save a checkpoint, say where the run goes on."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from tokencredit.progress import say
from tokencredit.runs import processes

RESUME = "the same command goes on from the last checkpoint"
AGAIN_AFTER = 1.0  # seconds; a launcher passes the terminal's Ctrl-C on, so that a process gets it twice


class Stopped(BaseException):
    """A signal ended the run. `code` is the exit code that a shell expects: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number
        self.message = message


class Stop:
    """Catch the first Ctrl-C or SIGTERM while a run trains; a second Ctrl-C ends it at once.

    Use as a context in the main thread. Outside training a signal ends the command immediately.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.training = False
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if not self.training:
            self._leave(number)
        if self.number is None:
            self.number, self._at = number, time.monotonic()
            if processes.is_main():
                say(f"{signal.Signals(number).name}: finishing this step and saving a checkpoint; Ctrl-C quits at once")
        elif number == signal.SIGINT and time.monotonic() - self._at > AGAIN_AFTER:
            self._leave(number)

    def _leave(self, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(number, f"stopped by {signal.Signals(number).name}")
