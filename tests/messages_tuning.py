"""The rows of `messages_table` for tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx.forecasters.polynomial import PolynomialCalibratorConfig
from cachedit_fx.tuning import TuneResult, check_signature, load_tuned, tune
from cachedit_fx.tuning.saved import save
from tests import tiny
from tests.messages_table import Row


def of_another_size() -> None:
    module = cachedit_fx.enable_cache(tiny.build(), **tiny.fields(inner_backend="eager"), tuned_on={"latents": [9, 4]})
    with torch.no_grad():
        tiny.step(module, tiny.prompt(), 1.0, tiny.latents())


LINEAR = (PolynomialCalibratorConfig(order=1),)


class Model(nn.Module):
    """Adds the timestep, or returns a value that cannot be forecast."""

    def __init__(self, returned: object = None) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Any:
        return hidden_states * timestep if self.returned is None else self.returned


class Growing(Model):
    """Returns one value at the first timestep, and two at the others."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Any:
        return hidden_states[:, : 1 if timestep.item() == 1 else 2]


class Pipe:
    """Calls its first `num_used` transformers `steps` times."""

    def __init__(self, *modules: nn.Module, num_used: int = 1) -> None:
        names = ("transformer", "transformer_2")
        self.components: dict[str, Any] = dict(zip(names, modules or (Model(),), strict=False))
        self.num_used, self.scheduler = num_used, SimpleNamespace(config={})

    def __call__(self, steps: int = 4, start: float = 1.0) -> Any:
        latents = torch.full((1, 2), start)
        for step in range(steps):
            for module in [*self.components.values()][: self.num_used]:
                latents = latents + module(latents, torch.tensor([1 - step / steps])) / steps
        return (latents,)


def tuned(pipe: Any = None, calls: Any = ({},), **arguments: Any) -> TuneResult:
    given: dict[str, Any] = dict(target="psnr=20", budget="runs=1", forecasters=LINEAR, thresholds=(), confirm=False)
    return tune(pipe or Pipe(), list(calls) if isinstance(calls, tuple) else calls, **(given | arguments))


def of(name: str, value: str, says: str, **arguments: Any) -> Row:
    return Row(name, lambda _: tuned(**arguments), value, says)


def compiled() -> Pipe:
    pipe = Pipe()
    pipe.components["transformer"].compile(backend="eager")
    return pipe


def wrapped() -> Pipe:
    pipe = Pipe()
    pipe.components["transformer"] = torch.compile(Model(), backend="eager")
    return pipe


def resumed(text: str) -> Callable[[Path], object]:
    def provoke(folder: Path) -> object:
        (folder / "known.json").write_text(text)
        return tuned(resume=folder / "known.json")

    return provoke


def written(name: str, text: str) -> Callable[[Path], object]:
    def provoke(folder: Path) -> object:
        (folder / name).write_text(text)
        return load_tuned(folder / name)

    return provoke


def without(package: str, do: Callable[[Path], object]) -> Callable[[Path], object]:
    def provoke(folder: Path) -> object:
        with patch.dict("sys.modules", {package: None}):
            return do(folder)

    return provoke


ROWS = [
    of("tune-target", "got {'ssim': 1}", "or one of psnr, rel_l2, speedup with a number", target={"ssim": 1}),
    of("tune-no-limit", "got neither at_least nor at_most", "'fastest' needs one limit on", target="fastest"),
    of("tune-limit", "got at_least='psnr=40'", "'best' needs one limit on", target="best", at_least="psnr=40"),
    of("tune-two-limits", "got 'psnr=20'", "must be 'fastest' or 'best' if at_most is given", at_most="rel_l2=0.1"),
    of("tune-alternatives", "got 'on'", "alternatives must be one of 'report', 'choose', 'off'", alternatives="on"),
    of("tune-schedulers", "got 'all'", "schedulers must be one of 'any', 'current'", schedulers="all"),
    of("tune-slow", "got 0.5", "target speedup must be greater than 1", target="speedup=0.5"),
    of("tune-budget", "got {'hours': 1}", "budget must be one of runs, seconds", budget={"hours": 1}),
    of("tune-no-budget", "got 0", "budget seconds must be greater than 0", budget=0),
    of("tune-calls", "got 'a cat'", "must be a non-empty list of dicts of the pipeline's arguments", calls="a cat"),
    of("tune-forecasters", "got ['linear']", "must be a list of linear forecasters", forecasters=["linear"]),
    of("tune-length", "got [4, 5]", "must all have the same number of steps", calls=({}, {"steps": 5})),
    of("tune-returned", "got None", "must return a tensor", calls=(lambda pipe: pipe() and None,)),
    of(
        *("tune-two", "transformer, transformer_2, transformer", "must run its transformers one after the other"),
        pipe=Pipe(Model(), Model(), num_used=2),
    ),
    of("tune-sizes", "from transformer", "must have the same size at every step", pipe=Pipe(Growing())),
    Row(
        "enable-names",
        lambda _: cachedit_fx.enable_cache(Pipe(), {"transformer_2": cachedit_fx.CacheConfig()}),
        "each of transformer, got {'transformer_2'",
        "cache_config must be a CacheConfig, or a dict of one for each",
    ),
    of("tune-compiled", "got a Model that is", "neither cached nor compiled", pipe=compiled()),
    of("tune-wrapped", "got an OptimizedModule", "must not be wrapped by torch.compile", pipe=wrapped()),
    of("tune-output", "got int", "must return a floating-point tensor", pipe=Pipe(Model(1))),
    of("tune-bytes", "got 10", "max_bytes must be at least", max_bytes=10),
    of("tune-missed", "psnr=149", "was not reached", target="psnr=149"),
    Row("tune-no-resume", resumed("{}"), "known.json", "resume must be a new path or a file that tune wrote"),
    Row(
        "tune-other-resume",
        resumed('{"references": [1.0], "measured": {}}'),
        "[1.0]",
        "resume must belong to the same calls and pipeline",
    ),
    Row("tuned-missing", lambda folder: load_tuned(folder / "no.yaml"), "no.yaml", "cannot be read"),
    Row("tuned-other", written("a.yaml", "x: 1"), "a.yaml", "must be a file that TuneResult.save wrote"),
    Row("tuned-no-json", written("a.json", "x"), "a.json", "must be a file that TuneResult.save wrote"),
    Row("tuned-no-yaml", written("b.yaml", "[1, {"), "b.yaml", "must be a file that TuneResult.save wrote"),
    Row(
        "tuned-without-yaml",
        without("yaml", lambda folder: save(folder / "a.yaml", tuned().config, {})),
        "PyYAML",
        "which is not installed",
    ),
    Row(
        "tune-plot",
        without("matplotlib.figure", lambda _: tuned().plot()),
        "matplotlib",
        "which is not installed",
    ),
    Row(
        "tuned-elsewhere",
        lambda _: check_signature(Pipe(), {"pipeline": "Other"}),
        "tuned on Other, found Pipe",
        "was tuned on something else",
    ),
    Row("tuned-size", lambda _: of_another_size(), "found [6, 4]", "was tuned on another size"),
]
