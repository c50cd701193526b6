"""The variants that are compared: how each is set up and called, and how its decisions and its memory are read.

All caches run with F1B0 (or `--fn` and `--bn`) and the same mask. With the policy "dynamic" (the default), the diff is
measured where the mask has a 0, as in real use. The threshold is above every diff, so that all caches make the same
decisions.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.sizes import WORKS
from benchmarks.work import Work, build, keep_blocks

THRESHOLD = 0.9  # Below 1, from where on cache-dit and cachedit_fx reuse without looking; diffs are about 0.1.
LIMITS = {"recompile_limit": 1024, "accumulated_recompile_limit": 8192}  # What cache-dit's documentation sets.


@dataclass(frozen=True)
class Settings:
    """The settings of a worker.

    Attributes:
        inner: The backend that compiles.
        mode: The mode of this backend; None for the default.
        policy: What a 0 in the mask means: "dynamic" compares the diff with the threshold, "static" reuses without it.
        front: The number of Fn blocks.
        back: The number of Bn blocks.
        compiles_with_peer_tuning: Whether cache-dit runs with the settings of Inductor that it recommends.
    """

    work: str
    variant: str
    device: str = "cpu"
    is_tiny: bool = False
    inner: str = "inductor"
    mode: str | None = None
    policy: str = "dynamic"
    front: int = 1
    back: int = 0
    compiles_with_peer_tuning: bool = False

    def find_work(self) -> Work:
        work = WORKS[self.work]
        return work.tiny() if self.is_tiny else work


def cache_fields(settings: Settings, warmup: int, mask: Sequence[int] | None) -> dict[str, Any]:
    """The fields that the configurations of this project and of cache-dit have in common; without a mask, no step is
    reused."""
    return dict(
        Fn_compute_blocks=settings.front,
        Bn_compute_blocks=settings.back,
        residual_diff_threshold=0.0 if mask is None else THRESHOLD,
        max_warmup_steps=warmup,
        **({} if mask is None else dict(steps_computation_mask=[*mask], steps_computation_policy=settings.policy)),
    )


class Variant:
    """The model without changes. The other variants are subclasses. There is one object per process.

    Attributes:
        caches: Whether steps are reused.
        compiles: Whether anything is compiled.
        needs: The module that the variant requires.
        note: A note below the table.
    """

    caches: ClassVar[bool] = False
    compiles: ClassVar[bool] = True
    needs: ClassVar[str] = "torch"
    note: ClassVar[str] = ""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.work = settings.find_work()
        self.model: Any = build(self.work, settings.device)
        self.called: Callable[..., Any] = self.model

    @property
    def expected(self) -> list[int]:
        """Returns the numbers of the steps that must be reused, from 0."""
        return [i for i, computes in enumerate(self.work.mask) if not computes] if self.caches else []

    def prepare(self) -> None:
        """Enables the cache and the compilation. The first calls compile."""

    def begin(self) -> None:
        """Prepares a generation."""

    def call(self, guidance_branch: str, inputs: dict[str, Any], step: int) -> Tensor:
        """Returns the velocity of one guidance branch at one step."""
        velocity: Tensor = self.called(**inputs)[0]
        return velocity

    def decisions(self) -> dict[str, list[int]]:
        """Returns the reused steps of this generation by guidance branch; empty for a variant without a cache."""
        return {}

    def state_bytes(self) -> int:
        """Returns the bytes that the cache holds now."""
        return 0

    def end(self) -> None:
        """Ends a generation as a pipeline does. Its prompt has been deleted before."""

    def check_state(self, during: int, after: int) -> None:
        """Checks the bytes that the cache held at the end of a generation, and those that it holds afterwards."""

    def _compile(self, *, fullgraph: bool) -> None:
        self.called = torch.compile(
            self.model, backend=self.settings.inner, mode=self.settings.mode, fullgraph=fullgraph
        )

    def _compile_blocks(self) -> None:
        settings = self.settings
        self.model.compile_repeated_blocks(backend=settings.inner, mode=settings.mode, fullgraph=True)


class Eager(Variant):
    compiles = False


class Plain(Variant):
    """Compiles the whole transformer with torch.compile."""

    def prepare(self) -> None:
        self._compile(fullgraph=True)


class Repeated(Variant):
    """Compiles the blocks with the regional compilation of diffusers."""

    def prepare(self) -> None:
        self._compile_blocks()


class Floor(Plain):
    """The lower bound of a reused step: the head, the Fn and Bn blocks and the tail, compiled as one graph.

    The other steps run the whole model, as with a cache. After them, the weights and the code of a reused step are not
    in the processor's caches.
    """

    note = (
        "floor: a reused step is one compiled graph of the head, the blocks that always run, and the tail; it measures "
        "no diff and adds no residual. Other steps run the plain model."
    )

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        short = copy.copy(self.model)
        short._modules = dict(self.model._modules)  # Of the same weights.
        self.short: Any = keep_blocks(self.work, short, settings.front, settings.back)

    def prepare(self) -> None:
        super().prepare()
        self.short = torch.compile(self.short, backend=self.settings.inner, mode=self.settings.mode, fullgraph=True)

    def call(self, guidance_branch: str, inputs: dict[str, Any], step: int) -> Tensor:
        velocity: Tensor = (self.called if self.work.mask[step] else self.short)(**inputs)[0]
        return velocity


class Ours(Variant):
    """Runs `enable_cache` of this project, captured as one graph."""

    caches = True
    fields: ClassVar[dict[str, Any]] = {}

    def prepare(self) -> None:
        import cachedit_fx

        settings = self.settings
        fields = cache_fields(settings, self.work.warmup, self.work.mask if self.caches else None)
        fields |= dict(forecaster=None, on_no_match="raise", inner_backend=settings.inner)
        if settings.mode:
            fields["mode"] = settings.mode
        self.called = cachedit_fx.enable_cache(self.model, fullgraph=True, **{**fields, **self.fields})

    def _stats(self) -> list[Any]:
        import cachedit_fx

        return list(cachedit_fx.summary(self.model, logging=False))

    def decisions(self) -> dict[str, list[int]]:
        stats, guidance_branches = self._stats(), self.work.guidance_branches
        if [entry.num_steps for entry in stats] != [self.work.num_steps] * len(guidance_branches):
            raise RuntimeError(f"one session of {self.work.num_steps} steps per branch was expected, found {stats}")
        return {
            guidance_branch: entry.cached_steps for guidance_branch, entry in zip(guidance_branches, stats, strict=True)
        }

    def state_bytes(self) -> int:
        return sum(entry.state_bytes for entry in self._stats())

    def check_state(self, during: int, after: int) -> None:
        if not self.caches:
            return
        num_probes = int(self.settings.front > 0)  # What it looks at is kept under a static mask too.
        expected = 0
        for guidance_branch in self.work.guidance_branches:
            sizes = self.work.stream_bytes(guidance_branch)
            kept = sizes if self.settings.back else ["hidden_states"]  # The text goes no further than the last block.
            expected += num_probes * sizes["hidden_states"] + sum(sizes[role] for role in kept)
        if (during, after) != (expected, 0):
            raise RuntimeError(f"{expected} bytes of state and then 0 were expected, found {during} and {after}")


class OursInline(Ours):
    fields: ClassVar[dict[str, Any]] = {"compile_blocks": "inline"}


class OursZero(Ours):
    """Runs the cache with the threshold 0, so that no step is reused."""

    caches = False
    note = "-zero: the threshold is 0, so nothing is reused."


class CacheDiT(Variant):
    """Runs cache-dit on the transformer, and then torch.compile of the whole, which has graph breaks."""

    caches = True
    needs = "cache_dit"
    note = (
        "cache-dit: one region for all blocks. The context is refreshed before each generation, as its pipelines do. "
        "The settings of Inductor are the same for all variants."
    )

    def prepare(self) -> None:
        import cache_dit

        settings = self.settings
        cache_dit.set_compile_configs(
            descent_tuning=settings.compiles_with_peer_tuning, cuda_graphs=settings.mode == "reduce-overhead"
        )
        config = cache_fields(settings, self.work.warmup, self.work.mask if self.caches else None)
        config |= dict(
            num_inference_steps=self.work.num_steps, enable_separate_cfg=len(self.work.guidance_branches) == 2
        )
        cache_dit.enable_cache(self.model, cache_config=cache_dit.DBCacheConfig(**config))
        self._compile_cached()

    def _compile_cached(self) -> None:
        self._compile(fullgraph=False)

    def begin(self) -> None:
        import cache_dit

        cache_dit.refresh_context(self.model)

    def _context(self) -> Any:
        (context,) = self.model._context_manager._cached_context_manager.values()
        return context

    def decisions(self) -> dict[str, list[int]]:
        context = self._context()
        lists = (context.get_cached_steps(), context.get_cfg_cached_steps())
        if context.get_current_step() != self.work.num_steps - 1:
            raise RuntimeError(f"cache-dit counted {context.get_current_step() + 1} steps of {self.work.num_steps}")
        return dict(zip(self.work.guidance_branches, lists, strict=False))

    def state_bytes(self) -> int:
        return bytes_of(self._context().buffers.values())


class CacheDiTRegional(CacheDiT):
    """Runs cache-dit with its blocks compiled one class at a time."""

    def _compile_cached(self) -> None:
        self._compile_blocks()


class CacheDiTZero(CacheDiT):
    caches = False


class FirstBlockCache(Variant):
    """Runs the first-block cache of diffusers. It has a threshold but no mask, so the threshold is set at every step.

    The threshold is read outside of the compiled code, and the diff is measured and read whatever the threshold is.
    """

    caches = True
    note = (
        "fbc: FirstBlockCache does not support masks. Its threshold is set at every step, and its diff is still read."
    )

    def prepare(self) -> None:
        from diffusers import FirstBlockCacheConfig

        if self.settings.front != 1 or self.settings.back:
            raise ValueError("FirstBlockCache always runs the first block and no other: --fn 1 --bn 0")
        self.model.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))
        hooks = [m._diffusers_hook.hooks.values() for m in self.model.modules() if hasattr(m, "_diffusers_hook")]
        (self._head,) = (hook for group in hooks for hook in group if type(hook).__name__ == "FBCHeadBlockHook")
        self._decisions: dict[str, list[int]] = {}
        self._compile(fullgraph=False)

    def begin(self) -> None:
        self._decisions = {guidance_branch: [] for guidance_branch in self.work.guidance_branches}

    def call(self, guidance_branch: str, inputs: dict[str, Any], step: int) -> Tensor:
        self._head.threshold = -1.0 if self.work.mask[step] else float("inf")
        with self.model.cache_context(guidance_branch):
            velocity: Tensor = self.called(**inputs)[0]
        if not self._head.state_manager._state_cache[guidance_branch].should_compute:
            self._decisions[guidance_branch].append(step)
        return velocity

    def decisions(self) -> dict[str, list[int]]:
        return self._decisions

    def state_bytes(self) -> int:
        return bytes_of(vars(state) for state in self._head.state_manager._state_cache.values())

    def end(self) -> None:
        self.model._reset_stateful_cache()


VARIANTS: dict[str, type[Variant]] = {
    "eager": Eager,
    "plain": Plain,
    "repeated": Repeated,
    "ours": Ours,
    "ours-inline": OursInline,
    "ours-zero": OursZero,
    "cache-dit": CacheDiT,
    "cache-dit-regional": CacheDiTRegional,
    "cache-dit-zero": CacheDiTZero,
    "fbc": FirstBlockCache,
    "floor": Floor,
}
USUAL = tuple(name for name in VARIANTS if name not in ("ours-inline", "cache-dit-zero"))


def is_installed(variant: str) -> bool:
    return importlib.util.find_spec(VARIANTS[variant].needs) is not None


def raise_limits() -> None:
    """Raises Dynamo's limits, so that no variant falls back to eager; beyond these limits, an error is raised."""
    for name, limit in (LIMITS | {"fail_on_recompile_limit_hit": True}).items():
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, limit)


def bytes_of(values: Iterable[Any]) -> int:
    """Returns the bytes of the tensors in nested containers; each storage is counted once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            visit(list(value.values()))
        elif isinstance(value, list | tuple):
            for part in value:
                visit(part)

    visit(list(values))
    return sum(storages.values())
