"""Which steps to compute, written down beforehand: `steps_mask`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

from cachedit_fx.errors import ConfigError, did_you_mean, shown

Bins = tuple[list[int], list[int]]  # Runs of computed steps, and the runs of reused ones between them.

# Per policy the runs for so many steps: cache-dit 1.5's tables, so that a policy means the same steps here.
_POLICIES: dict[int, dict[str, Bins]] = {
    28: {
        "slow": ([8, 3, 3, 2, 1, 1], [1, 2, 2, 2, 3]),
        "medium": ([6, 2, 2, 2, 2, 1], [1, 3, 3, 3, 3]),
        "fast": ([6, 1, 1, 1, 1, 1], [1, 3, 4, 5, 4]),
        "ultra": ([4, 1, 1, 1, 1], [2, 5, 6, 7]),
    },
    15: {
        "slow": ([4, 2, 2, 2, 1], [1, 1, 1, 1]),
        "medium": ([4, 2, 1, 1, 1], [1, 1, 2, 2]),
        "fast": ([3, 1, 1, 1, 1], [1, 2, 2, 3]),
        "ultra": ([2, 1, 1, 1, 1], [1, 2, 3, 3]),
    },
    9: {
        "slow": ([5, 2, 1], [1]),
        "medium": ([5, 1, 1], [1, 1]),
        "fast": ([4, 1, 1], [1, 2]),
        "ultra": ([3, 1, 1], [2, 2]),
    },
    8: {
        "slow": ([5, 1, 1], [1]),
        "medium": ([4, 1, 1], [1, 1]),
        "fast": ([3, 1, 1], [1, 2]),
        "ultra": ([2, 1, 1], [2, 2]),
    },
    6: dict.fromkeys(("slow", "medium", "fast", "ultra"), ([3, 1], [2])),
    4: dict.fromkeys(("slow", "medium", "fast", "ultra"), ([2, 1], [1])),
}


def steps_mask(
    compute_bins: Sequence[int] | None = None,
    cache_bins: Sequence[int] | None = None,
    total_steps: int | None = None,
    mask_policy: str = "medium",
) -> list[int]:
    """A mask for `steps_computation_mask`: 1 for a step that is computed, 0 for one that may be reused.

        steps_mask(compute_bins=[3, 1, 1], cache_bins=[2, 2])    ->    [1, 1, 1, 0, 0, 1, 0, 0, 1]

    Args:
        compute_bins: Lengths of the runs of computed steps, the first at the beginning.
        cache_bins: Lengths of the runs between them.
        total_steps: Length of the mask; by default what the bins add up to.
        mask_policy: Without bins: "slow", "medium", "fast" or "ultra", from careful to bold.

    Returns:
        The mask; its last step is always computed.

    Raises:
        ConfigError: The bins are too short, only one of them is given, or no policy fits.
    """
    if total_steps is not None and (not isinstance(total_steps, int) or total_steps < 1):
        raise ConfigError(f"cachedit_fx: total_steps must be an int >= 1, got {shown(total_steps)}")
    for name, bins in (("compute_bins", compute_bins), ("cache_bins", cache_bins)):
        if bins is not None and not (isinstance(bins, Sequence) and all(isinstance(n, int) and n >= 0 for n in bins)):
            raise ConfigError(f"cachedit_fx: {name} must be a list of ints >= 0, got {shown(bins)}")
    if (compute_bins is None) != (cache_bins is None):
        names = ["compute_bins", "cache_bins"] if compute_bins is None else ["cache_bins", "compute_bins"]
        given = compute_bins if compute_bins is not None else cache_bins
        raise ConfigError(f"cachedit_fx: {names[0]} must be given together with {names[1]}={shown(given)}, got None")
    if compute_bins is not None and cache_bins is not None:
        mask = _mask(compute_bins, cache_bins)
        if total_steps is not None and total_steps > len(mask):
            raise ConfigError(
                f"cachedit_fx: compute_bins and cache_bins must cover total_steps={total_steps}, they add up to "
                f"{len(mask)}; lengthen a run, or leave total_steps out"
            )
    else:
        mask = _mask(*_policy_bins(mask_policy, total_steps))
    mask = mask[:total_steps]
    if not mask:
        raise ConfigError(
            "cachedit_fx: compute_bins and cache_bins must add up to at least one step, got "
            f"{shown(compute_bins)}, {shown(cache_bins)}"
        )
    return [*mask[:-1], 1]


def _mask(compute_bins: Sequence[int], cache_bins: Sequence[int]) -> list[int]:
    runs = zip_longest(compute_bins, cache_bins, fillvalue=0)
    return list(chain.from_iterable([1] * computed + [0] * cached for computed, cached in runs))


def _policy_bins(policy: str, total_steps: int | None) -> Bins:
    if total_steps is None:
        raise ConfigError(
            f"cachedit_fx: total_steps must be given with mask_policy={shown(policy)}, got None; or pass "
            "compute_bins and cache_bins"
        )
    if total_steps < 8 and total_steps not in _POLICIES:
        raise ConfigError(
            f"cachedit_fx: total_steps must be 4, 6, or at least 8 for a mask_policy, got {total_steps}; pass "
            "compute_bins and cache_bins for another number"
        )
    if total_steps in (4, 6, 8, 9):
        length = total_steps
    else:
        length = 15 if total_steps < 16 else 28
    table = _POLICIES[length]
    if policy not in table:
        raise ConfigError(
            f"cachedit_fx: mask_policy must be one of {', '.join(table)}, got {shown(policy)}."
            f"{did_you_mean(policy, table)}"
        )
    compute, cache = (list(bins) for bins in table[policy])
    _lengthen(compute, cache, total_steps)
    _shorten(compute, cache, total_steps)
    return compute, cache


def _lengthen(compute: list[int], cache: list[int], total_steps: int) -> None:
    """Lets every run grow in turn by half of what it would at an even stretch, until the steps are covered."""
    runs = [(bins, i, bins[i]) for i in range(min(len(compute), len(cache))) for bins in (compute, cache)]
    while sum(compute) + sum(cache) < total_steps:
        for bins, i, length in runs:
            bins[i] += max(int(length * ((total_steps / 28) * 0.5)), 1)
            if sum(compute) + sum(cache) >= total_steps:
                return
        compute[-1] += 1


def _shorten(compute: list[int], cache: list[int], total_steps: int) -> None:
    """Takes steps off the last runs in turn, until there are no more than asked for."""
    while sum(compute) + sum(cache) > total_steps:
        for bins in (cache, compute):
            if bins and sum(compute) + sum(cache) > total_steps:
                bins[-1] -= 1
                if not bins[-1]:
                    bins.pop()
