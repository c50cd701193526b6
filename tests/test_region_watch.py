"""The watch of a region detects every replaced module, processor and weight, and nothing else."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import cachedit_fx
from cachedit_fx.frontend import dict_versions
from cachedit_fx.frontend.dict_versions import DictVersions
from cachedit_fx.frontend.region_watch import RegionWatch
from tests import tiny
from tests.fast_dispatches import warm
from tests.zoo import VARIANTS


class Processor:
    pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.SiLU())
        self.register_buffer("scale", torch.ones(1))
        self.processor = Processor()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))


def swap(model: Model) -> None:
    model.blocks[1], model.blocks[2] = model.blocks[2], model.blocks[1]


CHANGES: dict[str, Callable[[Model], object]] = {
    "a block": lambda model: model.blocks.__setitem__(1, Block()),
    "two blocks": swap,
    "the list of blocks": lambda model: setattr(model, "blocks", nn.ModuleList(model.blocks)),
    "a further block": lambda model: model.blocks.append(Block()),
    "a layer": lambda model: model.blocks[2].inner.__setitem__(0, nn.Linear(2, 2)),
    "a layer, behind the back of its module": lambda model: model.blocks[2].inner._modules.update({"1": nn.GELU()}),
    "a processor": lambda model: setattr(model.blocks[1], "processor", Processor()),
    "the first weight of a block": lambda model: setattr(
        model.blocks[1].inner[0], "weight", nn.Parameter(torch.ones(2, 2))
    ),
    "what stands in the first weight of a block": lambda model: model.blocks[1].inner[0].weight.add_(1),
    "all weights": lambda model: model.load_state_dict(model.state_dict()),
    "all weights, as they are": lambda model: model.load_state_dict(Model().state_dict(), assign=True),
}
OTHERS: dict[str, Callable[[Model], object]] = {
    "nothing": lambda model: None,
    "a note of the model's": lambda model: setattr(model, "note", object()),
    "a note of a block's": lambda model: setattr(model.blocks[1], "note", object()),
    "a processor that is set again": lambda model: setattr(model.blocks[1], "processor", model.blocks[1].processor),
}


@pytest.fixture(params=["by guards", "by versions", "without versions"])
def _versions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "by guards":
        monkeypatch.setattr(dict_versions, "CALLS_BEFORE_GUARDS", 1)
    if request.param == "without versions":
        monkeypatch.setattr(dict_versions, "dict_version", None)
    yield


@pytest.mark.usefixtures("_versions")
@pytest.mark.parametrize("change", CHANGES)
def test_a_replaced_object_of_the_region_is_detected(change: str):
    model = Model().requires_grad_(False)
    watch = RegionWatch(model, ["blocks.1", "blocks.2"])
    assert not watch.has_changed()
    CHANGES[change](model)
    assert watch.has_changed()
    assert watch.has_changed()  # The result stays the same until a new watch is created.


@pytest.mark.usefixtures("_versions")
@pytest.mark.parametrize("change", OTHERS)
def test_changes_outside_the_region_are_not_detected(change: str):
    model = Model()
    watch = RegionWatch(model, ["blocks.1", "blocks.2"])
    for _ in range(2):
        OTHERS[change](model)
        assert not watch.has_changed()
    CHANGES["a layer"](model)
    assert watch.has_changed()


def test_torch_provides_versions_of_dictionaries():
    """Without the versions the watch compares the contents of the dictionaries, at twice the cost."""
    written: dict[str, int] = {"a": 1}
    versions = DictVersions([written, {}])
    assert versions.are_same()
    written["a"] = 2
    assert not versions.are_same()


def test_guards_take_the_place_of_versions_after_some_calls(monkeypatch: pytest.MonkeyPatch):
    """They are one call of compiled code instead of one per dictionary. A model that writes at every call has none."""
    made: list[int] = []
    guard_on = dict_versions.guard_on_dict_versions
    monkeypatch.setattr(dict_versions, "guard_on_dict_versions", lambda dicts: made.append(1) or guard_on(dicts))
    monkeypatch.setattr(dict_versions, "CALLS_BEFORE_GUARDS", 3)
    written: dict[str, int] = {"a": 1}
    versions = DictVersions([written, {}])
    assert versions.are_same() and versions.are_same() and not made
    assert versions.are_same() and made
    monkeypatch.setattr(dict_versions, "dict_version", None)  # From here on only the guards can tell.
    assert versions.are_same()
    written["a"] = 2
    assert not versions.are_same() and not versions.are_same()


def test_a_write_while_the_guards_are_made_is_detected(monkeypatch: pytest.MonkeyPatch):
    written: dict[str, int] = {"a": 1}
    guard_on = dict_versions.guard_on_dict_versions

    def write_first(dicts: list[dict[str, int]]) -> object:
        written["a"] = 2
        return guard_on(dicts)

    monkeypatch.setattr(dict_versions, "guard_on_dict_versions", write_first)
    monkeypatch.setattr(dict_versions, "CALLS_BEFORE_GUARDS", 1)
    versions = DictVersions([written])
    assert not versions.are_same() and not versions.are_same()


def test_a_replaced_block_of_an_alternating_list_is_detected():
    """A block of Latte consists of one module of the spatial list and one of the temporal list."""
    variant = VARIANTS["Latte"]
    model = variant.build()
    fields = dict(max_warmup_steps=1, residual_diff_threshold=100.0, forecaster=None, inner_backend="eager")
    cachedit_fx.enable_cache(model, **fields, on_no_match="raise")
    with torch.no_grad(), cachedit_fx.session("one"):
        for number, call in enumerate(variant.generation((900.0, 800.0, 700.0, 600.0))):
            if number == 2:
                model.temporal_transformer_blocks[-1] = copy.deepcopy(model.temporal_transformer_blocks[-1])
            model(**call)
    (found,) = cachedit_fx.summary(model, logging=False)
    assert found.cached_steps == [1, 3], found.decisions


def test_a_change_that_two_threads_detect_invalidates_the_cache_once(monkeypatch: pytest.MonkeyPatch):
    """A thread that counted it later would invalidate the values that the other one has computed since."""
    model = warm(tiny.build())
    instance = model._compiled_call_impl.instance
    with torch.no_grad():
        model.blocks[1] = copy.deepcopy(model.blocks[1])
    both = threading.Barrier(2, timeout=60)
    has_changed = RegionWatch.has_changed

    def has_changed_for_both(watch: RegionWatch) -> bool:
        found = has_changed(watch)
        if found:
            both.wait()
        return found

    monkeypatch.setattr(RegionWatch, "has_changed", has_changed_for_both)
    before = instance.weights_version
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(tiny.generate, model, tiny.prompt(seed), tiny.latents(seed)) for seed in range(2)]
        assert all(len(run.result()) for run in runs)
    assert instance.weights_version == before + 1
