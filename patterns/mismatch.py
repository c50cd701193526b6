"""A miss is a value: why a template did not fit, where, and how far it got."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cachedit_fx.patterns.chain import BlockList
from cachedit_fx.patterns.template import BlockTemplate


class Cause(enum.Enum):
    """Why a template did not fit, or a region could not be cut. Closed: tests and users may switch on it."""

    NO_CHAIN = "no-chain"
    RESTRICTED = "restricted"
    STREAM_COUNT = "stream-count"
    STREAM_NAME = "stream-name"
    NO_CONTEXT = "no-context"
    EXTRA_CONTEXT = "extra-context"
    NO_EMITTED = "no-emitted"
    EXTRA_EMITTED = "extra-emitted"
    RETURN_ORDER = "return-order"
    TOO_FEW_BLOCKS = "too-few-blocks"
    UNPAIRED = "unpaired-stream"
    IN_PLACE = "in-place"
    STATE = "state"
    DYNAMIC = "data-dependent"
    GRADIENTS = "gradients"
    TRAINING = "training"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A template that did not fit (or, without one, a graph that cannot be cached at all). Falsy.

    Attributes:
        detail: One sentence: what was expected, what was found.
        node: Name of the graph node where it was seen.
        where: `file.py:line` of the user's code behind the node.
        progress: Blocks that did fit before the first that did not; ranks the nearest miss.
        total: Blocks there were.
    """

    template: BlockTemplate | None
    cause: Cause
    detail: str
    node: str | None = None
    where: str = ""
    progress: int = 0
    total: int = 0

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        head = f"{self.template}: " if self.template else ""
        at = f", at `{self.node}`" if self.node else ""
        return f"{head}{self.cause.value}: {self.detail}{at}{f' ({self.where})' if self.where else ''}"


@dataclass(frozen=True, slots=True)
class Match:
    """A block list that fits a template.

    Attributes:
        label: What users see: "pattern 1 (dual-stream, encoder first)"; "0 or 1" where the order of the block's
            return statement could not be read.
    """

    template: BlockTemplate
    blocks: BlockList
    label: str
