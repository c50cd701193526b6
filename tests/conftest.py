"""The state in which every test starts: no compiled graphs, no sessions, one thread, one seed."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
import torch._dynamo.guards
from hypothesis import HealthCheck, settings

import cachedit_fx

# Every run tries the same examples; `--hypothesis-profile thorough` searches for more. Tracing a module takes longer
# than hypothesis allows for an example, and the fixtures below need not run between two examples.
_SETTINGS = dict(deadline=None, database=None, suppress_health_check=[*HealthCheck])
settings.register_profile("usual", max_examples=80, derandomize=True, **_SETTINGS)
settings.register_profile("thorough", max_examples=2000, derandomize=False, print_blob=True, **_SETTINGS)
settings.load_profile("usual")


# pytest adds a handler to every logger that does not propagate, and torch prints each graph for its structured trace as
# soon as there is a handler. A logger that propagates gets none; without TORCH_TRACE torch adds none either.
logging.getLogger("torch.__trace").propagate = True


# After every compilation Dynamo collects garbage and flushes the caches of the processor to time its guards.
torch._dynamo.config.run_gc_after_compile = False
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums are computed in one order, so that bitwise comparisons hold on any number of cores."""
    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): as pytest-xdist has it; unknown where that is turned off")
    config.addinivalue_line(
        "markers",
        "shares_graphs(name): tests of one name run one after the other in one process, and compiled graphs (though no "
        "sessions) pass from one to the next",
    )


@pytest.hookimpl(tryfirst=True)  # Before xdist reads the groups.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves tests that share graphs to the position of the first of them."""
    places: dict[str, int] = {}
    for place, item in enumerate(items):
        if (name := _graphs_of(item)) is not None:
            places.setdefault(name, place)
            item.add_marker(pytest.mark.xdist_group(name))  # One worker runs all of a group, with `--dist loadgroup`.
    order = {item: places.get(_graphs_of(item) or "", place) for place, item in enumerate(items)}
    items.sort(key=order.__getitem__)


def _graphs_of(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("shares_graphs")
    return marker.args[0] if marker is not None else None


@pytest.fixture(scope="session", autouse=True)
def seldom_collected() -> None:
    """Excludes imported objects from garbage collection and makes it rarer: Dynamo makes many long-lived objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


_graphs: str | None = None
"""The group of tests whose compiled graphs are in Dynamo's cache."""


@pytest.fixture(autouse=True)
def fresh_state(one_thread: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Removes all sessions, and compiled graphs unless this test and the previous one are marked to share them."""
    global _graphs
    name = _graphs_of(request.node)
    if name is None or name != _graphs:
        torch._dynamo.reset()
    _graphs = name
    cachedit_fx.reset()
    torch.manual_seed(0)
    yield
    if name is None:
        torch._dynamo.reset()
    cachedit_fx.reset()
