"""Runs in processes of their own: several at a time, one per GPU, and a process that is killed is named."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from tokencredit.errors import TokenCreditError
from tokencredit.progress import say
from tokencredit.runs.stop import RESUME, Stop, Stopped

PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL = 1.0  # seconds between looks at the runs
PATIENCE = 120.0  # seconds that a run has to finish its step and save a checkpoint
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Job(NamedTuple):
    """One run: a name for messages, its config as a mapping that every process reads for itself, and its folder."""

    name: str
    config: dict[str, Any]
    folder: str


class _Worker:
    """A process that trains one job after another, on one GPU where there are several."""

    def __init__(self, device: str | None) -> None:
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,))
        self.job: Job | None = None
        with _visible(device):  # the child must not see the others before it imports torch
            self.process.start()
        other.close()

    def start(self, job: Job) -> None:
        self.job = job
        self.pipe.send(job)

    def poll(self) -> bool:
        """Tell whether the job is done; raise what stopped it."""
        if self.job is None:
            return False
        try:
            if not self.pipe.poll():
                if self.process.is_alive():
                    return False
                raise EOFError
            answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join(POLL)
            raise _killed(self.job.name, self.process.exitcode) from error
        job, self.job = self.job, None
        if answer is not None:
            _raise_answer(job.name, answer)
        return True


def run_jobs(jobs: Sequence[Job], at_once: int, look: Callable[[], None]) -> None:
    """Train all jobs, `at_once` at a time.

    Args:
      jobs: what to train.
      at_once: number of processes. With several GPUs every process sees one of them, in turn.
      look: called about once per second, to show progress.

    Raises:
      TokenCreditError: a run refused its config, or its process was killed; the message names the run. The other runs
        save a checkpoint and end.
    """
    devices = visible_devices()
    waiting = list(jobs)
    workers: list[_Worker] = []
    try:
        for number in range(min(at_once, len(jobs))):
            workers.append(_Worker(devices[number % len(devices)] if len(devices) > 1 else None))
            workers[-1].start(waiting.pop(0))
        while any(worker.job is not None for worker in workers):
            time.sleep(POLL)
            for worker in workers:
                if worker.poll() and waiting:
                    worker.start(waiting.pop(0))
            look()
    finally:
        _end(workers)


def default_jobs(threads: int | None, *, lab: bool) -> int:
    """One run per GPU; without a GPU one per group of `threads` processors for lab models, and one for any other."""
    devices = len(visible_devices())
    if devices:
        return devices
    return max(1, (os.cpu_count() or 1) // (threads or 1)) if lab else 1


def visible_devices() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return named or [str(number) for number in range(torch.cuda.device_count())]


@contextmanager
def _visible(device: str | None) -> Iterator[None]:
    before = os.environ.get(VISIBLE)
    if device is not None:
        os.environ[VISIBLE] = device
    try:
        yield
    finally:
        if before is not None:
            os.environ[VISIBLE] = before
        elif device is not None:
            del os.environ[VISIBLE]


def _end(workers: Sequence[_Worker]) -> None:
    """End all processes; one that trains finishes its step and saves a checkpoint first."""
    busy = [worker for worker in workers if worker.job is not None and worker.process.is_alive()]
    for worker in workers:
        if worker.process.is_alive():
            worker.process.terminate()
    if busy:
        say("waiting for the runs to save a checkpoint; Ctrl-C quits at once")
    deadline = time.monotonic() + PATIENCE
    try:
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in workers:
            if worker.process.is_alive():
                worker.process.kill()


def _serve(pipe: Any) -> None:
    """Train jobs from the pipe until it closes; in a process that ends with the command that started it."""
    if sys.platform == "linux":  # elsewhere the run's callback notices that the command is gone
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with Stop() as stop:
        try:
            while True:
                job = pipe.recv()
                pipe.send(_train(job, stop))
        except (EOFError, KeyboardInterrupt, Stopped, ConnectionError):
            return


def _train(job: Job, stop: Any) -> dict[str, Any] | None:
    """Train one job; what stopped it, or None."""
    os.environ.setdefault("OMP_NUM_THREADS", str(job.config["threads"] or 1))
    from tokencredit.runs.train import train_run

    try:
        train_run(job.config, Path(job.folder), stop=stop)
    except TokenCreditError as error:
        return {"message": error.message, "hint": error.hint}
    except Exception as error:  # a bug, or a fault of this machine: the command explains it
        import traceback

        return {"kind": type(error).__name__, "text": str(error), "traceback": traceback.format_exc()}
    return None


def _raise_answer(name: str, answer: Mapping[str, Any]) -> None:
    if "message" in answer:
        raise TokenCreditError(f"{name}: {answer['message']}", hint=answer["hint"])
    if answer["kind"] in ("OutOfMemoryError", "MemoryError"):
        text = " ".join(answer["text"].split())[:300]
        raise TokenCreditError(
            f"{name}: out of memory: {text}",
            hint="pass --jobs 1, or lower trainer.per_device_train_batch_size",
        )
    raise RuntimeError(f"{name}: {answer['kind']}: {answer['text']}\n\n{answer['traceback']}")


def _killed(name: str, code: int | None) -> TokenCreditError:
    if code is not None and code < 0:
        by = signal.Signals(-code).name
        reason = " (the system ends a process so when memory is full)" if by == "SIGKILL" else ""
        return TokenCreditError(
            f"{name}: its process was ended by {by}{reason}", hint=f"{RESUME}; --jobs 1 needs less memory"
        )
    return TokenCreditError(f"{name}: its process ended with exit code {code}", hint=RESUME)
