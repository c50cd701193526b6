"""Starts a worker and reads its answers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from benchmarks.driver import ROOT
from benchmarks.quality_runners import NEEDS
from benchmarks.quality_worker import Job


def run(job: Job, keep: Callable[[dict[str, Any]], None]) -> str:
    """Runs a worker, and returns why it ended early, or an empty string.

    Args:
        keep: Called with the results for the uncached model, as {"reference": ...}, and for every configuration.
    """
    needed = NEEDS.get(job.family)
    if needed is not None and importlib.util.find_spec(needed) is None:
        return f"{needed} is not installed"
    count = 0
    with (
        tempfile.TemporaryDirectory() as cache,
        tqdm(total=len(job.names), desc=f"{job.model}, {job.task}, {job.family}", unit="configuration") as bar,
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.quality_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(cache),
            cwd=ROOT,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(dataclasses.asdict(job)))
        process.stdin.close()
        for line in process.stdout:
            answer = json.loads(line)
            keep(answer)
            if "reference" not in answer:
                count += 1
                bar.update()
    return f"the worker ended with {process.returncode} after {count} of {len(job.names)}" if process.returncode else ""


def environment(cache: str) -> dict[str, str]:
    """Returns environment variables that set one thread, and a separate folder for Inductor's on-disk caches."""
    return {
        "CACHE_DIT_LOG_LEVEL": "error",
        "CACHE_DIT_FLUX_ENABLE_DUMMY_BLOCKS": "1",  # One decision for both block lists, as ours makes.
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": cache,
    }
