"""What a message says, whatever its lines."""

from __future__ import annotations

import re


def flat(message: str) -> str:
    """`stream-count: expected 2 ..., found 1 ... (at ...)`: the lines of a mismatch as one."""
    for name, before in (("expected", " expected "), ("found", ", found "), ("at", ", at ")):
        message = re.sub(rf"\n +{name}: +", before, message)
    return message.replace(":, found ", ": found ")
