"""What every test starts from: no compiled graphs, no sessions, one thread, one seed."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from hypothesis import HealthCheck, settings

import cachedit_fx

# What a test tries is the same at every run; `--hypothesis-profile thorough` goes looking for more. A module that is
# traced takes longer than hypothesis expects of an example, and the fixtures below need not run between two of them.
_SETTINGS = dict(deadline=None, database=None, suppress_health_check=[*HealthCheck])
settings.register_profile("usual", max_examples=80, derandomize=True, **_SETTINGS)
settings.register_profile("thorough", max_examples=2000, derandomize=False, print_blob=True, **_SETTINGS)
settings.load_profile("usual")


# pytest listens to every logger that does not propagate, and torch prints each graph for its structured trace as soon
# as anyone listens. One that propagates is left alone; it has no handler of its own unless TORCH_TRACE is set.
logging.getLogger("torch.__trace").propagate = True


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
