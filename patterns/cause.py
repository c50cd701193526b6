"""The causes of mismatches."""

from __future__ import annotations

import enum


class Cause(enum.Enum):
    """Why a template does not fit, or why a region cannot be cut. The list is closed: code may depend on it."""

    NO_CHAIN = "no-chain"
    NO_TRANSFORMER = "no-transformer"
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
