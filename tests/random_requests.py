"""Random servers: requests of every kind that share one transformer, run in any order, and what must come out.

A request is a denoising loop: a pipeline, a loop in a `session(key)`, or a bare loop with a prompt of its own. It may
call the model several times at a step, meet a timestep twice, be abandoned, or fail inside a block. Others run between
its steps, in this thread or in others; meanwhile weights change, modules are replaced, and the cache is reset.

What must hold is told without looking into the package: an output is that of the model, or that of the model whose
blocks were skipped by hand, with what they added at the last computed call of the same request at the same place in the
latents.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import cachedit_fx
from tests.zoo.by_hand import ByHand, tensors_of
from tests.zoo.runs import call_before, enable
from tests.zoo.variant import Inputs, Variant, another

STEPS = 6  # Of a request, at the most.
KINDS = ("pipeline", "named", "bare")
EVERY_OTHER = dict(max_warmup_steps=1, residual_diff_threshold=1.0, max_continuous_cached_steps=1)
LOOKING = dict(max_warmup_steps=2, residual_diff_threshold=0.6, max_continuous_cached_steps=3)
EVENTS = ("weight", "block", "reset", "refresh", "nothing", "nothing", "nothing", "nothing")


class Interrupted(Exception):
    """Raised inside the compiled model, as a user's interrupt would be."""


@dataclass(frozen=True)
class Request:
    """One denoising loop.

    Attributes:
        kind: How the package may tell it from others; see KINDS.
        times: The timestep of every step, on the scale of 0 to 1000.
        windows: Calls of the model per step, all with one prompt object.
        stop: The step before which it is abandoned, or at which it fails.
        fails: Whether the first call of that step fails inside the model.
        shares_prompt: Whether its prompt object is the server's, which every such request writes over in place.
        size: Number of the image size, and of the text length.
    """

    kind: str
    times: tuple[float, ...]
    windows: int = 1
    stop: int = STEPS
    fails: bool = False
    shares_prompt: bool = False
    size: int = 0

    @property
    def num_steps(self) -> int:
        return min(self.stop + self.fails, len(self.times))


@dataclass(frozen=True)
class Plan:
    """What a server is asked to do.

    Attributes:
        requests: In the order in which they arrive.
        order: Numbers of those that run the next step, in turn; afterwards each of them runs to its end.
        events: What happens before each of these steps.
        in_threads: Every request in a thread of its own, at once; nothing of `order` and `events` is then used.
    """

    requests: tuple[Request, ...]
    order: tuple[int, ...] = ()
    events: tuple[str, ...] = ()
    in_threads: bool = False


@st.composite
def schedules(draw: st.DrawFn, kind: str) -> tuple[float, ...]:
    """Falling, as almost all are; in a pipeline also rising ones, and ones that repeat, as those of Heun's method."""
    times = tuple(900.0 - 100 * i for i in range(draw(st.integers(2, STEPS))))
    shape = draw(st.sampled_from(("falling", "rising", "twice", "equal"))) if kind != "bare" else "falling"
    if shape == "rising":
        return times[::-1]
    if shape == "twice":
        return (times[0], *(time for time in times[1:] for _ in range(2)))[:STEPS]
    return (times[0], *times)[:STEPS] if shape == "equal" and kind == "pipeline" else times


