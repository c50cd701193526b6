"""`Fetch` and `Binder` find the same values in the frame of a function as Python itself."""

from __future__ import annotations

import functools
import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cachedit_fx.frontend.input_fetcher import Binder, Fetch, path_of
from tests import tiny

NAMES = {"scale": 3.0}


@pytest.fixture
def frame() -> dict[str, Any]:
    return {"self": tiny.build(), "x": torch.zeros(2, 3), "kwargs": {"a b": [10, (20, 30)]}, "n": {-1: "minus"}}


@pytest.mark.parametrize(
    "source",
    [
        "L['x']",
        "L['self']._modules['blocks']._modules['2']._modules['image']._parameters['weight']",
        "L['self'].__dict__['_modules']['proj_in']._parameters['bias']",
        "L['self'].blocks[1].text.weight",
        "L['kwargs']['a b'][1][0]",
        "L['n'][-1]",
        "L['x'].size()[1]",
        "L['x'].stride()[0]",
        "L['x'].storage_offset()",
        "G['scale']",
    ],
)
def test_a_path_finds_the_value_of_its_expression(source: str, frame: dict[str, Any]):
    (found,) = Fetch([path_of(source)], NAMES)(frame)
    expected = eval(source, {"L": frame, "G": NAMES})
    assert found is expected or (found == expected and isinstance(found, int | str))


def test_paths_share_the_lookups_of_a_common_prefix(frame: dict[str, Any]):
    class Counted(dict):
        looked_up = 0

        def __getitem__(self, key: str) -> Any:
            Counted.looked_up += 1
            return super().__getitem__(key)

    sources = [f"L['self'].blocks[{i}].{name}.weight" for i in (0, 1) for name in ("image", "text")]
    found = Fetch([path_of(source) for source in sources], {})(Counted(frame))
    assert Counted.looked_up == 1
    for value, source in zip(found, sources, strict=True):
        assert value is eval(source, {"L": frame})


def test_no_paths_give_no_values(frame: dict[str, Any]):
    assert Fetch([], {})(frame) == ()


@pytest.mark.parametrize("missing", ["L['y']", "L['self'].gone", "L['x'].size()[7]"])
def test_a_path_to_a_missing_value_raises(missing: str, frame: dict[str, Any]):
    with pytest.raises((AttributeError, LookupError)):
        Fetch([path_of(missing)], {})(frame)


@pytest.mark.parametrize(
    "source",
    [
        "list(L['kwargs'])[0]",
        "___from_numpy(L['x'])",
        "L['x'].item()",
        "L['x'].size(1)",
        "L['x'][L['n']]",
        "L['x'][0:1]",
        "L['x'] + 1",
        "__import__('os').system",
        "M['x']",
        "L['x'",
    ],
)
def test_an_expression_that_is_not_a_path_is_refused(source: str):
    with pytest.raises(ValueError):
        path_of(source)


# Arguments.

CELL = object()


def closure() -> Callable[..., Any]:
    def forward(self, x, *args, **kwargs):
        return CELL, held

    held = object()
    return forward


def forwards() -> list[Callable[..., Any]]:
    def plain(self, hidden_states, timestep): ...
    def defaults(self, x, scale=1.0, *, mask=None, flag): ...
    def anything(*args, **kwargs): ...
    def wrapped(self, *args, **kwargs): ...
    def more(self, x, *rest, y=2): ...
    def named(self, x=1, **kwargs): ...

    return [plain, defaults, anything, wrapped, more, named, closure()]


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((0,), {}),
    ((0, 1), {}),
    ((0, 1, 2), {}),
    ((0, 1, 2, 3), {}),
    ((0, 1), {"flag": 4}),
    ((0, 1), {"timestep": 4}),
    ((0,), {"hidden_states": 1, "timestep": 2}),
    ((0,), {"x": 1, "flag": 2, "mask": 3, "scale": 4}),
    ((0, 1), {"x": 1}),
    ((0, 1), {"unknown": 1}),
    ((0,), {"self": 1}),
    ((0,), {"hidden_states": 1, "unknown": 2}),
    ((0,), {"args": 1, "kwargs": 2}),
    ((0, 1), {"y": 3}),
]


