"""Random servers: requests of every kind that share one transformer and run in any order, and a check of their outputs.

The check does not depend on the package: an output must equal that of the model, or that of the model with the blocks
skipped by hand and the residual of the last computed call of the same request and window added. Each request must
give the same outputs as alone, with as many reused steps.

    python -m tests.random_server --minutes 120
"""

from __future__ import annotations

import argparse
import copy
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import cachedit_fx
from tests.random_requests import Plan, Request, plans
from tests.zoo import VARIANTS
from tests.zoo.runs import atol_of, call_before, enable
from tests.zoo.variant import Inputs, Variant, another
from tests.zoo.variant_reference import VariantReference, tensors_of

# These models run NumPy in their graphs. With an inner backend that runs graphs unchanged, threads that run one at the
# same time set torch's default dtype for each other (docs/reliability.md).
NOT_IN_THREADS = ("Cosmos",)

EVERY_OTHER = dict(max_warmup_steps=1, residual_diff_threshold=1.0, max_continuous_cached_steps=1)
PROBING = dict(max_warmup_steps=2, residual_diff_threshold=0.6, max_continuous_cached_steps=3)


class Interrupted(Exception):
    """Raised inside the compiled model like a user's interrupt."""


class Fuse:
    """The inner backend: runs graphs unchanged, and raises an error in one of them if requested.

    Attributes:
        left: Number of pieces that still run before one fails; None for no failure.
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
    """A model with the cache and a copy without it that undergoes the same events."""

    variant: Variant
    cached: nn.Module
    plain: nn.Module

    @staticmethod
    @torch.no_grad()
    def build(variant: Variant) -> Pair:
        cached, plain = variant.build(), variant.build()
        call_before(variant, cached)
        fields = dict(EVERY_OTHER, Fn_compute_blocks=1, inner_backend="fails_on_demand", on_no_match="raise")
        enable(variant, cached, cachedit_fx.CacheConfig(**fields, forecaster=None), dynamic=True)
        pair = Pair(variant, cached, plain)
        # Compile for both sizes first: a session computes a step when another graph takes over, unlike a request that
        # runs alone. Threads that compile at the same time are tested in `tests/test_threads.py`.
        times = (900.0, 800.0)
        Server(pair, Plan(tuple(Request("named", times, size=size) for size in (0, 1)))).run_and_check(**EVERY_OTHER)
        return pair

    def change(self, event: str) -> None:
        """Applies an event between two steps."""
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
    """A running request.

    Args:
        number: Its position among the requests, which determines its inputs.
        common: The arguments of all of its calls except latents and timesteps; they include the prompt.

    Attributes:
        given: A copy of `common`, which other requests may overwrite.
        num_known_steps: The number of steps that the cache knows of.
        outputs: The output tensors of every call.
        reused: For every call whether the blocks were skipped.
        is_ended: Whether it failed or its prompt was overwritten.
        is_disturbed: Whether another request without a name ran with the same prompt object between its steps. Its
            outputs must still be correct, but it may compute more steps.
    """

    def __init__(self, pair: Pair, request: Request, number: int, common: Inputs) -> None:
        self.pair, self.request, self.number, self.common = pair, request, number, common
        self.given = {name: copy.deepcopy(value) for name, value in common.items()}
        self.atol = atol_of(pair.variant)  # A functor that changes the computation of the model changes the rounding.
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(request.times), _step_index=None)
        self.step = self.num_known_steps = 0
        self.outputs: list[list[Tensor]] = []
        self.reused: list[bool] = []
        self.is_ended = self.is_disturbed = False
        self._references: dict[tuple[int, bool], VariantReference] = {}
        self._prepared: dict[tuple[int, int], Inputs] = {}

    def prepare(self) -> None:
        """Makes the inputs of all calls. While Dynamo traces NumPy it sets torch's default dtype for all threads."""
        for step, window in itertools.product(range(self.request.num_steps), range(self.request.windows)):
            self._prepared[step, window] = self._made(step, window)

    def is_over(self) -> bool:
        return self.is_ended or self.step >= self.request.num_steps

    def forget(self, *, all_steps: bool) -> None:
        """Requires that nothing that was computed so far is reused.

        Args:
            all_steps: Whether the cache also forgets that the steps were made.
        """
        self._references.clear()
        if all_steps:
            self.num_known_steps = 0

    def run_step(self, *, check: bool = True) -> None:
        """Makes all calls of the next step in the way of its kind of loop."""
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
                    self.is_ended = True
                    return
                finally:
                    FUSE.left = None
                self.outputs.append(output)
                if check:
                    self.reused.append(self._is_reused(window, call, output))
        self.step += 1
        self.num_known_steps += 1

    def check_outputs(self) -> None:
        """Checks the outputs of a loop that ran without checks, because other threads used the models."""
        outputs = iter(self.outputs)
        for step in range(self.request.num_steps):
            self.step = step
            for window in range(self.request.windows):
                self.reused.append(self._is_reused(window, self._call(window), next(outputs)))
        self.step = self.request.num_steps

    def __call__(self, call: Inputs) -> Any:
        """The frame that is recognized as a pipeline: `self.scheduler` exists, as in a diffusers pipeline."""
        return self.pair.cached(**call)

    def _name(self) -> AbstractContextManager[Any]:
        return cachedit_fx.session(f"request {self.number}") if self.request.kind == "named" else nullcontext()

    def _call(self, window: int) -> Inputs:
        return self._prepared.get((self.step, window)) or self._made(self.step, window)

    def _made(self, step: int, window: int) -> Inputs:
        variant, request = self.pair.variant, self.request
        own = variant.inputs(request.times[step], size=request.size, text=request.size)
        seed = 100 * self.number + 10 * step + window
        latents = {name: pytree.tree_map(lambda x: another(x, seed), own[name]) for name in variant.latents}
        return self.common | {name: own[name] for name in variant.times} | latents

    def _is_reused(self, window: int, call: Inputs, output: list[Tensor]) -> bool:
        """Whether the output is that of a reused step, with the residual of this window's last computed call.

        It asserts that the output equals the model's otherwise.

        Outside of a pipeline the second calls at a timestep are a separate branch, unless the first was forgotten.
        """
        times = self.request.times
        is_second = self.step > 0 and times[self.step] == times[self.step - 1]
        for place in ((window, False), (window, True)):
            known = self._references.get(place)
            if known is not None and _equal(known(skip=True, **call), output, self.atol):
                return True
        computing = VariantReference(self.pair.variant, self.pair.plain, 1, 0)
        expected = computing(skip=False, **call)
        is_computed = _equal(expected, output, self.atol)
        assert is_computed, f"step {self.step}, window {window}: neither computed nor its own residual"
        self._references[window, is_second and self.request.kind != "pipeline"] = computing
        return False


