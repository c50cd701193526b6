"""Applies the configurations of each family to a pipeline, and compiles it."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

import cachedit_fx
from benchmarks.quality_configs import Config
from benchmarks.quality_flops import PieceFlops
from benchmarks.quality_setup import Setup
from cachedit_fx.flops import FlopCounter


class UnavailableError(RuntimeError):
    """The configuration cannot run in this environment."""


class Runner:
    """Runs the uncached pipeline. The families are subclasses.

    Args:
        setup: The pipeline and its calls; each runner needs its own pipeline.
        inner: The inner backend, "eager" or "inductor".

    Attributes:
        compiles_once: Whether another configuration on the same pipeline triggers no recompilation.
    """

    compiles_once: ClassVar[bool] = False

    def __init__(self, setup: Setup, inner: str = "eager") -> None:
        self.setup, self.inner = setup, inner
        self.pipe = setup.pipe
        self._compile()

    def _compile(self) -> None:
        if self.inner != "eager":
            self.pipe.transformer.compile(backend=self.inner, fullgraph=True)

    def configure(self, config: Config) -> None:
        """Applies the configuration to the pipeline.

        Raises:
            UnavailableError: The configuration cannot run in this environment.
        """

    def close(self) -> None:
        """Removes the configuration from the pipeline."""

    def images(self, number: int) -> Tensor:
        """Returns the images of call `number`, [B, ..., C, H, W]."""
        return self.setup.generate(number)

    def counting(self) -> AbstractContextManager[Any]:
        """Yields an object whose `total` counts the FLOPs that are executed inside the context."""
        return FlopCounter()


class Ours(Runner):
    """Runs cachedit_fx, with `enable_cache`."""

    def __init__(self, setup: Setup, inner: str = "eager") -> None:
        super().__init__(setup, inner)
        self._pieces = PieceFlops()
        self._watching = contextlib.ExitStack()
        if inner == "eager":
            self._watching.enter_context(self._pieces.watching())

    def _compile(self) -> None:
        """Does nothing, because `enable_cache` compiles."""

    def configure(self, config: Config) -> None:
        try:
            fields = dict(config.fields)
            base = cachedit_fx.CacheConfig.cache_dit_defaults()
            if "load" in fields:
                base = cachedit_fx.load_configs(fields.pop("load"))["cache_config"]
            if config.forecaster is not None:
                fields["forecaster"] = made("cachedit_fx.forecasters", config)
            fields |= {"inner_backend": self.inner, "on_no_match": "raise"}
            cachedit_fx.enable_cache(self.pipe, base, **fields)
        except cachedit_fx.errors.ConfigError as error:
            raise UnavailableError(str(error)) from error

    def close(self) -> None:
        cachedit_fx.disable_cache(self.pipe)

    def counting(self) -> AbstractContextManager[Any]:
        self._pieces.total = 0
        return self._pieces


class CacheDiT(Runner):
    """Runs cache-dit, with its `enable_cache`. Blocks are compiled one class at a time, as its documentation does."""

    def __init__(self, setup: Setup, inner: str = "eager") -> None:
        super().__init__(setup, inner)
        # cache-dit patches the pipeline's class: the uncached pipelines of this process must not be of that class.
        kind = type(self.pipe)
        self.pipe.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__})

    def _compile(self) -> None:
        """Compiles after the cache was enabled."""

    def configure(self, config: Config) -> None:
        import cache_dit

        calibrator = None if config.forecaster is None else made("cache_dit", config)
        fields = dict(config.fields) | {"num_inference_steps": self.setup.num_steps}
        cache_dit.enable_cache(self.pipe, cache_config=cache_dit.DBCacheConfig(**fields), calibrator_config=calibrator)
        if self.inner != "eager":
            cache_dit.set_compile_configs(descent_tuning=False)
            self.pipe.transformer.compile_repeated_blocks(backend=self.inner, fullgraph=True)

    def close(self) -> None:
        import cache_dit

        cache_dit.disable_cache(self.pipe)


class FewerSteps(Runner):
    """Runs the uncached pipeline with another scheduler and fewer steps."""

    compiles_once = True

    def __init__(self, setup: Setup, inner: str = "eager") -> None:
        super().__init__(setup, inner)
        self._own = self.pipe.scheduler
        self._steps = setup.num_steps

    def configure(self, config: Config) -> None:
        self.pipe.scheduler = self.setup.solvers[config.fields["solver"]](self._own)
        self._steps = config.fields["num_steps"]

    def close(self) -> None:
        self.pipe.scheduler = self._own

    def images(self, number: int) -> Tensor:
        return self.setup.generate(number, {"num_inference_steps": self._steps})


RUNNERS: dict[str, type[Runner]] = {"ours": Ours, "cache-dit": CacheDiT, "fewer steps": FewerSteps}
NEEDS = {"cache-dit": "cache_dit"}


def made(module: str, config: Config) -> Any:
    """Creates the forecaster of a configuration with the class from its library.

    Raises:
        UnavailableError: The library has no class of this name.
    """
    import importlib

    assert config.forecaster is not None
    name, fields = config.forecaster
    own, _, name = name.rpartition(":")  # `module:name` for a class that is in no library.
    kind = getattr(importlib.import_module(own or module), name, None)
    if kind is None:
        raise UnavailableError(f"{module} has no {name}")
    return kind(**fields)


def reset() -> None:
    """Resets Dynamo, so that no compiled code remains."""
    torch._dynamo.reset()
