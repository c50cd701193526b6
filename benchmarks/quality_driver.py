"""Starts a worker and reads its answers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from tqdm import tqdm

from benchmarks.driver import ROOT
from benchmarks.quality_runners import NEEDS
from benchmarks.quality_worker import Job

Answers = tuple[dict[str, Any], list[dict[str, Any]], str]


def run(job: Job) -> Answers:
    """Returns the results for the uncached model and every configuration, and why the worker ended early, if it did."""
    needed = NEEDS.get(job.family)
    if needed is not None and importlib.util.find_spec(needed) is None:
        return {}, [], f"{needed} is not installed"
    reference: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as cache,
        tqdm(total=len(job.names), desc=f"{job.task}, {job.family}", unit="configuration") as bar,
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.quality_worker", json.dumps(dataclasses.asdict(job))],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(cache),
            cwd=ROOT,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            if "reference" in answer:
                reference = answer["reference"]
            else:
                rows.append(answer)
                bar.update()
    failed = f"the worker ended with {process.returncode} after {len(rows)} of {len(job.names)} configurations"
    return reference, rows, failed if process.returncode else ""


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
