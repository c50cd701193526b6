"""Tests that share compiled graphs run in one process."""

from __future__ import annotations

import pytest


@pytest.mark.shares_graphs("nobody-else")
def test_a_worker_gets_all_tests_of_a_name(request: pytest.FixtureRequest):
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("not run by `--dist loadgroup`")
    assert request.node.nodeid.endswith("@nobody-else")  # By this pytest-xdist gives it to the worker of its group.
