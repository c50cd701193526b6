"""The operations and names in the tables behave as the tables say: they are run on random tensors and names."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from cachedit_fx.passes.analysis import op_tables
from cachedit_fx.passes.analysis.contexts import entered_by, exit_of, sets_state
from cachedit_fx.passes.analysis.dataflow import Program, is_layout
from cachedit_fx.passes.analysis.effects import effect_of
from cachedit_fx.passes.analysis.op_tables import (
    ADDITIONS,
    CONVOLUTIONS,
    DIFFERENCES,
    DROPOUTS,
    IN_PLACE_OPERATORS,
    LAYOUT_FUNCTIONS,
    LAYOUT_METHODS,
    NOT_IN_PLACE_NAMES,
    OUT_OF_PLACE_METHODS,
    OUT_OF_PLACE_OPERATORS,
    PURE_PACKAGES,
    RANDOM_FUNCTIONS,
    REFERENCE_METHODS,
    VIEW_FUNCTIONS,
    WAVE_NAMES,
)
from cachedit_fx.passes.analysis.writes import is_in_place, target_of

Operation = Callable[..., Any] | str


def name_of(operation: Operation) -> str:
    return operation if isinstance(operation, str) else f"{operation.__module__}.{operation.__name__}"


def in_order(table: Any) -> list[Any]:
    return sorted(table, key=name_of)


def run(operation: Operation, *args: Any, **kwargs: Any) -> Any:
    """Calls a function, or a method of the first argument."""
    if isinstance(operation, str):
        return getattr(args[0], operation)(*args[1:], **kwargs)
    return operation(*args, **kwargs)


def node_of(operation: Operation, *args: Any, **kwargs: Any) -> fx.Node:
    """The graph node for this call; tensors are placeholders."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") if isinstance(arg, Tensor) else arg for i, arg in enumerate(args)]
    call = graph.call_method if isinstance(operation, str) else graph.call_function
    return call(operation, tuple(inputs), kwargs)


