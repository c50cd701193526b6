"""The closed list of reasons why something does not match. Data, no algorithm."""

from __future__ import annotations

import enum


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
    NO_PROBE = "no-probe"
    REACH = "reach"
    IN_PLACE = "in-place"
    STATE = "state"
    DYNAMIC = "data-dependent"
    EMPTY = "empty-batch"
    GRADIENTS = "gradients"
    TRAINING = "training"
