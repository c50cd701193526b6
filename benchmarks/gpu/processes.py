"""Runs workers in processes of their own, several at a time, with deadlines; or in this process, for a dry run.

A worker answers a command with any number of records (`{"record": ...}`) and then with `{"answer": ...}` or
`{"error": ...}`, each as one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

ROOT = Path(__file__).resolve().parent.parent.parent
Message = dict[str, Any]
Messages = queue.Queue[tuple[str, Message]]  # The name of the worker, and what it sent.
OnRecord = Callable[[str, Message], None]
_live: dict[int, Process] = {}  # By the process id.


class Worker(Protocol):
    """A worker that receives commands.

    Attributes:
        name: A name that no other worker has at the same time.
    """

    name: str

    def send(self, command: str, messages: Messages) -> None:
        """Sends a command. What the worker answers is put into `messages`."""

    def kill(self) -> None:
        """Ends the worker and everything that it started."""


class Process:
    """A worker process with its own caches of Inductor.

    Args:
        command: What to run; by default the worker of this package.
        spec: What the worker is for, as JSON.
        folder: The folder of its caches, and of its log.
    """

    def __init__(
        self,
        name: str,
        spec: Mapping[str, Any],
        folder: Path,
        *,
        command: Sequence[str] = (sys.executable, "-u", "-m", "benchmarks.gpu.worker"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        variables = {
            "CACHE_DIT_LOG_LEVEL": "error",
            "CACHE_DIT_FLUX_ENABLE_DUMMY_BLOCKS": "1",  # One decision for both block lists, as everywhere here.
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            **(environment or {}),
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, json.dumps(dict(spec))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=variables,
                cwd=ROOT,
                start_new_session=True,  # Inductor starts processes, which have to end with the worker.
            )
        _live[self._process.pid] = self
        self._messages: Messages | None = None
        self._reader: threading.Thread | None = None

    def send(self, command: str, messages: Messages) -> None:
        if self._reader is not None and not self._reader.is_alive():
            messages.put((self.name, {"error": "the worker had ended"}))
            return
        self._messages = messages
        if self._reader is None:
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # The reader reports the end of the worker.
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None and self._messages is not None
        stdout: IO[str] = self._process.stdout
        for line in stdout:
            with contextlib.suppress(json.JSONDecodeError):  # What libraries print is no message.
                message = json.loads(line)
                if isinstance(message, dict):
                    self._messages.put((self.name, message))
        code = self._process.wait()
        self._messages.put((self.name, {"error": f"the worker ended with code {code}{self._last_words()}"}))

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return f": {lines[-1].strip()[:300]}" if lines else ""

    def kill(self) -> None:
        if _live.pop(self._process.pid, None) is not None:  # Later, the number may be that of another process.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Local:
    """A worker in this process. A command runs while it is sent, and nothing can interrupt it.

    Args:
        make: Makes the object whose methods are the commands.
    """

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        self._make, self._made = make, None

    def send(self, command: str, messages: Messages) -> None:
        from benchmarks.gpu.worker import answer

        if self._made is None:
            self._made = self._make()
        messages.put((self.name, answer(self._made, command, lambda record: messages.put((self.name, record)))))

    def kill(self) -> None:
        self._made = None


def ask(
    workers: Sequence[Worker], command: str, deadline: float, on_record: OnRecord = lambda _name, _record: None
) -> dict[str, Message]:
    """Sends a command to workers at the same time, and returns their answers by name.

    A worker that has not answered at the deadline (a value of `time.monotonic`) is killed; its answer is an error.
    """
    messages: Messages = queue.Queue()
    answers: dict[str, Message] = {}
    for worker in workers:
        worker.send(command, messages)
    while len(answers) < len(workers):
        left = deadline - time.monotonic()
        try:  # What has been answered is read also after the deadline.
            name, message = messages.get(timeout=left) if left > 0 else messages.get_nowait()
        except queue.Empty:
            break
        if "record" in message:
            on_record(name, message["record"])
        else:
            answers.setdefault(name, message)
    for worker in workers:
        if worker.name not in answers:
            worker.kill()
            answers[worker.name] = {"error": f"no answer to {command!r} in the time that it had"}
    return answers


@dataclass(frozen=True)
class Task:
    """A command for a worker that is started when it is its turn.

    Attributes:
        seconds: The expected duration, including the start.
        limit: When to kill the worker, in seconds after its start.
    """

    name: str
    start: Callable[[], Worker]
    command: str
    seconds: float
    limit: float


def run_pool(
    tasks: Sequence[Task],
    jobs: int,
    start_until: float,
    deadline: float,
    on_record: OnRecord,
    on_end: Callable[[Task, Message, float], None],
) -> list[Task]:
    """Runs tasks, `jobs` at a time. Returns those that were not started, because they would end too late.

    Args:
        start_until: A task is started if it is expected to end before this value of `time.monotonic`.
        deadline: When workers that are still running are killed. Their answers have the key `is_out_of_time`.
        on_end: Called with each task that ran, its answer, and how many seconds it took.
    """
    waiting, left_out, messages = [*tasks], list[Task](), queue.Queue[tuple[str, Message]]()
    running: dict[str, tuple[Task, Worker, float]] = {}

    def end(name: str, message: Message) -> None:
        task, worker, started = running.pop(name)
        worker.kill()
        on_end(task, message, time.monotonic() - started)

    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop(0)
            if time.monotonic() + task.seconds > start_until:
                left_out.append(task)
                continue
            running[task.name] = task, (worker := task.start()), time.monotonic()
            worker.send(task.command, messages)
        ends = {name: min(deadline, began + task.limit) for name, (task, _, began) in running.items()}
        left = min(ends.values(), default=0.0) - time.monotonic()
        try:  # What has been answered is read also after the deadline.
            name, message = messages.get(timeout=left) if left > 0 else messages.get_nowait()
        except queue.Empty:
            for name in [name for name, at in ends.items() if at <= time.monotonic()]:
                is_out_of_time = ends[name] >= deadline
                why = "no time was left" if is_out_of_time else f"no end after {running[name][0].limit:.0f} s"
                end(name, {"error": f"{why}; the worker was killed", "is_out_of_time": is_out_of_time})
            continue
        if "record" in message:
            on_record(name, message["record"])
        elif name in running:
            end(name, message)
    return left_out


def kill_all() -> None:
    """Ends all worker processes."""
    for process in [*_live.values()]:
        process.kill()