def random_tensor(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Distinct values, none of which is the sum or product of two others; all are exact in bfloat16."""
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    odd = 2 * torch.randperm(64, generator=generator)[:count] + 129
    return (odd.double() / 256).to(dtype).reshape(shape)


shapes = st.lists(st.integers(1, 3), min_size=3, max_size=3).map(tuple)
seeds = st.integers(0, 2**16)

# Layout. The arguments of each operation, as a function of a random [B, N, C] tensor and a random dimension.
LAYOUT_ARGUMENTS: dict[Operation, Callable[[Tensor, int], tuple[Any, ...]]] = {
    "to": lambda x, dim: (x, torch.bfloat16),
    "type_as": lambda x, dim: (x, torch.zeros(1, dtype=torch.float64)),
    "view": lambda x, dim: (x, -1),
    "reshape": lambda x, dim: (x, (-1,)),
    "unflatten": lambda x, dim: (x, dim, (1, -1)),
    "unsqueeze": lambda x, dim: (x, dim),
    "transpose": lambda x, dim: (x, dim, 0),
    "permute": lambda x, dim: (x, (dim, *(i for i in range(3) if i != dim))),
    "expand": lambda x, dim: (x, 2, *x.shape),
    "narrow": lambda x, dim: (x, dim, 0, 1),
    "chunk": lambda x, dim: (x, 2, dim),
    "split": lambda x, dim: (x, 1, dim),
    "select": lambda x, dim: (x, dim, 0),
    operator.getitem: lambda x, dim: (x, (slice(None), slice(0, 1))),
    torch.cat: lambda x, dim: ([x, x + 1], dim),
    torch.concat: lambda x, dim: ([x, x + 1], dim),
    torch.split: lambda x, dim: (x, 1, dim),
    torch.chunk: lambda x, dim: (x, 2, dim),
    torch.narrow: lambda x, dim: (x, dim, 0, 1),
    torch.select: lambda x, dim: (x, dim, 0),
    torch.reshape: lambda x, dim: (x, (-1,)),
    torch.unsqueeze: lambda x, dim: (x, dim),
    torch.transpose: lambda x, dim: (x, dim, 0),
    torch.permute: lambda x, dim: (x, (dim, *(i for i in range(3) if i != dim))),
}
# Operations whose output has only some elements, or some elements several times.
PARTS = {"narrow", "select", operator.getitem, torch.narrow, torch.select}
REPEATS = {"expand"}


def elements(value: Any) -> list[float]:
    tensors = value if isinstance(value, tuple | list) else [value]
    return [element for tensor in tensors for element in tensor.double().flatten().tolist()]


def check_layout(operation: Operation, x: Tensor, dim: int) -> None:
    """Asserts that the output has the elements of the input: each one once, unless the operation selects or repeats.

    An operation without an entry in `LAYOUT_ARGUMENTS` is called with one tensor, or with two if it needs two.
    """
    args = LAYOUT_ARGUMENTS.get(operation, lambda x, dim: (x,))(x, dim)
    try:
        out = run(operation, *args)
    except TypeError:
        args = (x, x + 1)
        out = run(operation, *args)
    given, made = Counter(elements(args[0])), Counter(elements(out))
    assert made, "no output"
    if operation in REPEATS:
        assert made.keys() == given.keys()
    elif operation in PARTS:
        assert made <= given
    else:
        assert made == given


@pytest.mark.parametrize("operation", in_order(LAYOUT_METHODS | LAYOUT_FUNCTIONS), ids=name_of)
@given(shapes, seeds, st.integers(0, 2))
def test_a_layout_operation_returns_the_elements_of_its_input(operation, shape, seed, dim):
    x = random_tensor(shape, seed)
    check_layout(operation, x, dim)
    assert is_layout(node_of(operation, x))


@pytest.mark.parametrize("operation", ["mul", "add", "neg", "softmax", "mean", torch.mul, F.silu], ids=name_of)
def test_an_operation_that_computes_fails_the_layout_check(operation):
    with pytest.raises((AssertionError, TypeError)):
        check_layout(operation, random_tensor((2, 3, 2), 0), 1)
    assert not is_layout(node_of(operation, torch.ones(1)))


def test_every_layout_operation_with_arguments_is_in_a_table():
    assert LAYOUT_ARGUMENTS.keys() <= LAYOUT_METHODS | LAYOUT_FUNCTIONS | {*VIEW_FUNCTIONS}


@pytest.mark.parametrize("operation", in_order(VIEW_FUNCTIONS), ids=name_of)
@given(shapes, seeds, st.integers(0, 2))
def test_a_view_shares_the_storage_of_its_input(operation, shape, seed, dim):
    x = random_tensor(shape, seed)
    out = operation(*LAYOUT_ARGUMENTS[operation](x, dim))
    assert out.untyped_storage()._cdata == x.untyped_storage()._cdata


@pytest.mark.parametrize("method", sorted(REFERENCE_METHODS))
@given(seeds, seeds)
def test_the_values_of_a_reference_do_not_affect_the_result(method, seed, other):
    x = random_tensor((2, 3), seed)
    outs = [getattr(x, method)(random_tensor((2, 3), other, torch.float64) * factor) for factor in (1, 3)]
    assert torch.equal(*outs)


# Additions.


@pytest.mark.parametrize("operation", in_order(ADDITIONS), ids=name_of)
@given(shapes, seeds, seeds)
def test_an_addition_adds_or_subtracts_its_second_operand(operation, shape, one, other):
    x, y = random_tensor(shape, one), random_tensor(shape, other)
    expected = x - y if operation in DIFFERENCES else x + y
    assert torch.equal(run(operation, x.clone(), y), expected)


def test_the_table_of_additions_contains_every_subtraction():
    assert DIFFERENCES <= ADDITIONS


@pytest.mark.parametrize("name", sorted(WAVE_NAMES))
@given(st.floats(-3, 3, width=32))
def test_sine_and_cosine_operations_are_waves(name, phase):
    wave = getattr(torch, name)
    x = torch.tensor(phase, dtype=torch.float64)
    assert abs(float(wave(x) - wave(x + 2 * torch.pi))) < 1e-9


# Writes.

INTEGERS = {operator.iand, operator.ior, operator.ixor}
# Tensors do not support these operators, so they cannot be run. A graph may contain them for lists.
NOT_FOR_TENSORS = {operator.delitem, operator.imatmul}


@pytest.mark.parametrize("operation", in_order(IN_PLACE_OPERATORS - NOT_FOR_TENSORS), ids=name_of)
@given(shapes, seeds, st.integers(2, 5))
def test_an_in_place_operator_writes_into_its_first_argument(operation, shape, seed, operand):
    x = random_tensor(shape, seed)
    x = (x * 256).long() if operation in INTEGERS else x
    args = (x, 0, -operand) if operation is operator.setitem else (x, operand)
    version = x._version
    out = operation(*args)
    assert (out is x or out is None) and x._version > version
    node = node_of(operation, *args)
    assert is_in_place(node) and target_of(node) is node.args[0]


@pytest.mark.parametrize("operation", in_order(NOT_FOR_TENSORS), ids=name_of)
def test_an_operator_that_tensors_do_not_support_writes_into_no_tensor(operation):
    x = random_tensor((2, 2), 0)
    before = x.clone()
    with contextlib.suppress(TypeError):
        operation(x, x if operation is operator.imatmul else 0)
    assert torch.equal(x, before) and is_in_place(node_of(operation, x, x))


@pytest.mark.parametrize("method", sorted(OUT_OF_PLACE_METHODS))
@given(shapes, seeds, st.floats(0.5, 3, width=16))
def test_an_in_place_method_writes_what_its_out_of_place_form_returns(method, shape, seed, operand):
    x = random_tensor(shape, seed)
    expected = OUT_OF_PLACE_METHODS[method](x.clone(), operand)
    version = x._version
    out = getattr(x, method)(operand)
    assert out is x and x._version > version
    assert torch.equal(out, expected)
    assert is_in_place(node_of(method, x, operand)) and target_of(node_of(method, x, operand)).name == "x0"


@pytest.mark.parametrize("operation", in_order(OUT_OF_PLACE_OPERATORS), ids=name_of)
@given(shapes, seeds, st.floats(0.5, 3, width=16))
def test_an_in_place_operator_writes_what_its_out_of_place_form_returns(operation, shape, seed, operand):
    x = random_tensor(shape, seed)
    expected = OUT_OF_PLACE_OPERATORS[operation](x.clone(), operand)
    before = x.clone()
    assert OUT_OF_PLACE_OPERATORS[operation](x, operand) is not x and torch.equal(x, before)
    assert torch.equal(operation(x, operand), expected) and torch.equal(x, expected)


def writes(name: str) -> bool | None:
    """Whether a method writes into its tensor; None if it does not accept zero, one or two numbers."""
    for args in ((), (0.5,), (0.25, 0.75)):
        x = random_tensor((3, 3), 0) / 2
        version = x._version
        try:
            getattr(x, name)(*args)
        except (TypeError, RuntimeError, IndexError, NotImplementedError):
            continue
        return x._version > version
    return None


def test_only_the_method_whose_name_ends_in_an_underscore_writes():
    pairs = [name for name in dir(Tensor) if name[0] != "_" and hasattr(Tensor, f"{name}_")]
    others = {"resize", "resize_as", "detach"}  # Two are deprecated without the underscore; `detach_` writes no values.
    found = {name: (writes(name), writes(f"{name}_")) for name in pairs if name not in others}
    runnable = {name: pair for name, pair in found.items() if None not in pair}
    assert len(runnable) > 60
    assert {name for name, pair in runnable.items() if pair != (False, True)} == set()
    for name in pairs:
        assert is_in_place(node_of(f"{name}_", torch.ones(1))) and not is_in_place(node_of(name, torch.ones(1)))


@pytest.mark.parametrize("name", sorted(NOT_IN_PLACE_NAMES))
def test_functions_of_operator_that_are_named_after_a_keyword_do_not_write(name):
    function = getattr(operator, name)
    x = torch.tensor([1, 2])
    function(*([torch.tensor(1)] if name == "not_" else [x, x]))
    assert x.tolist() == [1, 2] and not is_in_place(node_of(function, x, x))


@pytest.mark.parametrize("name", sorted(op_tables.ALLOCATION_NAMES))
def test_allocations_return_a_tensor_whose_storage_no_other_one_shares(name):
    x = torch.ones(2)
    given = ([x] if name.endswith("_like") else [(2,)]) + ([1.0] if "full" in name else [])
    allocate = getattr(x, name) if name.startswith("new_") else getattr(torch, name)
    first, second = allocate(*given), allocate(*given)
    assert len({tensor.untyped_storage().data_ptr() for tensor in (x, first, second)}) == 3


# States.


class HasName:
    def __init__(self, name: str) -> None:
        self.__name__, self.__module__ = name, "torch"

    def __call__(self, *args: Any) -> None: ...


@given(st.from_regex(r"[a-z]{1,8}", fullmatch=True))
def test_functions_that_enter_and_exit_a_context_are_found_by_their_prefix(name):
    graph = fx.Graph()
    enter = graph.call_function(HasName(f"{op_tables.ENTER_PREFIX}{name}"))
    leave = graph.call_function(HasName(f"{op_tables.EXIT_PREFIX}{name}"), (enter,))
    assert exit_of(enter) is leave and entered_by(leave) is enter
    assert not sets_state(enter) and not sets_state(leave)


@pytest.mark.parametrize("function", [torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast])
def test_the_functions_that_dynamo_writes_for_autocast_have_the_prefixes(function):
    assert function.__name__.startswith((op_tables.ENTER_PREFIX, op_tables.EXIT_PREFIX))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (torch._assert, False),
        (torch._check, False),
        (torch._C._set_grad_enabled, False),
        (torch.sym_max, False),
        (torch.set_num_threads, True),
        (torch.backends.cuda.enable_flash_sdp, True),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_call_without_tensors_or_results_sets_a_state_unless_the_table_names_it(function, expected):
    assert sets_state(fx.Graph().call_function(function, (True,))) is expected


# Effects.

RANDOM_CALLS: dict[str, Callable[[], Any]] = {
    "dropout": lambda: F.dropout(torch.ones(2, 4), 0.5, True),
    "alpha_dropout": lambda: F.alpha_dropout(torch.ones(2, 4), 0.5, True),
    "feature_alpha_dropout": lambda: F.feature_alpha_dropout(torch.ones(2, 4, 3), 0.5, True),
    "dropout1d": lambda: F.dropout1d(torch.ones(2, 4, 3), 0.5, True),
    "dropout2d": lambda: F.dropout2d(torch.ones(2, 4, 3, 3), 0.5, True),
    "dropout3d": lambda: F.dropout3d(torch.ones(2, 4, 3, 3, 3), 0.5, True),
    "gumbel_softmax": lambda: F.gumbel_softmax(torch.ones(2, 4)),
    "multi_head_attention_forward": lambda: attention(0.5),
    "fractional_max_pool2d": lambda: F.fractional_max_pool2d(torch.ones(1, 1, 6, 6), 2, output_size=3),
    "fractional_max_pool2d_with_indices": lambda: F.fractional_max_pool2d_with_indices(
        torch.ones(1, 1, 6, 6), 2, output_size=3
    ),
    "fractional_max_pool3d": lambda: F.fractional_max_pool3d(torch.ones(1, 1, 6, 6, 6), 2, output_size=3),
    "fractional_max_pool3d_with_indices": lambda: F.fractional_max_pool3d_with_indices(
        torch.ones(1, 1, 6, 6, 6), 2, output_size=3
    ),
    "svd_lowrank": lambda: torch.svd_lowrank(torch.eye(4), q=2),
    "pca_lowrank": lambda: torch.pca_lowrank(torch.eye(4), q=2),
    "lobpcg": lambda: torch.lobpcg(torch.eye(9), k=1),
}


def attention(dropout: float) -> Any:
    layer, x = torch.nn.MultiheadAttention(4, 2, dropout=dropout), torch.ones(3, 1, 4)
    state = torch.get_rng_state()
    layer(x, x, x)
    return not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", sorted(RANDOM_FUNCTIONS | DROPOUTS))
def test_a_random_function_advances_the_state_of_the_generator(name):
    state = torch.get_rng_state()
    drew = RANDOM_CALLS[name]()
    assert drew if name == "multi_head_attention_forward" else not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", sorted(DROPOUTS))
@given(st.booleans(), st.booleans(), st.booleans())
def test_a_dropout_draws_random_numbers_unless_it_is_turned_off(name, drops, is_training, by_name):
    function = getattr(F, name)
    x = torch.ones(2, 4, 3, 3, 3)[:, :, *([0] * {"dropout1d": 2, "dropout2d": 1}.get(name, 0))]
    p = 0.5 if drops else 0.0
    args, kwargs = ((x,), {"p": p, "training": is_training}) if by_name else ((x, p, is_training), {})
    node = node_of(function, *args, **kwargs)
    node.graph.output(node)
    state = torch.get_rng_state()
    function(*args, **kwargs)
    drew = not torch.equal(state, torch.get_rng_state())
    assert bool(effect_of(Program(node.graph))) is (drops and is_training)
    assert not drew or (drops and is_training)


@given(st.from_regex(r"[a-z]{1,8}", fullmatch=True).filter(lambda name: name not in PURE_PACKAGES))
def test_the_effects_of_functions_of_other_packages_are_unknown(package):
    function = HasName("compute")
    function.__module__ = f"{package}.{package}"
    node = node_of(function, torch.ones(1))
    node.graph.output(node)
    assert "effects are unknown" in effect_of(Program(node.graph))


@pytest.mark.parametrize("function", sorted(CONVOLUTIONS, key=lambda f: f.__name__), ids=lambda f: f.__name__)
def test_convolutions_slide_a_kernel_over_the_sizes_behind_the_channels(function):
    dims, is_transposed = int(function.__name__[-2]), "transpose" in function.__name__
    weight = torch.randn(*((3, 4) if is_transposed else (4, 3)), *[2] * dims)
    result = function(torch.randn(2, 3, *[5] * dims), weight)
    assert result.shape == (2, 4, *[6 if is_transposed else 4] * dims)
