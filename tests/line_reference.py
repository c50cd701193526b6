"""A plain-Python reference of reused steps for models whose forward is a list of lines (`tests.random_models`).

It shares no code with the package: it runs the lines one by one and skips those of the regions at a reused step.
The rules for a region and for the values that a reused step supplies:

- A region begins with the line that calls its first block. It ends before the line that calls the next block of the
  chain, or after its last block if that is the last of the chain. A module that is called twice counts as two blocks.
- A stream that its first block takes, or the streams joined into one, gets the last computed residual added.
- Any other live-out that depends on a stream has its value of the last computed step.
- A live-out that depends on no stream is rematerialized.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_models import Code

Locals = dict[str, Any]


@dataclass(frozen=True)
class CachedValue:
    """The cached value of a name that is read after a region.

    Attributes:
        tensor: The value at the last computed step, or the residual relative to the entering stream `base`.
        same_as: Names with equal numbers refer to one tensor, so that writing into one changes the other.
    """

    tensor: Tensor
    same_as: int
    base: str = ""


@dataclass
class Span:
    """Lines `start` to `stop` (exclusive), with the cached values of their last run."""

    start: int
    stop: int
    cached: dict[str, CachedValue] = field(default_factory=dict)


class LineReference:
    """Runs the lines of a model.

    Args:
        chain: Paths of the blocks of the chain, in execution order. A module that is called twice occurs twice.
        regions: For each region the numbers, in the chain, of its first block and of the first block after it.
        adds_late: A value that was computed before the region and that only a later block takes is a stream as well.
    """

    def __init__(
        self,
        code: Code,
        model: nn.Module,
        chain: Sequence[str],
        regions: Sequence[tuple[int, int]],
        *,
        adds_late: bool = False,
    ) -> None:
        self.code, self.model, self.lines, self.adds_late = code, model, code.lines, adds_late
        self.chain = [self._call(chain, number) for number in range(len(chain))]
        self.spans = {}
        for first, last in regions:
            start = self._call(chain, first)
            stop = self._call(chain, last) if last < len(chain) else self._call(chain, last - 1) + 1
            self.spans[start] = Span(start, stop)

    def _call(self, chain: Sequence[str], number: int) -> int:
        """The line that calls a block of the chain."""
        calls = [i for i, line in enumerate(self.lines) if line.block == chain[number]]
        return calls[chain[:number].count(chain[number])]

    def __call__(self, call: dict[str, Tensor], *, reuse: bool = False, forget: str = "") -> list[Tensor]:
        """The model's outputs.

        Args:
            reuse: Skip the regions.
            forget: The name of a cached value that is replaced by zeros, to test that it matters.
        """
        env: Locals = {"self": self.model, "torch": torch, "F": F, **call}
        number = 0
        while number < len(self.lines):
            span = self.spans.get(number)
            if span is None:
                _run(self.lines[number].code, env)
                number += 1
                continue
            if reuse:
                self._reuse(span, env, forget)
            else:
                self._compute(span, env)
            number = span.stop
        return list(env["returned"])

    def probed_at(self, call: dict[str, Tensor]) -> Tensor | None:
        """The residual of the image, or of the stream that it was joined into, over the blocks before the first region.

        None if it was joined immediately before the region.
        """
        start = min(self.spans)
        is_joined = self.lines[start - 1].is_joined
        fitting = [number for number in self.chain if self.lines[number].is_joined == is_joined]
        if not fitting or fitting[0] >= start:
            return None
        env: Locals = {"self": self.model, "torch": torch, "F": F, **call}
        name = self.code.spec.joint if is_joined else self.code.spec.image
        for number, line in enumerate(self.lines[:start]):
            if number == fitting[0]:
                before = env[name].clone()
            _run(line.code, env)
        return env[name] - before

    def _compute(self, span: Span, env: Locals) -> None:
        entered, known = self._entering(span, env), _versions(env)
        for line in self.lines[span.start : span.stop]:
            _run(line.code, env)
        written = {name for name, (value, version) in known.items() if env[name] is value and value._version > version}
        continued = self._continued(span)
        by_object = {id(env[name]): base for name, base in continued.items()}
        span.cached = {}
        for name in self._leaving(span, written):
            value = env[name]
            # Another name for the same tensor continues the same stream.
            base = continued.get(name) or by_object.get(id(value), "")
            if base or name in written | self._from_streams(span):
                span.cached[name] = CachedValue(value - entered[base] if base else value.clone(), id(value), base)

    def _reuse(self, span: Span, env: Locals, forget: str) -> None:
        entered = self._entering(span, env)
        from_streams = self._from_streams(span)
        for line in self.lines[span.start : span.stop]:
            if not writes(line.code) & from_streams:
                _run(line.code, env)
            elif line.without_block:
                _run(line.without_block, env)
        made: dict[int, Tensor] = {}
        for name, cached in span.cached.items():
            if cached.same_as not in made:
                tensor = torch.zeros_like(cached.tensor) if name == forget else cached.tensor
                made[cached.same_as] = entered[cached.base] + tensor if cached.base else tensor.clone()
            env[name] = made[cached.same_as]

    def _entering(self, span: Span, env: Locals) -> Locals:
        """Copies of the streams that the region's first block takes and of the tensors that they are joined with."""
        entered = {name: env[name].clone() for name in self._streams(span)}
        if self._joins(span):
            entered["joined"] = torch.cat([env[name] for name in self.code.spec.parts], dim=1)
        return entered

    def _streams(self, span: Span) -> set[str]:
        """Names of the streams that enter the region."""
        found = set(self.lines[span.start].streams)
        if self.adds_late:
            made = set().union(*(writes(line.code) for line in self.lines[: span.start]))
            found |= made & {name for line in self.lines[span.start : span.stop] for name in line.streams}
        return found

    def _joins(self, span: Span) -> bool:
        return self.lines[span.stop - 1].is_joined and not self.lines[span.start - 1].is_joined

    def _continued(self, span: Span) -> dict[str, str]:
        """Names after the region that continue a stream -> the name of the stream."""
        found = {name: name for name in self._streams(span)}
        return found | ({self.code.spec.joint: "joined"} if self._joins(span) else {})

    def _leaving(self, span: Span, written: set[str]) -> list[str]:
        """Names that are assigned in the region and read after it, or whose tensor was written into in the region."""
        made = written.union(*(writes(line.code) for line in self.lines[span.start : span.stop]))
        found = set()
        for line in self.lines[span.stop :]:
            found |= reads(line.code) & made
            made -= writes(line.code)
        return sorted(found)

    def _from_streams(self, span: Span) -> set[str]:
        """Names that are assigned in the region and depend on a stream."""
        derived = set(self.lines[span.start].streams)
        for line in self.lines[span.start : span.stop]:
            if reads(line.code) & derived:
                derived |= writes(line.code) - (writes(line.without_block) if line.without_block else set())
        return derived

    @property
    def cached(self) -> list[str]:
        return [name for span in self.spans.values() for name in span.cached]


def _versions(env: Locals) -> dict[str, tuple[Tensor, int]]:
    """Every local tensor and its version, the number of writes into it."""
    return {name: (value, value._version) for name, value in env.items() if isinstance(value, Tensor)}


def _run(code: str, env: Locals) -> None:
    exec(_compiled(code), env)


@functools.cache
def _compiled(code: str) -> Any:
    return compile(f"returned = {code.removeprefix('return ')}" if code.startswith("return ") else code, "line", "exec")


@functools.cache
def reads(code: str) -> frozenset[str]:
    """Names that a statement reads."""
    tree = ast.parse(code)
    added_to = {node.target.id for node in ast.walk(tree) if isinstance(node, ast.AugAssign)}
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return frozenset(loaded | added_to)


@functools.cache
def writes(code: str) -> frozenset[str]:
    """Names that a statement assigns."""
    found = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name))
    return frozenset(node.id for node in found if isinstance(node.ctx, ast.Store))
