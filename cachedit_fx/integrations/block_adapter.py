"""Declares the blocks of a model: `BlockAdapter`, `ParamsModifier`, and their meaning for each transformer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cachedit_fx.config.cache_config import CacheConfig, Changes
from cachedit_fx.config.fields import OPTIONS
from cachedit_fx.config.values import as_forecaster
from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.functors.functor import PatchFunctor
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.forward_pattern import ForwardPattern
from cachedit_fx.patterns.template import BlockTemplate

Nested = Any  # One value, a list with one value per block list, or, for several transformers, a list of such lists.


class ParamsModifier:
    """The overrides of the configuration for the region of one block list.

    Args:
        cache_config: The fields that it was given override those of the configuration for the whole model.
        calibrator_config: The same as the field `forecaster`: what a reused step of this list adds.
        fields: Fields of `CacheConfig`, instead of `cache_config` or in addition to it.

    Raises:
        ConfigError: A field is unknown, its value is not allowed, or it cannot differ between block lists.
    """

    def __init__(
        self, cache_config: CacheConfig | None = None, calibrator_config: object | None = None, **fields: Any
    ) -> None:
        if cache_config is not None and not isinstance(cache_config, CacheConfig):
            raise ConfigError(
                f"cachedit_fx: cache_config must be a CacheConfig, got {shown(cache_config)}; give its fields as "
                "arguments: ParamsModifier(Fn_compute_blocks=1)"
            )
        self.cache_config = with_calibrator((cache_config or CacheConfig()).override(**fields), calibrator_config)
        whole = self.cache_config.given & {name for name, declared in OPTIONS.items() if declared.whole_model}
        if whole:
            name = sorted(whole)[0]
            raise ConfigError(
                f"cachedit_fx: {name} applies to a whole model, not to one block list, got "
                f"{shown(getattr(self.cache_config, name))} in a ParamsModifier; pass it to enable_cache"
            )


def with_calibrator(config: CacheConfig, calibrator_config: object | None) -> CacheConfig:
    """Returns `config` with a calibrator, which is cache-dit's name for a forecaster, as its forecaster.

    Raises:
        ConfigError: The calibrator is not a forecaster, or `config` was given a forecaster as well.
    """
    calibrator = as_forecaster("calibrator_config", calibrator_config)
    if calibrator is None:
        return config
    if "forecaster" in config.given:
        raise ConfigError(
            "cachedit_fx: calibrator_config and forecaster set the same field, got both; pass one of them: "
            f"forecaster={shown(calibrator)}"
        )
    return config.override(forecaster=calibrator)


@dataclass
class BlockAdapter:
    """Declares which blocks of which transformer to cache, and the pattern that they must fit.

    The declaration is compared with the graph when the model is first called. If the two contradict each other, that
    call raises a `PatternError`. With several transformers, every argument from `blocks` on is a list with one entry
    per transformer.

    Attributes:
        pipe: The pipeline; None for a transformer that is used without one.
        transformer: The transformer or a list of transformers; by default those of `pipe`.
        blocks: The block list, or several in any order; with `auto=True`, those in the graph.
        blocks_name: The names of the block lists in the transformer, instead of `blocks`.
        forward_pattern: A `ForwardPattern` or a `BlockTemplate`, or one per block list.
        params_modifiers: The overrides of each block list (`ParamsModifier`). Each list then has its own region.
        check_forward_pattern: If False, the pattern is not enforced, and the blocks are matched as without it.
        patch_functor: Changes the model or its graph before it is matched.
        has_separate_cfg: Whether guidance calls the transformer once per guidance branch.
        auto: Whether to find the blocks in the graph. Blocks that do not fit the pattern are not cached.

    Raises:
        ConfigError: An argument is missing, has a wrong type or length, or names blocks that the transformer does not
            have.
    """

    pipe: Any = None
    transformer: nn.Module | Sequence[nn.Module] | None = None
    blocks: Nested = None
    blocks_name: Nested = None
    forward_pattern: Nested = None
    params_modifiers: Nested = None
    check_forward_pattern: bool | None = None
    patch_functor: PatchFunctor | None = None
    has_separate_cfg: bool = False
    auto: bool = False

    def __post_init__(self) -> None:
        functor: Any = self.patch_functor
        if functor is not None and not isinstance(functor, PatchFunctor):
            hint = f"; pass {functor.__name__}()" if isinstance(functor, type) else ""
            raise ConfigError(f"cachedit_fx: patch_functor must be a PatchFunctor, got {shown(functor)}{hint}")
        if self.blocks is not None and self.blocks_name is not None:
            raise ConfigError(
                "cachedit_fx: blocks and blocks_name are two ways to name the blocks, got both; pass one of them, such "
                f"as blocks_name={shown(self.blocks_name)}"
            )
        if self.blocks is None and self.blocks_name is None and not self.auto and self.forward_pattern is not None:
            raise ConfigError(
                "cachedit_fx: blocks must be given unless auto=True, got None; pass the ModuleList of the blocks, its "
                "name as blocks_name, or auto=True to find them in the graph"
            )
        if self.auto and self.forward_pattern is None:
            raise ConfigError(
                "cachedit_fx: forward_pattern must be given with auto=True, got None; omit auto to try every pattern"
            )
        self.declarations()

    def transformers(self) -> dict[str, nn.Module]:
        """Returns the transformers by their names in the pipeline."""
        if self.transformer is None:
            return transformers_of(self.pipe)
        found: list[Any] = list(self.transformer) if isinstance(self.transformer, list | tuple) else [self.transformer]
        for module in found:
            if not isinstance(module, nn.Module):
                raise ConfigError(
                    f"cachedit_fx: transformer must be a module or a list of modules, got {shown(module)}"
                )
        names = {id(module): name for name, module in _components(self.pipe).items()}
        free = (name for i in itertools.count(1) if (name := f"transformer_{i}" if i > 1 else "transformer"))
        taken = {names[id(module)] for module in found if id(module) in names}
        unnamed = (name for name in free if name not in taken)
        return {names.get(id(module)) or next(unnamed): module for module in found}

    def declarations(self) -> dict[str, Declaration]:
        """Returns the declaration for each transformer, by its name."""
        modules = self.transformers()
        is_many = len(modules) > 1 or isinstance(self.transformer, list | tuple)
        given = self.blocks if self.blocks is not None else self.blocks_name
        lists = _nest("blocks", given, modules, is_many, None, lambda value: value)
        paths = [tuple(_path(blocks, m) for blocks in of) for of, m in zip(lists, modules.values(), strict=True)]
        counts = [len(of) for of in paths]
        patterns = _nest("forward_pattern", self.forward_pattern, modules, is_many, counts, _template)
        modifiers = _nest("params_modifiers", self.params_modifiers, modules, is_many, counts, _override)
        if not any(counts) and any(len(of) > 1 for of in patterns):
            raise ConfigError(
                "cachedit_fx: forward_pattern must be a single pattern if no blocks are named, got "
                f"{shown(self.forward_pattern)}; name the block lists in blocks_name to pass one pattern for each"
            )
        is_checked = self.check_forward_pattern is not False
        return {
            name: Declaration(*entry, is_checked, self.patch_functor)
            for name, entry in zip(modules, zip(paths, patterns, modifiers, strict=True), strict=True)
        }


def _nest(
    argument: str,
    value: Nested,
    modules: dict[str, nn.Module],
    is_many: bool,
    counts: Sequence[int] | None,
    leaf: Callable[[Any], Any],
) -> list[tuple[Any, ...]]:
    """Returns one tuple per transformer with one entry per block list; a single value is used for all of them."""
    if value is None:
        return [()] * len(modules)
    is_list = isinstance(value, list | tuple)
    entries = list(value) if is_many and is_list else [value] * len(modules)
    if len(entries) != len(modules):
        raise ConfigError(
            f"cachedit_fx: {argument} must have one entry per transformer, {len(modules)}, got {len(entries)}"
        )
    nested = []
    for i, entry in enumerate(entries):
        count = counts[i] if counts is not None else 0
        many = list(entry) if isinstance(entry, list | tuple) else [entry] * max(1, count)
        if count and len(many) != count:
            raise ConfigError(f"cachedit_fx: {argument} must have one entry per block list, {count}, got {len(many)}")
        nested.append(tuple(leaf(one) for one in many))
    return nested


def _path(blocks: Any, transformer: nn.Module) -> str:
    """Returns the path of a block list in the transformer, such as `transformer_blocks`."""
    for path, module in transformer.named_modules():
        if path and (module is blocks or path == blocks):
            if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
                found = f"a {type(module).__name__}"
                found += f" of {len(module)}" if isinstance(module, nn.ModuleList | nn.Sequential) else ""
                raise ConfigError(
                    f"cachedit_fx: blocks {path!r} must be a ModuleList of at least two blocks, got {found}"
                )
            return str(path)
    what = repr(blocks) if isinstance(blocks, str) else f"a {type(blocks).__name__}"
    held = ", ".join(path for path, m in transformer.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1)
    raise ConfigError(
        f"cachedit_fx: blocks must be a block list of {type(transformer).__name__} itself (not a slice of one), got "
        f"{what}; it has {held or 'none'}"
    )


def _template(pattern: Any) -> BlockTemplate:
    if isinstance(pattern, ForwardPattern):
        return pattern.value
    if isinstance(pattern, BlockTemplate):
        return pattern
    allowed = f"ForwardPattern.{', '.join(member.name for member in ForwardPattern)}"
    raise ConfigError(f"cachedit_fx: forward_pattern must be one of {allowed} or a BlockTemplate, got {shown(pattern)}")


def _override(modifier: Any) -> Changes | None:
    if modifier is None:
        return None
    if not isinstance(modifier, ParamsModifier):
        hint = "; wrap it: ParamsModifier(...)" if isinstance(modifier, CacheConfig) else ""
        raise ConfigError(
            f"cachedit_fx: params_modifiers must contain ParamsModifier or None, got {shown(modifier)}{hint}"
        )
    return modifier.cache_config.changes


def transformers_of(target: Any) -> dict[str, nn.Module]:
    """Returns the diffusion transformers of a pipeline or an adapter, or a transformer itself, by name.

    The transformers of a pipeline are the components that have "transformer" in their name or in the name of their
    class, except control networks, encoders, adapters and VAEs.

    Raises:
        ConfigError: There is no transformer.
    """
    if isinstance(target, BlockAdapter):
        return target.transformers()
    if isinstance(target, nn.Module):
        return {type(target).__name__: target}
    parts = _components(target)
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module) and _is_transformer(name, part)}
    if not found:
        held = ", ".join(f"{name} ({type(part).__name__})" for name, part in parts.items()) or "no components"
        raise ConfigError(
            "cachedit_fx: the model must be a pipeline with a diffusion transformer, a transformer or a BlockAdapter, "
            f"got {type(target).__name__} with {held}.\n"
            "What to do: pass the transformer itself (any nn.Module)."
        )
    return found


def title_of(target: Any) -> str:
    """Returns the name of `target` for the heading of a table."""
    if isinstance(target, BlockAdapter):
        target = target.pipe if target.pipe is not None else next(iter(target.transformers().values()))
    return type(getattr(target, "_orig_mod", target)).__name__


def _components(pipe: Any) -> dict[str, Any]:
    components = getattr(pipe, "components", None)
    if isinstance(components, dict):
        return components
    held = getattr(pipe, "transformer", None)
    return {"transformer": held} if isinstance(held, nn.Module) else {}


def _is_transformer(name: str, module: nn.Module) -> bool:
    # The class names of control networks, text encoders and so on contain what they are.
    called = f"{name} {type(getattr(module, '_orig_mod', module)).__name__}".lower()
    return "transformer" in called and not any(word in called for word in ("controlnet", "encoder", "adapter", "vae"))
