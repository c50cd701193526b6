"""Traces alike blocks once: Dynamo traces the first of them, and the others repeat its trace.

Dynamo traces a call of a block by executing its bytecode symbolically. What it finds depends on the arguments, on the
global settings of torch, and on what it reads from the module. It adds a guard on everything that it reads. Therefore a
block has the trace of an earlier one if the same line calls it with arguments of the same kind, and if every guard on a
value below the earlier block holds for the corresponding value below this one. Then the nodes of the earlier block are
copied, the weights of this one become inputs of the graph, and the corresponding guards are added. The result is what
Dynamo would have traced: the same graph, and at least the same guards.

If it cannot be shown that a block is like an earlier one, Dynamo traces it. The log of level DEBUG states the reason.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from cachedit_fx.frontend.block_trace import BlockRecorder, BlockTrace
from cachedit_fx.frontend.torch_internals import RestartAnalysis
from cachedit_fx.frontend.trace_internals import ModuleCall, UnknownError, intercepted_module_calls, name_of

log = logging.getLogger(__name__)

MAX_TRACES = 8  # Per class of blocks. More different blocks than this are compared with the first ones only.


@contextlib.contextmanager
def traced_once(module: nn.Module | None) -> Iterator[RepeatedBlocks]:
    """Lets blocks of a module repeat the trace of others, in the traces of this thread, until the end of the block."""
    blocks = RepeatedBlocks(module)
    with contextlib.ExitStack() as stack:
        if module is not None:
            try:
                stack.enter_context(intercepted_module_calls(blocks.call))
            except (ImportError, AttributeError) as error:  # Another version of torch.
                log.debug("every block is traced: %r", error)
        yield blocks


class RepeatedBlocks:
    """Traces the blocks of one module.

    Attributes:
        num_traced: The number of calls of blocks that Dynamo has traced in the last trace of the module.
        num_repeated: The number of calls that repeat the trace of another block.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._blocks: set[int] | None = None
        self._trace: Any = None
        self._is_recording = False
        self._recorded: dict[type, list[BlockTrace]] = {}
        self._values: dict[Any, Any] = {}  # By their sources.
        self.num_traced = self.num_repeated = 0

    def call(self, call: ModuleCall) -> Any:
        """The output of a call of any module."""
        if self._blocks is None:
            self._blocks = blocks_of(self._module) if self._module is not None else set()
        if self._is_recording or id(call.module) not in self._blocks:
            return call.proceed()
        if call.trace is not self._trace:  # Dynamo traces the module again.
            self._recorded.clear()
            self._values.clear()
            self._trace, self.num_traced, self.num_repeated = call.trace, 0, 0
        recorded = self._recorded.setdefault(type(call.module), [])
        for one in recorded:
            try:
                result = one.repeat(call, self._values)
            except RestartAnalysis:
                raise
            except Exception as why:  # A bug, or another version of torch. Dynamo can trace the block in any case.
                log.debug(
                    "%s is traced, because %s", name_of(call.source), why, exc_info=not isinstance(why, UnknownError)
                )
            else:
                self.num_repeated += 1
                return result
        self.num_traced += 1
        self._is_recording = True
        try:
            recorder = _attempt(BlockRecorder, call) if len(recorded) < MAX_TRACES else None
            result = call.proceed()
            new = _attempt(recorder.finish, result, self._values) if recorder is not None else None
        finally:
            self._is_recording = False
        if new is not None:
            recorded.append(new)
        return result


def _attempt(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function that only reads; None if it fails, because a block then is not repeated."""
    try:
        return function(*args)
    except Exception as why:
        log.debug("a block cannot be repeated, because %s", why, exc_info=not isinstance(why, UnknownError))
        return None


def blocks_of(module: nn.Module) -> set[int]:
    """The identities of the modules in the lists of a model that contain several modules of one class.

    Lists in such modules are not considered.
    """
    found: set[int] = set()

    def visit(one: nn.Module) -> None:
        children = [child for child in one.children() if not type(child).__module__.startswith("torch.")]
        is_list = isinstance(one, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        counts = Counter(map(type, children)) if is_list else Counter()
        for child in one.children():
            if counts[type(child)] > 1 and next(child.children(), None) is not None:
                found.add(id(child))
            else:
                visit(child)

    visit(module)
    return found
