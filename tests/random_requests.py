"""Random plans for a server: the requests, and the order in which their steps run.

A request is a denoising loop: a pipeline, a loop in a `session(key)`, or a bare loop with a separate prompt. It may
call the model several times per step, repeat a timestep, be abandoned, or fail inside a block. Other requests run
between its steps, in this thread or in others; weights change, modules are replaced, and the cache is reset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st

STEPS = 6  # The largest number of steps of a request.
KINDS = ("pipeline", "named", "bare")
PROMPTS = ("own", "shared", "overwritten")
EVENTS = ("weight", "block", "reset", "refresh", *["nothing"] * 12)


@dataclass(frozen=True)
class Request:
    """One denoising loop.

    Attributes:
        kind: How the package can distinguish it from other requests; see KINDS.
        times: The timestep of every step, from 0 to 1000.
        windows: Number of calls of the model per step, all with the same prompt object.
        stop: The step before which it is abandoned or at which it fails.
        fails: Whether the first call of that step fails inside the model.
        prompt: Its prompt object: "own" is a new one, "shared" is the server's unchanged one, and "overwritten" is the
            server's with new content, which ends all requests that used it.
        size: Number of the image size, and of the text length.
    """

    kind: str
    times: tuple[float, ...]
    windows: int = 1
    stop: int = STEPS
    fails: bool = False
    prompt: str = "own"
    size: int = 0

    @property
    def num_steps(self) -> int:
        return min(self.stop + self.fails, len(self.times))


@dataclass(frozen=True)
class Plan:
    """The requests of a server and the order in which it runs them.

    Attributes:
        requests: In the order in which they arrive.
        order: For each turn the number of the request that runs its next step; afterwards each request runs to its end.
        events: The event before each of these steps.
        in_threads: Every request runs in a separate thread, all at once; `order` and `events` are not used then.
    """

    requests: tuple[Request, ...]
    order: tuple[int, ...] = ()
    events: tuple[str, ...] = ()
    in_threads: bool = False


@st.composite
def schedules(draw: st.DrawFn, kind: str, starts: Sequence[float] = (900.0, 900.0, 450.0)) -> tuple[float, ...]:
    """Falling timesteps, as of almost all schedulers; in a pipeline also rising and repeated ones (Heun's method).

    The lower start is the one of image-to-image.
    """
    start = draw(st.sampled_from(starts))
    times = tuple(start - 70 * i for i in range(draw(st.integers(2, STEPS))))
    shape = draw(st.sampled_from(("falling", "falling", "rising", "twice", "equal"))) if kind != "bare" else "falling"
    if shape == "rising":
        return times[::-1]
    if shape == "twice":
        return (times[0], *(time for time in times[1:] for _ in range(2)))[:STEPS]
    return (times[0], *times)[:STEPS] if shape == "equal" and kind == "pipeline" else times


@st.composite
def requests(draw: st.DrawFn, kinds: Sequence[str] = KINDS, prompts: Sequence[str] = PROMPTS) -> Request:
    kind, prompt = draw(st.sampled_from(kinds)), draw(st.sampled_from(prompts))
    times = draw(schedules(kind))
    windows = 1 if len({*times}) < len(times) else draw(st.integers(1, 3))
    is_whole = draw(st.booleans())
    stop = STEPS if is_whole else draw(st.integers(1, STEPS - 1))
    fails = not is_whole and draw(st.booleans())
    size = draw(st.sampled_from((0, 0, 0, 1)))
    return Request(kind, times, windows, stop, fails, prompt, size)


@st.composite
def takeovers(draw: st.DrawFn) -> Plan:
    """Bare loops with one prompt buffer, each abandoned at a higher timestep than the one at which the next one starts.

    Only the content of the buffer distinguishes them.
    """
    stops = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    starts = [900.0 - 300 * i for i in range(len(stops) + 1)]
    loops = [draw(schedules("bare", [start])) for start in starts]
    found = [
        Request("bare", times, stop=stop, prompt="overwritten")
        for times, stop in zip(loops, [*stops, STEPS], strict=True)
    ]
    return Plan(tuple(found))


@st.composite
def mixtures(draw: st.DrawFn) -> Plan:
    """Requests of any kind, in any order."""
    # Often all have one kind or one prompt object, so that only one property distinguishes them.
    kinds = draw(st.sampled_from((KINDS, *((kind,) for kind in KINDS))))
    prompts = draw(st.sampled_from((PROMPTS, *((prompt,) for prompt in PROMPTS))))
    found = tuple(draw(st.lists(requests(kinds, prompts), min_size=2, max_size=4)))
    if draw(st.integers(0, 5)) == 0:
        return Plan(tuple(replace(r, stop=STEPS, fails=False, prompt="own") for r in found), in_threads=True)
    number = st.integers(0, len(found) - 1)
    order = tuple(draw(st.lists(number, max_size=12)))
    events = draw(st.lists(st.sampled_from(EVENTS), min_size=len(order), max_size=len(order)))
    return Plan(found, order, tuple(events))


def plans() -> st.SearchStrategy[Plan]:
    return st.one_of(mixtures(), mixtures(), mixtures(), takeovers())
