"""How ranks decide alike: the fingerprint of the state of a rank, and the vote of ranks that decide on their hosts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from cachedit_fx.policies import Decision

_BITS = 24  # A float32 number represents every integer of so many bits.

RANKS_DIFFER = Decision(True, "ranks-differ")


def fingerprint_of(terms: tuple[object, ...] | None) -> tuple[float, float]:
    """Two float32 numbers that are equal on ranks whose `terms` are equal.

    Args:
        terms: Numbers, strings, booleans, None and tuples of these; None as a whole if this rank has to compute.
    """
    if terms is None:
        return -1.0, -1.0
    digest = int.from_bytes(hashlib.blake2b(repr(terms).encode(), digest_size=_BITS // 4).digest(), "big")
    high, low = divmod(digest, 1 << _BITS)
    return float(high), float(low)


def vote(decide: Callable[[], Decision], groups: Sequence[str], device: torch.device) -> Decision:
    """The decision of this rank; to compute if any rank of the groups does.

    All ranks have to call it. It costs one all-reduce of two floats for each group, and one read from the device.

    Raises:
        RuntimeError: `decide` raised an error on another rank. An error that it raises on this rank is raised after the
            vote.
    """
    decision, failure = RANKS_DIFFER, None
    try:
        decision = decide()
    except Exception as error:
        failure = error
    numbers = [float(decision.compute), float(failure is not None)]
    ours = torch.tensor(numbers, dtype=torch.float32, device=device)
    collectives = torch.ops._c10d_functional
    for name in groups:
        ours = collectives.wait_tensor(collectives.all_reduce(ours, "max", name))
    computes, failed = ours.tolist()
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(
            "cachedit_fx: this call ends because the decider raised an error on another rank, which runs the same "
            "blocks together with this one; see the log of that rank"
        )
    return RANKS_DIFFER if computes and not decision.compute else decision
