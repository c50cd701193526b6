"""What a run finds, as plain data, and the file that it is written to after every addition."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        case: The name of the case (see `cases.Case`).
        name: The name of the check.
        expected: What was expected, in words.
        found: What was found, in words.
        verdict: `PASSED`, `FAILED` or `SKIPPED`.
        reason: Why the check was skipped, or the error because of which it failed; else empty.
        seconds: How long it took.
    """

    case: str
    name: str
    expected: str = ""
    found: str = ""
    verdict: str = PASSED
    reason: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Results:
    """Everything that a run has found so far. Every change is written to `path` at once.

    Args:
        about: The command, the machine and the versions.
        path: The JSON file.
        on_item: Called after every item.
    """

    def __init__(self, about: dict[str, Any], path: Path, on_item: Callable[[], None] = lambda: None) -> None:
        self.data: dict[str, Any] = {**about, "state": "running", "checks": [], "speed": [], "items": []}
        self._path, self._on_item, self._started = path, on_item, time.monotonic()
        self.write()

    def add_check(self, check: Check | dict[str, Any]) -> None:
        self.data["checks"].append(check.as_dict() if isinstance(check, Check) else check)
        self.write()

    def add_item(self, name: str, expected_seconds: float, seconds: float, note: str = "") -> None:
        """Adds an entry to the log of the items: what ran, how long it took, and why it did not run or end."""
        at = time.monotonic() - self._started
        entry = {"name": name, "expected_s": round(expected_seconds, 1), "took_s": round(seconds, 1), "at_s": round(at)}
        self.data["items"].append({**entry, "note": note})
        self.write()
        self._on_item()

    def finish(self, state: str) -> None:
        self.data["state"] = state
        self.data["took_s"] = round(time.monotonic() - self._started, 1)
        self.write()
        self._on_item()

    @property
    def has_failed(self) -> bool:
        """Whether a check failed, or none was made."""
        verdicts = [check["verdict"] for check in self.data["checks"]]
        return FAILED in verdicts or PASSED not in verdicts

    def write(self) -> None:
        """Writes the file. At no moment is it incomplete."""
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)
