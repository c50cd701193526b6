"""The operations that decisions depend on, by function, method name or name prefix.

Dynamo's graph holds the calls of the model's code as they are: functions of `operator` and `torch`, and methods of
tensors by name. Every list of them that a pass decides by is here. `tests/test_op_tables.py` runs the operations.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

# --- Layout: the output holds elements of the inputs, possibly cast. A stream that only passed through such operations
# is still the same stream.
LAYOUT_METHODS = frozenset(
    {
        *("contiguous", "clone", "detach"),  # The same elements, in the same order.
        *("to", "type_as", "float", "half", "bfloat16"),  # Casts, for example around a norm in float32.
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),  # [B, H, W, C] <-> [B, N, C].
        *("transpose", "permute"),  # [B, C, N] <-> [B, N, C].
        *("expand",),  # Repeats elements.
        *("narrow", "chunk", "split", "select"),  # Parts: text and image out of a joint sequence.
    }
)
LAYOUT_FUNCTIONS: frozenset[Any] = frozenset(
    {
        operator.getitem,  # A part of a tensor, or an element of the tuple that `chunk` and `split` return.
        *(torch.cat, torch.concat),  # Join text and image.
        *(torch.split, torch.chunk, torch.narrow),
        *(torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze),
        *(torch.transpose, torch.permute),
        torch.clone,
    }
)
# Views of the first argument. A piece that would end with them leaves them out: what reads them takes them itself.
VIEW_FUNCTIONS = (operator.getitem, torch.narrow, torch.select)
# Methods whose second operand only supplies a dtype or a shape: its values do not flow into the result.
REFERENCE_METHODS = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
# Functions and methods of which every tensor argument only supplies a dtype or a shape (`zeros_like`, `new_empty`).
REFERENCE_SUFFIX, REFERENCE_PREFIX = "_like", "new_"

# --- Additions: the operations of a residual connection. The stream that enters a block reaches its output through
# additions and layout operations alone.
ADDITIONS: frozenset[Any] = frozenset(
    {operator.add, operator.sub, operator.iadd, torch.add, torch.sub, "add", "sub", "add_"}
)
# Those that subtract their second operand: only the first one continues, unless the second is a part of it.
DIFFERENCES: frozenset[Any] = frozenset({operator.sub, torch.sub, "sub"})

# --- Work.
CONVOLUTIONS: frozenset[Any] = frozenset(
    {
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    }
)
EINSUM_NAME = "einsum"  # Contracts, but its FLOPs do not follow from the shapes alone.
# A timestep is embedded by these: an input that they are computed from is a timestep, whatever its name is.
WAVE_NAMES = frozenset({"sin", "cos"})

# --- Writes: operations that write into their first argument. Besides, all methods and functions write whose name ends
# in `_` (torch's convention), calls with `out=` or `inplace=True`, and ATen overloads whose schema says so.
IN_PLACE_OPERATORS: frozenset[Any] = frozenset(
    {
        *(operator.setitem, operator.delitem),  # `x[...] = y`.
        *(operator.iadd, operator.isub, operator.imul, operator.itruediv),  # `x += y`.
        *(operator.ifloordiv, operator.imod, operator.imatmul, operator.ipow),
        *(operator.iand, operator.ior, operator.ixor),
    }
)
IN_PLACE_METHOD = "__setitem__"  # The only one whose name does not end in a single `_`.
# Functions of `operator` whose names end in `_` because the name without it is a keyword.
NOT_IN_PLACE_NAMES = frozenset({"is_", "not_", "and_", "or_"})
# Methods and functions that return a new tensor, which shares its storage with no other one.
ALLOCATION_NAMES = frozenset(
    {
        *("new_zeros", "new_ones", "new_full", "new_empty"),
        *("zeros", "ones", "full", "empty"),
        *("zeros_like", "ones_like", "full_like", "empty_like"),
    }
)
# Writes, with the operation that returns a new tensor instead.
OUT_OF_PLACE_METHODS = {"add_": torch.add, "sub_": torch.sub, "mul_": torch.mul, "div_": torch.div}
OUT_OF_PLACE_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}

# --- States: how Dynamo writes `with torch.autocast(...)`: one node that enters, one that exits.
ENTER_PREFIX, EXIT_PREFIX = "_enter_", "_exit_"
# Calls without a tensor and without a result that set no state: checks, logs, sizes, and the gradient mode, which has
# no effect in a graph that needs no gradients.
STATELESS_PREFIXES = ("_assert", "_check", "_log", "_set_grad_enabled", "sym_")

# --- Effects: what must not run twice.
# Packages whose functions compute their result from their arguments, or whose effects the other tables name.
PURE_PACKAGES = frozenset({"", "torch", "_operator", "operator", "math", "builtins", "einops"})
PURE_HIGHER_ORDER = frozenset({"flex_attention"})  # Operators that take functions.
# Functions of torch that draw random numbers and are not ATen operators, so that no tag of an overload shows it.
RANDOM_FUNCTIONS = frozenset(
    {
        *("dropout1d", "dropout2d", "dropout3d", "gumbel_softmax", "multi_head_attention_forward"),
        *("fractional_max_pool2d", "fractional_max_pool2d_with_indices"),
        *("fractional_max_pool3d", "fractional_max_pool3d_with_indices"),
        *("svd_lowrank", "pca_lowrank", "lobpcg"),
    }
)
# Functions that draw nothing with `p=0` or outside of training: both are their second and third argument.
DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"})
