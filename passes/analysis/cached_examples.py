"""Fake tensors of what a session caches of a region."""

from __future__ import annotations

import torch

from cachedit_fx.passes.region import LiveOut, Region
from cachedit_fx.patterns.nodes import value_of


def cached_examples(region: Region) -> list[torch.Tensor]:
    """Fake tensors of all that is cached of a region: the probe, if there is one, then one value per live-out."""
    probe = [probe_example(region)] if region.probed_at is not None else []
    return [*probe, *(cached_example(pair) for pair in region.live_outs)]


def probe_example(region: Region) -> torch.Tensor:
    """A fake tensor of the probe, as it is cached."""
    assert region.probed_at is not None
    with torch.no_grad():
        now: torch.Tensor = value_of(region.probed_at)
        return now.clone() if region.probed_since is None else torch.sub(now, value_of(region.probed_since))


def cached_example(pair: LiveOut) -> torch.Tensor:
    """A fake tensor of the cached value of a live-out. It is contiguous if the stream is, and owns its storage."""
    with torch.no_grad():
        after: torch.Tensor = value_of(pair.after)
        if pair.before is not None and pair.is_measured:
            example: torch.Tensor = value_of(pair.before).clone()
            return example
        return torch.sub(after, value_of(pair.before)) if pair.before is not None else after.clone()
