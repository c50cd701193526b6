"""The exchange by which ranks decide alike, as a function that a head calls. It is compiled with the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

NUM_STATE = 3  # The numbers of a fingerprint, without the checksums.


def exchange(
    fingerprint: torch.Tensor,
    timestep: Sequence[torch.Tensor],
    checksums: Sequence[torch.Tensor],
    distance_and_size: Sequence[torch.Tensor],
    groups: Sequence[tuple[str, int]],
) -> torch.Tensor:
    """Adds the distances and sizes of all ranks, and finds out whether the ranks are in equal states.

    This takes one all-gather of a few floats for each group. Every rank adds the numbers in the same order, so all get
    the same residual diff, bit for bit.

    Args:
        fingerprint: [asks, state, state, checksums of the last step], float32: 1.0 if this rank decides on its host,
            and what else the decision depends on (see `Step.fingerprint`).
        timestep: The timestep, a number; empty if there is none.
        checksums: The checksums of the conditioning, numbers; empty if there are none.
        distance_and_size: The two parts of the residual diff of this rank, each a number or one for each sample; empty
            if there is no probe.
        groups: The names of the process groups, and the numbers of their ranks.

    Returns:
        [residual diff, is_equal, asks], float32, without the residual diff if there is no probe. `is_equal` is 1.0 if
        fingerprints and timesteps are equal on all ranks, and the conditioning has changed on all or none of them. A
        NaN is equal to nothing. `asks` is the largest one.
    """
    states = [torch.ones_like(fingerprint[:1]), fingerprint[:NUM_STATE], *(number.reshape(1) for number in timestep)]
    if checksums:
        has_changed = (torch.stack([*checksums]) != fingerprint[NUM_STATE:]).any()
        states.append(has_changed.to(torch.float32).reshape(1))
    state = torch.cat(states)
    count = state.numel()
    ours = torch.cat([state, *(total.reshape(-1) for total in distance_and_size)])
    collectives = torch.ops._c10d_functional
    for name, num_ranks in groups:
        gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(ours, num_ranks, name))
        rows = gathered.reshape(num_ranks, -1)
        state = rows[:, :count]
        is_equal = (state == state[:1]).all().to(torch.float32) * state[0, :1]
        ours = torch.cat([is_equal, state[:, 1:2].amax(0), state[0, 2:], rows[:, count:].sum(0)])
    if not distance_and_size:
        return ours[:2]
    distance, size = ours[count:].reshape(2, -1)
    return torch.cat([(distance / size).amax().reshape(1), ours[:2]])
