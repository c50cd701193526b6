"""Checks cachedit_fx on a GPU, and measures it beside plain torch.compile and other caches. One command:

    make bench-gpu PY=python                               # or: python -m benchmarks.gpu
    make bench-gpu PY=python ARGS="--minutes 11 --out gpu-results"

It runs from the source tree in an existing environment with torch 2.11 or later and diffusers. Nothing is built,
installed or downloaded: the models have the sizes of published ones and random weights. cache-dit and torchao are used
if they are installed. Triton needs a C compiler.

The checks come first (see `checks.py` and `cases.py`): outputs with the cache off and with reused steps, in several
modes of Inductor with and without CUDA graphs, the waits of the host, recompilations, and the inputs that CUDA graphs
copy. Then FLUX.1-dev, Qwen-Image and Wan 2.1 are measured with blocks of their real shapes, at reduced depth and, if
time is left, at full depth (see `speed.py`). Every case and every variant runs in a process of its own. If one fails or
hangs, the others are not affected. What is expected to take longer than the time that is left is omitted and listed.

The folder of the results has `results.json`, `page.html` and `page.md`. The JSON file is written again after every
check and measurement, the pages after every item, also if the run is interrupted. The exit status is 1 if a check
failed, 2 if the run was interrupted, and otherwise 0.

    python -m benchmarks.gpu --device cpu --tiny           # a dry run in one process, with the eager inner backend
"""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import figures
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.page import ORDER, write_pages
from benchmarks.gpu.plan import Run
from benchmarks.gpu.processes import kill_all
from benchmarks.gpu.records import Results
from benchmarks.gpu.speed import ITEMS
from benchmarks.variants import VARIANTS

RESERVE = 8.0  # Seconds kept for ending the workers and writing the pages.
FINISHED = "finished"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)


class InterruptedRunError(BaseException):
    """The process got a signal, or the time is over."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=11, help="for everything (11)")
    add("--out", type=Path, default=Path("gpu-results"), help="the folder of the results (gpu-results)")
    add("--cases", nargs="*", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    add("--items", nargs="*", choices=ITEMS, default=list(ITEMS), metavar="NAME", help=", ".join(ITEMS))
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add("--rounds", type=int, help="generations of every variant (by default 2 or 3)")
    add("--waits", type=int, default=1, help="allowed waits of the host at a call that measures a diff (1)")
    add("--static-waits", type=int, default=0, help="allowed waits of the host at a call that a mask decides (0)")
    add("--jobs", type=int, default=4, help="cases that are checked at the same time (4)")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--tiny", action="store_true", help="the smallest sizes: a dry run")
    add("--inner", help="the inner backend (inductor; on a CPU eager)")
    in_one = "run everything in this process, without limits for each item (by default on a CPU only)"
    add("--in-process", action=argparse.BooleanOptionalAction, help=in_one)
    args = parser.parse_args(argv)
    args.in_process = args.device == "cpu" if args.in_process is None else args.in_process
    args.inner = args.inner or ("eager" if args.device == "cpu" else "inductor")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything, and returns the exit status."""
    started, args = time.monotonic(), parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    results = Results(_about(args), out / "results.json", lambda: write_pages(results.data, out))
    deadline = started + 60 * args.minutes - RESERVE
    state = FINISHED
    with _handlers_restored(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True, prefix="bench-gpu-") as folder:
        run = Run(args, results, deadline, Path(folder))
        try:
            with _interruptible(deadline - time.monotonic() + RESERVE / 2):
                run.run()
        except InterruptedRunError as interrupted:
            state = f"interrupted: {interrupted}"
        except BaseException as error:
            state = f"interrupted: {type(error).__name__}: {str(error)[:400]}"
            raise
        finally:
            kill_all()
            run.skip_all(state)
            results.finish(state)
    verdicts = [check["verdict"] for check in results.data["checks"]]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ORDER)
    print(f"{state}; checks: {counts}; {out / 'page.html'}", flush=True)
    return 2 if state != FINISHED else int(results.has_failed)


@contextmanager
def _interruptible(seconds: float) -> Iterator[None]:
    """Raises `InterruptedRunError` in the block at a signal to end, and after `seconds`. Later signals are ignored."""

    def interrupt(number: int, _frame: Any) -> NoReturn:
        signal.setitimer(signal.ITIMER_REAL, 0)
        name = signal.Signals(number).name
        raise InterruptedRunError("the time is over" if name == "SIGALRM" else name)

    for number in SIGNALS:
        signal.signal(number, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in SIGNALS:  # They would prevent that the results are written.
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handlers_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _about(args: argparse.Namespace) -> dict[str, Any]:
    try:
        hardware = figures.hardware(args.device)
    except Exception as error:  # The checks say what that means.
        hardware = f"no {args.device} device ({type(error).__name__}: {error})"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"command": figures.command("benchmarks.gpu"), "hardware": hardware, "versions": figures.versions()}
    return {**about, "device": args.device, "inner": args.inner, "minutes": args.minutes, "began": now}


if __name__ == "__main__":
    sys.exit(main())
