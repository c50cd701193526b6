"""The variants that are compared on pipelines, each set up as its own documentation says for use with torch.compile.

All caches run with F1B0 (or `--fn` and `--bn`) and the same mask. With the policy "dynamic" (the default), the diff is
measured where the mask has a 0, as in real use. The threshold is above every diff, so that all caches make the same
decisions. What has no mask gets a threshold or ratios that lead to the same decisions.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from benchmarks.pipelines import build_pipeline, module_of, transformers_of
from benchmarks.variants import THRESHOLD, Settings, bytes_of, cache_fields
from benchmarks.work import keep_blocks

Decisions = dict[str, list[list[int]]]  # Name of the transformer -> reused steps (its own, from 0) by guidance branch.


class PipelineVariant:
    """The pipeline without changes. The other variants are subclasses. There is one object per process.

    Attributes:
        caches: Whether steps are reused.
        compiles: Whether anything is compiled.
        needs: The module that the variant requires.
        usage: The documented lines that enable it.
        note: A note below the table.
    """

    caches: ClassVar[bool] = False
    compiles: ClassVar[bool] = True
    needs: ClassVar[str] = "torch"
    usage: ClassVar[str] = ""
    note: ClassVar[str] = ""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.work = settings, settings.find_work()
        self.pipe: Any = build_pipeline(self.work)
        self.names = transformers_of(self.work)

    @property
    def modules(self) -> list[Any]:
        """The transformers, without what `torch.compile` puts around them."""
        return [module_of(getattr(self.pipe, name)) for name in self.names]

    @property
    def expected(self) -> Decisions:
        """The steps that must be reused."""
        reused = [[i - steps.start for i in steps if not self.work.mask[i]] for steps in self.work.steps]
        branches = len(self.work.guidance_branches)
        return {name: [found] * branches for name, found in zip(self.names, reused, strict=True)} if self.caches else {}

    @property
    def mask(self) -> tuple[int, ...] | None:
        """The mask of each transformer; None if no step is reused."""
        return self.work.mask[: len(self.work.steps[0])] if self.caches else None

    def prepare(self) -> None:
        """Enables the cache and the compilation. The first generations compile."""

    def before_step(self, step: int) -> None:
        """Called before each step of a generation, with its number, and once after the last."""

    def after_step(self, step: int) -> None:
        """Called after each step of a generation."""

    def decisions(self) -> Decisions:
        """Returns what the last generation reused; empty for a variant without a cache."""
        return {}

    def state_bytes(self) -> int:
        """Returns the bytes that the cache holds now."""
        return 0

    def check_state(self, during: int, after: int) -> None:
        """Checks the bytes that the cache held at the last step of a generation, and those that it holds afterwards."""

    def _compile(self, **others: Any) -> None:
        for name in self.names:
            compiled = torch.compile(getattr(self.pipe, name), backend=self.settings.inner, **others)
            setattr(self.pipe, name, compiled)

    def _compile_blocks(self) -> None:
        for module in self.modules:
            module.compile_repeated_blocks(backend=self.settings.inner, fullgraph=True)


class Eager(PipelineVariant):
    compiles = False


class Plain(PipelineVariant):
    usage = "pipe.transformer = torch.compile(pipe.transformer)"

    def prepare(self) -> None:
        self._compile()


class Repeated(PipelineVariant):
    usage = "pipe.transformer.compile_repeated_blocks(fullgraph=True)"

    def prepare(self) -> None:
        self._compile_blocks()


class Ours(PipelineVariant):
    caches = True
    needs = "cachedit_fx"
    usage = "cachedit_fx.enable_cache(pipe, ...)"
    fields: ClassVar[dict[str, Any]] = {}

    def prepare(self) -> None:
        import cachedit_fx

        settings = self.settings
        fields = cache_fields(settings, self.work.warmup, self.mask)
        fields |= dict(forecaster=None, on_no_match="raise", inner_backend=settings.inner)
        cachedit_fx.enable_cache(self.pipe, **fields | self.fields)

    def _stats(self) -> list[Any]:
        import cachedit_fx

        return list(cachedit_fx.summary(self.pipe, logging=False))

    def decisions(self) -> Decisions:
        found: Decisions = {name: [] for name in self.names}
        for entry in self._stats():
            steps = self.work.steps[self.names.index(entry.module)]
            if entry.num_steps != len(steps):
                raise RuntimeError(f"a session of {len(steps)} steps was expected, found {entry}")
            found[entry.module].append(entry.cached_steps)
        return found

    def state_bytes(self) -> int:
        return sum(entry.state_bytes for entry in self._stats())

    def check_state(self, during: int, after: int) -> None:
        if not self.caches:
            return
        num_probes = int(self.settings.front > 0)
        expected = 0
        for guidance_branch in self.work.guidance_branches:
            sizes = self.work.stream_bytes(guidance_branch)
            cached = sizes if self.settings.back else ["hidden_states"]  # No block after the region reads the text.
            expected += num_probes * sizes["hidden_states"] + sum(sizes[role] for role in cached)
        if (during, after) != (expected * len(self.names), 0):
            raise RuntimeError(f"{expected} bytes of state and then 0 were expected, found {during} and {after}")

    @contextmanager
    def watch_dispatch(self) -> Iterator[list[bool]]:
        """Records for every call inside the context whether it was served by fast dispatch."""
        from cachedit_fx.frontend.fast_dispatch import NOT_SERVED

        calls: list[bool] = []

        def watched(dispatcher: Any) -> Any:
            class Watched:
                def __call__(self, args: Any, kwargs: Any) -> Any:
                    result = dispatcher(args, kwargs)
                    calls.append(result is not NOT_SERVED)
                    return result

                def __getattr__(self, name: str) -> Any:
                    return getattr(dispatcher, name)

            return Watched()

        dispatchers = [module._compiled_call_impl.fast_dispatch for module in self.modules]
        for module, dispatcher in zip(self.modules, dispatchers, strict=True):
            module._compiled_call_impl.fast_dispatch = watched(dispatcher)
        try:
            yield calls
        finally:
            for module, dispatcher in zip(self.modules, dispatchers, strict=True):
                module._compiled_call_impl.fast_dispatch = dispatcher

    def why_not_dispatched(self) -> str:
        """Returns why the last call that Dynamo served is not served by fast dispatch; empty if it is."""
        return next(filter(None, (module._compiled_call_impl.fast_dispatch.reason for module in self.modules)), "")


class OursZero(Ours):
    caches = False
    note = "ours-zero: the threshold is 0, so nothing is reused."

    def decisions(self) -> Decisions:
        if any(reused for found in super().decisions().values() for reused in found):
            raise RuntimeError("a step was reused at the threshold 0")
        return {}


class CacheDiT(PipelineVariant):
    caches = True
    needs = "cache_dit"
    usage = (
        "cache_dit.enable_cache(pipe, cache_config=DBCacheConfig(...)); cache_dit.set_compile_configs(); "
        "pipe.transformer = torch.compile(pipe.transformer)"
    )
    note = "cache-dit: FLUX's block lists form one region (CACHE_DIT_FLUX_ENABLE_DUMMY_BLOCKS=1, its default)."

    def prepare(self) -> None:
        import cache_dit

        settings = self.settings
        config = cache_fields(settings, self.work.warmup, self.mask)
        cache_dit.enable_cache(self.pipe, cache_config=cache_dit.DBCacheConfig(**config))
        cache_dit.set_compile_configs()
        self._compile_cached()

    def _compile_cached(self) -> None:
        self._compile()

    def _contexts(self) -> list[Any]:
        """The context of each transformer."""
        manager = self.modules[0]._context_manager
        names = [name for module in self.modules for name in module._context_names]
        return [manager._cached_context_manager[name] for name in names]

    def decisions(self) -> Decisions:
        found: Decisions = {}
        for name, context, steps in zip(self.names, self._contexts(), self.work.steps, strict=True):
            if context.get_current_step() != len(steps) - 1:
                raise RuntimeError(f"cache-dit counted {context.get_current_step() + 1} steps of {len(steps)}")
            reused = [context.get_cached_steps(), context.get_cfg_cached_steps()]
            found[name] = reused[: len(self.work.guidance_branches)]
        return found

    def state_bytes(self) -> int:
        return bytes_of(buffer for context in self._contexts() for buffer in context.buffers.values())


class CacheDiTRegional(CacheDiT):
    usage = (
        "cache_dit.enable_cache(pipe, cache_config=DBCacheConfig(...)); cache_dit.set_compile_configs(); "
        "pipe.transformer.compile_repeated_blocks(fullgraph=True)"
    )

    def _compile_cached(self) -> None:
        self._compile_blocks()


class DiffusersCache(PipelineVariant):
    """A cache of diffusers, which has one state per guidance branch in a hook of the first block."""

    caches = True

    def _enable(self, number: int, module: Any) -> None:
        raise NotImplementedError

    def prepare(self) -> None:
        for number, module in enumerate(self.modules):
            self._enable(number, module)
        self._heads = [_head_hook(module) for module in self.modules]
        self._decisions: Decisions = {}
        self._compile()

    def _running(self, step: int) -> int:
        """The number of the transformer that runs a step."""
        return next(i for i, steps in enumerate(self.work.steps) if step in steps)

    def before_step(self, step: int) -> None:
        if step == 0:
            branches = self.work.guidance_branches
            self._decisions = {name: [[] for _ in branches] for name in self.names}

    def after_step(self, step: int) -> None:
        number = self._running(step)
        states = self._heads[number].state_manager._state_cache
        for branch, reused in zip(self.work.guidance_branches, self._decisions[self.names[number]], strict=True):
            if not states[branch].should_compute:
                reused.append(step - self.work.steps[number].start)

    def decisions(self) -> Decisions:
        return self._decisions

    def state_bytes(self) -> int:
        return bytes_of(vars(state) for head in self._heads for state in head.state_manager._state_cache.values())


class FirstBlockCache(DiffusersCache):
    usage = (
        "pipe.transformer.enable_cache(FirstBlockCacheConfig(...)); pipe.transformer = torch.compile(pipe.transformer)"
    )
    note = (
        "fbc: FirstBlockCache does not support masks. Its threshold is set before every step, and its diff is still "
        "read."
    )

    def _enable(self, number: int, module: Any) -> None:
        from diffusers import FirstBlockCacheConfig

        if self.settings.front != 1 or self.settings.back:
            raise ValueError("FirstBlockCache always runs the first block and no other: --fn 1 --bn 0")
        module.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))

    def before_step(self, step: int) -> None:
        super().before_step(step)
        if step < self.work.num_steps:
            self._heads[self._running(step)].threshold = -1.0 if self.work.mask[step] else float("inf")


class MagCache(DiffusersCache):
    usage = "pipe.transformer.enable_cache(MagCacheConfig(...)); pipe.transformer = torch.compile(pipe.transformer)"
    note = (
        "magcache: MagCache decides by ratios that a calibration yields. They are chosen here so that it makes the "
        "same decisions: 1 at a reused step, and far from 1 at a computed step. It measures nothing, a reused step "
        "runs no block at all, and its hooks exclude the blocks from compilation, so they run eagerly."
    )

    def _enable(self, number: int, module: Any) -> None:
        from diffusers import MagCacheConfig

        steps = self.work.steps[number]
        ratios = [1e6 if self.work.mask[i] else 1.0 for i in steps]
        module.enable_cache(MagCacheConfig(num_inference_steps=len(steps), mag_ratios=ratios))


PIPELINE_VARIANTS: dict[str, type[PipelineVariant]] = {
    "eager": Eager,
    "plain": Plain,
    "repeated": Repeated,
    "ours": Ours,
    "ours-zero": OursZero,
    "cache-dit": CacheDiT,
    "cache-dit-regional": CacheDiTRegional,
    "fbc": FirstBlockCache,
    "magcache": MagCache,
}
USUAL = tuple(name for name in PIPELINE_VARIANTS if name != "eager")
PEERS = ("cache-dit", "cache-dit-regional", "fbc", "magcache")


class Reference:
    """A second pipeline of the same process. It runs the plain model at computed steps and the floor at the others.

    The floor is the lower bound of a reused step with the same decisions: one compiled graph of the head, the Fn and Bn
    blocks and the tail. It measures no diff and adds no residual.
    """

    def __init__(self, settings: Settings) -> None:
        self.work, self.step = settings.find_work(), 0
        self.pipe: Any = build_pipeline(self.work, is_reference=True)
        others: dict[str, Any] = dict(backend=settings.inner, fullgraph=True)
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            others["isolate_recompiles"] = True  # No guards of other graphs of this class are checked.
        for name in transformers_of(self.work):
            model = getattr(self.pipe, name)
            short = copy.copy(model)
            short._modules = dict(model._modules)  # Of the same weights.
            short = keep_blocks(self.work, short, settings.front, settings.back)
            for module in (model, short):
                module.compile(**others)
            model._compiled_call_impl = self._switch(model._compiled_call_impl, short._compiled_call_impl)

    def before_step(self, step: int) -> None:
        self.step = step

    def _switch(self, plain: Callable[..., Any], short: Callable[..., Any]) -> Callable[..., Any]:
        mask = self.work.mask
        return lambda *args, **kwargs: (plain if mask[self.step] else short)(*args, **kwargs)


def is_installed(variant: str) -> bool:
    return importlib.util.find_spec(PIPELINE_VARIANTS[variant].needs) is not None


def _head_hook(module: nn.Module) -> Any:
    """Returns the hook in the first block that decides."""
    hooks = [part._diffusers_hook.hooks.values() for part in module.modules() if hasattr(part, "_diffusers_hook")]
    (head,) = (
        hook for group in hooks for hook in group if type(hook).__name__ in ("FBCHeadBlockHook", "MagCacheHeadHook")
    )
    return head
