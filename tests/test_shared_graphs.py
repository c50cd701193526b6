"""Tests that share compiled graphs run in one process."""

from __future__ import annotations

import pytest


@pytest.mark.shares_graphs("nobody-else")
def test_all_tests_of_a_group_run_in_one_worker(request: pytest.FixtureRequest):
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("not run by `--dist loadgroup`")
    assert request.node.nodeid.endswith(
        "@nobody-else"
    )  # With this suffix, pytest-xdist assigns it to the worker of its group.