@pytest.mark.parametrize("forward", forwards(), ids=lambda forward: forward.__name__)
def test_arguments_are_bound_as_python_binds_them(forward: Any):
    bind = Binder(forward)
    taken = 0
    for args, kwargs in CALLS:
        try:
            bound = inspect.signature(forward).bind(*args, **kwargs)
        except TypeError:
            assert bind(args, kwargs) is None, (args, kwargs)
            continue
        bound.apply_defaults()
        cells = dict(
            zip(forward.__code__.co_freevars, (c.cell_contents for c in forward.__closure__ or ()), strict=True)
        )
        assert bind(args, kwargs) == {**bound.arguments, **cells}, (args, kwargs)
        taken += 1
    assert taken


def test_keyword_arguments_are_copied_into_a_new_dictionary():
    kwargs = {"x": 1, "y": 2}
    found = Binder(lambda self, **others: None)((0,), kwargs)
    assert found == {"self": 0, "others": kwargs} and found["others"] is not kwargs


def test_positional_only_parameters_are_refused():
    with pytest.raises(ValueError, match="positional-only"):
        Binder(lambda self, /, x: None)


def test_a_wrapper_is_bound_by_its_own_parameters():
    @functools.wraps(forwards()[0])
    def wrapper(self, *args, **kwargs): ...

    assert Binder(wrapper)((0, 1), {"timestep": 2}) == {"self": 0, "args": (1,), "kwargs": {"timestep": 2}}


def test_a_replaced_value_on_an_unchanged_path_is_found(frame: dict[str, Any]):
    source = "L['self']._modules['proj_in']._parameters['bias']"
    fetch = Fetch([path_of(source)], {})
    fetch(frame)
    frame["self"].proj_in.bias = torch.nn.Parameter(torch.ones_like(frame["self"].proj_in.bias))
    assert fetch(frame) == (frame["self"].proj_in.bias,)


@pytest.mark.parametrize("place", ["a module", "a list of modules", "the dictionary of all modules", "another frame"])
def test_a_path_is_resolved_again_after_an_object_on_it_was_replaced(place: str, frame: dict[str, Any]):
    source = "L['self']._modules['blocks']._modules['2']._modules['image']._parameters['weight']"
    fetch = Fetch([path_of(source), path_of("L['x']")], {})
    fetch(frame)
    model, other = frame["self"], tiny.build()
    if place == "a module":
        model.blocks[2].image = other.blocks[1].image
    elif place == "a list of modules":
        model.blocks = other.blocks
    elif place == "the dictionary of all modules":
        model._modules = other._modules
    else:
        frame = {**frame, "self": other, "x": torch.ones(1)}
    weight, x = fetch(frame)
    assert weight is frame["self"].blocks[2].image.weight and x is frame["x"]
    again, _ = fetch(frame)
    assert again is weight


def test_a_property_is_evaluated_at_every_call():
    class Counting(torch.nn.Module):
        calls = 0

        @property
        def scale(self) -> int:
            Counting.calls += 1
            return Counting.calls

    module = Counting()
    module.__dict__["scale"] = "not this"  # A property takes precedence over an attribute of the object.
    fetch = Fetch([path_of("L['self'].scale")], {})
    assert [fetch({"self": module}), fetch({"self": module})] == [(1,), (2,)]


def test_a_module_is_freed_with_its_last_reference():
    module = tiny.build()
    module.scale = torch.ones(1)
    fetch = module.__dict__["fetch"] = Fetch(
        [path_of("L['self'].scale"), path_of("L['self'].blocks[1].text.weight")], {}
    )
    fetch({"self": module})
    known = weakref.ref(module)
    gc.disable()
    try:
        del module, fetch
        assert known() is None
    finally:
        gc.enable()
