"""Observes what a pipeline passes to its scheduler: the model's output after guidance, whatever the guidance rule."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


@contextlib.contextmanager
def observed_inputs(scheduler: Any, observe: Callable[[Tensor], None]) -> Iterator[None]:
    """Passes the `model_output` of every call of `scheduler.step` to `observe`.

    Nothing is observed if the class of the scheduler has no such method. The method of the class is replaced meanwhile,
    and not that of the object, because pipelines copy their scheduler (for audio beside video); a copy is not observed.
    """
    kind = type(scheduler)
    run = getattr(kind, "step", None)
    if not callable(run):
        yield
        return
    signature = inspect.signature(run)

    @functools.wraps(run)  # Pipelines look for arguments such as `eta` in the signature.
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is scheduler:
            output = signature.bind(self, *args, **kwargs).arguments.get("model_output")
            if isinstance(output, Tensor) and output.is_floating_point():
                observe(output)
        return run(self, *args, **kwargs)

    is_inherited = "step" not in vars(kind)
    kind.step = step
    try:
        yield
    finally:
        if is_inherited:
            del kind.step
        else:
            kind.step = run