@st.composite
def requests(draw: st.DrawFn) -> Request:
    kind = draw(st.sampled_from(KINDS))
    times = draw(schedules(kind))
    windows = 1 if len({*times}) < len(times) else draw(st.integers(1, 3))
    is_whole = draw(st.booleans())
    return Request(
        kind,
        times,
        windows,
        STEPS if is_whole else draw(st.integers(1, STEPS - 1)),
        False if is_whole else draw(st.booleans()),
        kind != "bare" and draw(st.booleans()),
        draw(st.integers(0, 1)),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    found = tuple(draw(st.lists(requests(), min_size=1, max_size=4)))
    if draw(st.integers(0, 5)) == 0:
        return Plan(tuple(Request(r.kind, r.times, r.windows, size=r.size) for r in found), in_threads=True)
    number = st.integers(0, len(found) - 1)
    order = tuple(draw(st.lists(number, max_size=12)))
    events = draw(st.lists(st.sampled_from(EVENTS), min_size=len(order), max_size=len(order)))
    return Plan(found, order, tuple(events))


class Fuse:
    """The inner backend: runs graphs as they are, and fails in one of them when it is lit.

    Attributes:
        left: Pieces that still run before one fails; None for no failure.
    """

    def __init__(self) -> None:
        self.left: int | None = None

    def __call__(self, gm: fx.GraphModule, _example_inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    self.left = None
                    raise Interrupted
            return gm(*args)

        return run


FUSE = Fuse()
torch._dynamo.register_backend(FUSE, name="fails_on_demand")


@dataclass
class Pair:
    """A model with the cache, and one without that goes through the same."""

    variant: Variant
    cached: nn.Module
    plain: nn.Module

    @staticmethod
    def build(variant: Variant) -> Pair:
        cached, plain = variant.build(), variant.build()
        call_before(variant, cached)
        fields = dict(EVERY_OTHER, Fn_compute_blocks=1, inner_backend="fails_on_demand", on_no_match="raise")
        enable(variant, cached, cachedit_fx.CacheConfig(**fields, forecaster=None), dynamic=True)
        return Pair(variant, cached, plain)

    def change(self, event: str) -> None:
        """What happens to the server between two steps."""
        if event == "reset":
            cachedit_fx.reset(self.cached)
        elif event == "refresh":
            cachedit_fx.refresh_context(self.cached)
        elif event == "weight":
            for model in (self.cached, self.plain):
                (block, *_), _ = self.variant.chain(model)[-1]
                for parameter in block.parameters():
                    parameter.mul_(1.25)
        elif event == "block":
            path = [*self.variant.lists][-1]
            for model in (self.cached, self.plain):
                blocks = model.get_submodule(path)
                blocks[len(blocks) - 1] = copy.deepcopy(blocks[len(blocks) - 1])


class Loop:
    """A request as it runs.

    Args:
        number: Its place among the requests; what it is called with depends on it.
        prompt: What the server keeps for prompts, by size; overwritten in place if the request shares it.
    """

    def __init__(self, pair: Pair, request: Request, number: int, prompts: dict[int, Inputs]) -> None:
        self.pair, self.request, self.number = pair, request, number
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(request.times), _step_index=None)
        self.common = self._prompt(prompts)
        self.step = 0
        self.outputs: list[list[Tensor]] = []
        self.has_failed = False
        self._references: dict[tuple[int, bool], ByHand] = {}

    def _prompt(self, prompts: dict[int, Inputs]) -> Inputs:
        request, variant = self.request, self.pair.variant
        own = variant.inputs(request.times[0], size=request.size, text=request.size)
        moved = {"encoder_hidden_states", "pooled_projections"} & own.keys()
        for name in moved:
            own[name] = own[name] * (1 + 0.5 * self.number)
        if not request.shares_prompt:
            return own
        kept = prompts.setdefault(request.size, own)
        for name in moved:
            kept[name].copy_(own[name])  # The object stays: nothing but its content tells.
        return kept

    def is_over(self) -> bool:
        return self.has_failed or self.step >= self.request.num_steps

    def forget(self) -> None:
        """Nothing that was computed so far may be reused."""
        self._references.clear()

    def run_step(self, *, check: bool = True) -> None:
        """All calls of the next step, as the kind of loop makes them."""
        request = self.request
        self.scheduler._step_index = self.step
        fails = request.fails and self.step == request.stop
        with self._name():
            for window in range(request.windows):
                call = self._call(window)
                FUSE.left = 2 + self.number if fails else None
                try:
                    output = tensors_of(self(call) if request.kind == "pipeline" else self.pair.cached(**call))
                except Interrupted:
                    self.has_failed = True
                    return
                finally:
                    FUSE.left = None
                self.outputs.append(output)
                if check:
                    self._check(window, call, output)
        self.step += 1

    def __call__(self, call: Inputs) -> Any:
        """The frame in which a pipeline is found: `self.scheduler` is there, as in a pipeline of diffusers."""
        return self.pair.cached(**call)

    def _name(self) -> AbstractContextManager[Any]:
        return cachedit_fx.session(f"request {self.number}") if self.request.kind == "named" else nullcontext()

    def _call(self, window: int) -> Inputs:
        variant, request = self.pair.variant, self.request
        own = variant.inputs(request.times[self.step], size=request.size, text=request.size)
        seed = 100 * self.number + 10 * self.step + window
        latents = {name: another(own[name], seed) for name in variant.latents}
        return self.common | {name: own[name] for name in variant.times} | latents

    def _check(self, window: int, call: Inputs, output: list[Tensor]) -> None:
        """The output is the model's; or else that without the blocks, with what this window's last computed call added.

        Outside of a pipeline the second calls at a timestep are a branch of their own, unless the first was forgotten.
        """
        times = self.request.times
        is_second = self.step > 0 and times[self.step] == times[self.step - 1]
        for place in ((window, False), (window, True)):
            known = self._references.get(place)
            if known is not None and _equal(known(skip=True, **call), output):
                return
        computing = ByHand(self.pair.variant, self.pair.plain, 1, 0)
        expected = computing(skip=False, **call)
        assert _equal(expected, output), f"step {self.step}, window {window}: neither computed nor its own residual"
        self._references[window, is_second and self.request.kind != "pipeline"] = computing


def _equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@dataclass
class Server:
    """One plan, run on one pair of models."""

    pair: Pair
    plan: Plan
    loops: list[Loop] = field(default_factory=list)

    def run_and_check(self, **rule: Any) -> None:
        """Raises `AssertionError` where an output is none that may come out.

        Args:
            rule: Fields of `CacheConfig` that say when to reuse.
        """
        cachedit_fx.refresh_context(self.pair.cached, **rule)
        cachedit_fx.reset()
        before = [copy.deepcopy(model.state_dict()) for model in (self.pair.cached, self.pair.plain)]
        try:
            self.run()
        finally:
            for model, weights in zip((self.pair.cached, self.pair.plain), before, strict=True):
                model.load_state_dict(weights)
        self.check_against_each_alone()

    def run(self) -> None:
        prompts: dict[int, Inputs] = {}
        if self.plan.in_threads:
            self.loops = [Loop(self.pair, r, n, prompts) for n, r in enumerate(self.plan.requests)]
            return self._run_threads()
        started: dict[int, Loop] = {}
        for number, event in self._turns():
            self.pair.change(event)
            for known in started.values():
                if event != "nothing":
                    known.forget()
                if number not in started and self._share(known.number, number):
                    known.has_failed = True  # Who writes over a prompt ends whoever used it.
            if number not in started:
                started[number] = Loop(self.pair, self.plan.requests[number], number, prompts)
            if not started[number].is_over():
                started[number].run_step()
        self.loops = [started[number] for number in sorted(started)]
        return None

    def _turns(self) -> Iterator[tuple[int, str]]:
        yield from zip(self.plan.order, self.plan.events, strict=True)
        for number, request in enumerate(self.plan.requests):
            yield from ((number, "nothing") for _ in range(request.num_steps))

    def _share(self, one: int, other: int) -> bool:
        first, second = self.plan.requests[one], self.plan.requests[other]
        return first.shares_prompt and second.shares_prompt and first.size == second.size

    def _run_threads(self) -> None:
        errors: list[BaseException] = []

        def run(loop: Loop) -> None:
            try:
                with torch.no_grad():
                    while not loop.is_over():
                        loop.run_step(check=False)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(loop,)) for loop in self.loops]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def check_against_each_alone(self) -> None:
        """Nothing that happened elsewhere may show in what a request returned, nor keep it from being cached."""
        if {*self.plan.events} & {"weight", "block", "reset", "refresh"}:
            return  # These are to show.
        for loop in self.loops:
            cachedit_fx.reset()
            alone = Loop(self.pair, loop.request, loop.number, {})
            while not alone.is_over():
                alone.run_step()
            for step, (found, expected) in enumerate(zip(loop.outputs, alone.outputs, strict=False)):
                assert _equal(found, expected), f"request {loop.number}, call {step}: not as alone"


def main() -> None:
    """Runs random plans on every transformer of the zoo, in turn, until the time is over."""
    import argparse
    import time

    from hypothesis import HealthCheck, given, settings

    from tests.zoo import VARIANTS

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--examples", type=int, default=25, help="per model and rule, before the next one has its turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end, count = time.monotonic() + 60 * arguments.minutes, 0
    while time.monotonic() < end:
        for name, variant in VARIANTS.items():
            if variant.clock != "graph" or time.monotonic() > end:
                continue
            torch._dynamo.reset()
            pair = Pair.build(variant)
            for rule in (EVERY_OTHER, LOOKING):

                @settings(max_examples=arguments.examples, deadline=None, database=None, print_blob=True,
                          suppress_health_check=[*HealthCheck])  # fmt: skip
                @given(plan=plans())
                def every_request_gets_what_it_gets_alone(plan: Plan, pair: Pair = pair, rule: Any = rule) -> None:
                    nonlocal count
                    if time.monotonic() < end:
                        with torch.no_grad():
                            Server(pair, plan).run_and_check(**rule)
                        count += 1

                every_request_gets_what_it_gets_alone()
            print(f"{name}: {count} plans so far", flush=True)


if __name__ == "__main__":
    main()
