"""A plain-Python reference of skipped lines for models whose forward is a list of lines (`tests.random_models`).

It shares no code with the package: it runs the lines one by one, and on a reused step leaves those of a region out.
What a region is and what a reused step supplies:

- A region begins with the line that calls its first block. It ends before the line that calls the block behind it, or
  behind the line that calls its last block where that is the chain's last. A module that is called twice is two blocks.
- A stream that its first block takes, or the streams joined into one, gets added what the region added last time.
- Anything else that was made in it from a stream and is read behind it, is what it was last time.
- What was made in it, but from no stream, is made again.
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
    """What is kept of a name that is read behind a region.

    Attributes:
        tensor: What it was last time; or what was added to the entering stream `base`.
        same_as: Names with equal numbers stand for one tensor, so that one sees what is written into the other.
    """

    tensor: Tensor
    same_as: int
    base: str = ""


@dataclass
class Span:
    """Lines `start` to `stop` (exclusive), with what is kept of their last run."""

    start: int
    stop: int
    cached: dict[str, CachedValue] = field(default_factory=dict)


class LineReference:
    """Runs the lines of a model.

    Args:
        chain: Paths of the blocks of the chain, in execution order; those of modules that are called twice stand twice.
        regions: Numbers, in the chain, of each region's first block and of the first behind it.
        adds_late: What only a later block of a region takes, but was made before the region, is a stream as well.
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
            reuse: Leave the regions out.
            forget: The name of a kept value that is taken for zeros: to see that it counts.
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
        """What the blocks before the first region add to the image, or to the stream that it was joined into.

        None where it was joined only just before the region.
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
            elif line.anew:
                _run(line.anew, env)
        made: dict[int, Tensor] = {}
        for name, cached in span.cached.items():
            if cached.same_as not in made:
                tensor = torch.zeros_like(cached.tensor) if name == forget else cached.tensor
                made[cached.same_as] = entered[cached.base] + tensor if cached.base else tensor.clone()
            env[name] = made[cached.same_as]

    def _entering(self, span: Span, env: Locals) -> Locals:
        """Copies of the streams that the region's first block takes; and of what they will be joined to."""
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
        """Names behind the region of what continues a stream -> what it continues."""
        found = {name: name for name in self._streams(span)}
        return found | ({self.code.spec.joint: "joined"} if self._joins(span) else {})

    def _leaving(self, span: Span, written: set[str]) -> list[str]:
        """Names that get a value in the region which is read behind it, or whose tensor was written into there."""
        made = written.union(*(writes(line.code) for line in self.lines[span.start : span.stop]))
        found = set()
        for line in self.lines[span.stop :]:
            found |= reads(line.code) & made
            made -= writes(line.code)
        return sorted(found)

    def _from_streams(self, span: Span) -> set[str]:
        """Names that get a value in the region that was made from a stream."""
        held = set(self.lines[span.start].streams)
        for line in self.lines[span.start : span.stop]:
            if reads(line.code) & held:
                held |= writes(line.code) - (writes(line.anew) if line.anew else set())
        return held

    @property
    def cached(self) -> list[str]:
        return [name for span in self.spans.values() for name in span.cached]


def _versions(env: Locals) -> dict[str, tuple[Tensor, int]]:
    """Every local tensor, and how often it was written into."""
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
    """Names that a statement gives a value."""
    found = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name))
    return frozenset(node.id for node in found if isinstance(node.ctx, ast.Store))
