"""Random servers: no request gets the residual of another one, a stale one, or fewer reused steps than alone.

`python -m tests.random_server --minutes 120` runs longer, and with every transformer of the zoo.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings

from tests.random_requests import Plan, plans
from tests.random_server import EVERY_OTHER, PROBING, Pair, Server
from tests.zoo import VARIANTS

NAMES = ("Flux", "QwenImage", "Wan")


pair = functools.cache(lambda name: Pair.build(VARIANTS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.shares_graphs(f"requests-{n}")) for n in NAMES])
@pytest.mark.parametrize("rule", [EVERY_OTHER, PROBING], ids=["every other", "looking"])
@settings(max_examples=15)
@given(plan=plans())
def test_every_request_gets_the_same_outputs_as_when_it_runs_alone(name: str, rule: dict[str, object], plan: Plan):
    with torch.no_grad():
        Server(pair(name), plan).run_and_check(**rule)