def _equal(found: list[Tensor], expected: list[Tensor], atol: float = 0.0) -> bool:
    """Whether the tensors are equal: bitwise, unless there is an absolute tolerance."""
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a, b) or (atol > 0 and torch.allclose(a, b, rtol=0, atol=atol)) for a, b in pairs)


class Prompts:
    """The prompt buffers of a server, one per size, and the requests that used them last."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._inputs: dict[int, Inputs] = {}
        self._users: dict[int, list[Loop]] = {}

    def of(self, request: Request, number: int) -> Inputs:
        """The arguments of the calls of a new request, except latents and timesteps."""
        users = [loop for loop in self._users.get(request.size, ()) if loop.request.kind != "named"]
        if request.prompt == "own" or (request.prompt == "shared" and not _is_distinguishable(users, request)):
            return inputs_of(self._variant, request, number)
        if request.size not in self._inputs:
            self._inputs[request.size] = inputs_of(self._variant, request, number)
        elif request.prompt == "overwritten":
            for loop in self._users.pop(request.size, ()):
                loop.is_ended = True
            for name, value in inputs_of(self._variant, request, number).items():
                if name in PROMPT_NAMES:  # The objects stay the same; only their content changes.
                    pytree.tree_map(torch.Tensor.copy_, self._inputs[request.size][name], value)
        return self._inputs[request.size]

    def note(self, loop: Loop) -> None:
        """Records that the loop is about to run its next step."""
        if loop.common is not self._inputs.get(loop.request.size):
            return
        users = self._users.setdefault(loop.request.size, [])
        users[:] = [loop, *(other for other in users if other is not loop)]
        if loop.request.kind == "named":
            return
        for other in users[1:]:
            if other.request.kind == "bare":
                other.is_ended = True  # Without a name or a pipeline it cannot be distinguished from this one.
            other.is_disturbed |= other.request.kind == "pipeline" and not other.is_over()
            loop.is_disturbed |= other.is_disturbed


PROMPT_NAMES = (
    *("encoder_hidden_states", "encoder_hidden_states_2", "encoder_hidden_states_t5", "encoder_hidden_states_llama3"),
    *("encoder_hidden_states_image", "audio_encoder_hidden_states", "global_hidden_states"),
    *("pooled_projections", "pooled_embeds", "proj_embedding", "id_cond", "text_bth", "cap_feats"),
)


def inputs_of(variant: Variant, request: Request, number: int) -> Inputs:
    """New inputs whose prompt differs for every number."""
    inputs = variant.inputs(request.times[0], size=request.size, text=request.size)
    prompts = {name: inputs[name] for name in PROMPT_NAMES if name in inputs}
    return inputs | pytree.tree_map(lambda x: x * (1 + 0.5 * number), prompts)


def _is_distinguishable(users: list[Loop], request: Request) -> bool:
    """Whether a request can be distinguished from others with its prompt object: in a bare loop by a rising timestep.

    It cannot if the other request was abandoned at a higher timestep, or after its first step or the first step since
    all sessions were ended.
    """
    if request.kind != "bare" or not users:
        return True
    last, *_ = users
    times = last.request.times
    return last.request.kind == "bare" and last.num_known_steps >= 2 and request.times[0] > times[last.step - 1]


@dataclass
class Server:
    """Runs one plan on one pair of models."""

    pair: Pair
    plan: Plan
    loops: list[Loop] = field(default_factory=list)

    def run_and_check(self, **rule: Any) -> None:
        """Runs the plan. Raises `AssertionError` if an output is wrong.

        Args:
            rule: Fields of `CacheConfig` that decide when to reuse.
        """
        cachedit_fx.refresh_context(self.pair.cached, **rule)
        cachedit_fx.reset()
        before = [copy.deepcopy(model.state_dict()) for model in (self.pair.cached, self.pair.plain)]
        try:
            if self.plan.in_threads:
                self._run_threads()
            else:
                self._run_in_turn()
        finally:
            for model, weights in zip((self.pair.cached, self.pair.plain), before, strict=True):
                model.load_state_dict(weights)
        if not {*self.plan.events} & {"weight", "block", "reset", "refresh"}:  # These events change outputs.
            for loop in self.loops:
                self._check_against_itself_alone(loop, is_every_other=rule == EVERY_OTHER)

    def _run_in_turn(self) -> None:
        prompts, started = Prompts(self.pair.variant), dict[int, Loop]()
        for number, event in self._turns():
            self.pair.change(event)
            for known in started.values() if event != "nothing" else ():
                known.forget(all_steps=event in ("reset", "refresh"))
            if number not in started:
                request = self.plan.requests[number]
                started[number] = Loop(self.pair, request, number, prompts.of(request, number))
            if not started[number].is_over():
                prompts.note(started[number])
                started[number].run_step()
        self.loops = [*started.values()]

    def _turns(self) -> Iterator[tuple[int, str]]:
        yield from zip(self.plan.order, self.plan.events, strict=True)
        for number, request in enumerate(self.plan.requests):
            yield from ((number, "nothing") for _ in range(request.num_steps))

    def _run_threads(self) -> None:
        self.loops = [self._alone(number, request) for number, request in enumerate(self.plan.requests)]
        for loop in self.loops:
            loop.prepare()
        errors: list[BaseException] = []

        def run(loop: Loop) -> None:
            torch.set_num_threads(1)  # A new thread has a separate setting, which changes the order of sums.
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
        for loop in self.loops:
            loop.check_outputs()

    def _alone(self, number: int, request: Request) -> Loop:
        return Loop(self.pair, request, number, inputs_of(self.pair.variant, request, number))

    def _check_against_itself_alone(self, loop: Loop, *, is_every_other: bool) -> None:
        """Asserts that other requests changed neither the outputs of this one nor its number of reused steps."""
        cachedit_fx.reset()
        request = loop.request
        alone = Loop(self.pair, request, loop.number, loop.given)
        while not alone.is_over():
            alone.run_step()
        is_plain_loop = request.kind == "pipeline" or len({*request.times}) == len(request.times)
        if is_every_other and request.windows == 1 and is_plain_loop:
            assert alone.reused == [step % 2 == 1 for step in range(len(alone.reused))], "alone it is not cached"
        if loop.is_disturbed:
            return
        if self.plan.in_threads and loop.reused != alone.reused:
            # If two graphs accept a call, Dynamo runs the one that served a call last, perhaps of another thread, and a
            # session computes the step at which its graph changes.
            assert sum(loop.reused) >= sum(alone.reused) // 2, f"request {loop.number}: {loop.reused}"
            return
        for number, (found, expected) in enumerate(zip(loop.outputs, alone.outputs, strict=False)):
            assert _equal(found, expected), f"request {loop.number}, call {number}: not as alone"


def run_random_plans(pair: Pair, rule: dict[str, Any], max_examples: int, end: float) -> int:
    """Runs random plans on a pair of models until the monotonic clock reaches `end`; returns their number."""
    count = 0

    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[*HealthCheck],
    )
    @given(plan=plans())
    def every_request_gets_what_it_gets_alone(plan: Plan) -> None:
        nonlocal count
        if time.monotonic() < end and not (plan.in_threads and pair.variant.name in NOT_IN_THREADS):
            with torch.no_grad():
                Server(pair, plan).run_and_check(**rule)
            count += 1

    every_request_gets_what_it_gets_alone()
    return count


def main() -> None:
    """Runs random plans on each transformer of the zoo in turn until the time is over."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--examples", type=int, default=25, help="per model and rule, before the next one has its turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end, count = time.monotonic() + 60 * arguments.minutes, 0
    while time.monotonic() < end:
        for name, variant in VARIANTS.items():
            has_prompt = {*PROMPT_NAMES} & {*variant.inputs()}  # DiT and Cosmos3Omni have class labels and indices.
            if variant.timestep_input != "graph" or not has_prompt or time.monotonic() > end:
                continue
            torch._dynamo.reset()
            pair = Pair.build(variant)
            count += sum(run_random_plans(pair, rule, arguments.examples, end) for rule in (EVERY_OTHER, PROBING))
            print(f"{name}: {count} plans so far", flush=True)


if __name__ == "__main__":
    main()
