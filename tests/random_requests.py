"""Random plans for a server: what requests there are, and in which order they run.

A request is a denoising loop: a pipeline, a loop in a `session(key)`, or a bare loop with a prompt of its own. It may
call the model several times at a step, meet a timestep twice, be abandoned, or fail inside a block. Others run between
its steps, in this thread or in others; meanwhile weights change, modules are replaced, and the cache is reset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st

STEPS = 6  # Of a request, at the most.
KINDS = ("pipeline", "named", "bare")
PROMPTS = ("own", "shared", "overwritten")
EVENTS = ("weight", "block", "reset", "refresh", *["nothing"] * 12)


@dataclass(frozen=True)
class Request:
    """One denoising loop.

    Attributes:
        kind: How the package may tell it from others; see KINDS.
        times: The timestep of every step, on the scale of 0 to 1000.
        windows: Calls of the model per step, all with one prompt object.
        stop: The step before which it is abandoned, or at which it fails.
        fails: Whether the first call of that step fails inside the model.
        prompt: Its prompt object: "own" is a new one, "shared" is the server's as it is, and "overwritten" the server's
            with other content, which ends whoever used it.
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
def schedules(draw: st.DrawFn, kind: str, starts: Sequence[float] = (900.0, 900.0, 450.0)) -> tuple[float, ...]:
    """Falling, as almost all are; in a pipeline also rising ones, and ones that repeat, as those of Heun's method.

    The lower start is that of image-to-image.
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
    """Bare loops in one prompt buffer, each abandoned at a higher timestep than the next one begins at.

    Nothing but the content of the buffer tells them apart.
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
    # Often all are of one kind, or have one prompt object: what tells them apart is then one thing alone.
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
