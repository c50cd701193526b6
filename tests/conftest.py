"""What every test starts from: no compiled graphs, no sessions, one thread, one seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo

import cachedit_fx


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums in one order, so that bitwise comparisons hold on any number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_state(one_thread: None) -> Iterator[None]:
    """Neither compiled graphs nor sessions pass from one test to the next."""
    torch._dynamo.reset()
    cachedit_fx.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    cachedit_fx.reset()
