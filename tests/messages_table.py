"""One row per error and warning of the package: how to provoke it, and what its text must contain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import fx

import cachedit_fx
import cachedit_fx.testing.pattern_check
from cachedit_fx import (
    Backend,
    BlockAdapter,
    BlockTemplate,
    CacheConfig,
    ForwardPattern,
    ParamsModifier,
    load_configs,
    register_pattern,
    steps_mask,
)
from cachedit_fx.functors import PatchFunctor, split_stream
from cachedit_fx.inspect.graph_json import from_json
from cachedit_fx.integrations import BlockAdapterRegistry
from cachedit_fx.patterns import BUILT_IN
from cachedit_fx.patterns.blocks import ENCODER, HIDDEN
from tests import hybrid, original_wan
from tests.hybrid import pipe_of

P1, P3 = ForwardPattern.Pattern_1, ForwardPattern.Pattern_3


@dataclass(frozen=True)
class Row:
    """`provoke` receives an empty folder; the text must contain `value`, which was given or found, and `says`."""

    name: str
    provoke: Callable[[Path], object]
    value: str
    says: str


def of_config(name: str, says: str, **field: Any) -> Row:
    (value,) = field.values()
    return Row(name, lambda _: CacheConfig(**field), f"got {value!r}", says)


def of_mask(name: str, value: str, says: str, **arguments: Any) -> Row:
    return Row(name, lambda _: steps_mask(**arguments), value, says)


def of_adapter(name: str, value: str, says: str, arguments: Callable[[Any], dict[str, Any]]) -> Row:
    return Row(name, lambda _: BlockAdapter(**arguments(hybrid.build())), value, says)


def of_template(name: str, value: str, says: str, **fields: Any) -> Row:
    fields = dict(takes=(HIDDEN,), returns=(HIDDEN,)) | fields
    return Row(name, lambda _: BlockTemplate("mine", **fields), value, says)


def of_file(name: str, value: str, says: str, file: str, text: str | None = None) -> Row:
    def provoke(folder: Path) -> None:
        if text is not None:
            (folder / file).write_text(text, encoding="utf-8")
        load_configs(folder / file)

    return Row(name, provoke, value, says)


def of_sizes(name: str, value: str, says: str, sizes: tuple[Any, ...], *, is_read: bool = True) -> Row:
    def provoke(_: Path) -> None:
        graph = fx.Graph()
        node = graph.placeholder("joint")
        node.meta["example_value"] = torch.zeros(1, 6, 4)
        if is_read:
            graph.call_function(torch.neg, (node,))
        split_stream(node, sizes, 1, (ENCODER, HIDDEN))

    return Row(name, provoke, value, says)


def of_function(name: str, value: str, says: str, *places: str) -> Row:
    def provoke(_: Path) -> None:
        functor, model = PatchFunctor(), hybrid.build(original_wan.Wan)
        try:
            for place in places:
                functor.replace_function(model, place, lambda *args: args)
        finally:
            functor.restore(model)

    return Row(name, provoke, value, says)


def without_yaml(folder: Path) -> None:
    with patch.dict("sys.modules", {"yaml": None}):
        of_file("", "", "", "cache.yaml", "{}").provoke(folder)


def registered(returned: Any) -> None:
    BlockAdapterRegistry.register("Hybrid")(lambda pipe: returned)
    try:
        cachedit_fx.enable_cache(hybrid.build())
    finally:
        BlockAdapterRegistry.unregister("Hybrid")


GONE = dict(op="call_function", target="gone.f", args={"tuple": []}, kwargs={"dict": []})  # A node of graph.json.


def enter(key: Any) -> None:
    with cachedit_fx.session(key):
        pass


CONFIG = [
    Row(
        "unknown-field",
        lambda _: CacheConfig(Fn_compute_block=8),
        "(given 8)",
        "Did you mean 'Fn_compute_blocks'?\nAllowed: Fn_compute_blocks, ",
    ),
    Row(
        "unknown-option",
        lambda _: Backend(options={"max_autotun": True}),
        "(given True)",
        "every option of Inductor",
    ),
    Row(
        "nothing-to-look-at",
        lambda _: Backend(CacheConfig(Fn_compute_blocks=0)),
        "Fn_compute_blocks=0",
        "What to do: set both, or set Fn_compute_blocks=1",
    ),
    of_config("mask", "steps_computation_mask must be a list of 0 and 1", steps_computation_mask=(1, 2)),
    of_config("kept-blocks", "non_prune_block_ids must be a list of ints >= 0", non_prune_block_ids=(-1,)),
    of_config("debug-dir", "debug_dir must be the path of a folder", debug_dir=3),
    of_config("int", "max_warmup_steps must be an int >= 0", max_warmup_steps=-1),
    of_config("float", "residual_diff_threshold must be a finite number", residual_diff_threshold="0.1"),
    of_config("choice", "regions must be one of 'merged', 'per_list'", regions="per-list"),
    of_config("inner-backend", "Did you mean 'inductor'?\nSee all names: torch.compiler", inner_backend="inductr"),
]

ADAPTER = [
    Row("modifier-of-a-dict", lambda _: ParamsModifier({"mode": 1}), "got {'mode': 1}", "must be a CacheConfig"),
    Row(
        "modifier-of-a-model",
        lambda _: ParamsModifier(on_no_match="raise"),
        "got 'raise' in a ParamsModifier",
        "on_no_match applies to a whole model, not to one block list",
    ),
    Row("calibrator", lambda _: ParamsModifier(calibrator_config=1), "got 1", "calibrator_config must be a Forecaster"),
    of_adapter(
        "functor-class",
        "got <class 'cachedit_fx.functors.functor.PatchFunctor'>",
        "pass PatchFunctor()",
        lambda m: dict(transformer=m, patch_functor=PatchFunctor),
    ),
    of_adapter(
        "blocks-twice",
        "blocks_name='blocks'",
        "got both; pass one of them",
        lambda m: dict(transformer=m, blocks=m.blocks, blocks_name="blocks"),
    ),
    of_adapter("no-blocks", "got None", "unless auto=True", lambda m: dict(transformer=m, forward_pattern=P1)),
    of_adapter("no-pattern", "got None", "forward_pattern must be given", lambda m: dict(transformer=m, auto=True)),
    of_adapter("no-module", "got 'flux'", "transformer must be a module", lambda m: dict(transformer="flux")),
    of_adapter(
        "auto-of-two",
        "Pattern_1",
        "name the block lists in blocks_name",
        lambda m: dict(transformer=m, auto=True, forward_pattern=[P1, P3]),
    ),
    of_adapter(
        "per-transformer",
        "got 1",
        "blocks must have one entry per transformer, 2",
        lambda m: dict(transformer=[m, hybrid.build()], blocks=[m.blocks], forward_pattern=P1),
    ),
    of_adapter(
        "per-list",
        "got 1",
        "forward_pattern must have one entry per block list, 2",
        lambda m: dict(transformer=m, blocks_name=["blocks", "single_blocks"], forward_pattern=[P1]),
    ),
    of_adapter(
        "no-list",
        "got a Linear",
        "'proj_in' must be a ModuleList of at least two blocks",
        lambda m: dict(transformer=m, blocks=m.proj_in, forward_pattern=P1),
    ),
    of_adapter(
        "slice",
        "got a ModuleList",
        "it has blocks, single_blocks",
        lambda m: dict(transformer=m, blocks=m.blocks[1:], forward_pattern=P1),
    ),
    of_adapter(
        "pattern-number",
        "got 1",
        "must be one of ForwardPattern.Pattern_0, Pattern_1, ",
        lambda m: dict(transformer=m, blocks=m.blocks, forward_pattern=1),
    ),
    of_adapter(
        "modifier-config",
        "got CacheConfig(",
        "wrap it: ParamsModifier(...)",
        lambda m: dict(transformer=m, params_modifiers=CacheConfig()),
    ),
    Row(
        "no-transformer",
        lambda _: cachedit_fx.enable_cache(pipe_of(vae=torch.nn.Linear(1, 1))),
        "got SimpleNamespace with vae (Linear)",
        "What to do: pass the transformer itself",
    ),
    Row("registered-name", lambda _: BlockAdapterRegistry.register(hybrid.Hybrid), "Hybrid'>", "give 'Hybrid'"),
    Row("registered-adapter", lambda _: registered(3), "got 3", "for 'Hybrid' must return a BlockAdapter"),
]

FILES = [
    Row(
        "beside-cache-config",
        lambda _: load_configs({"cache_config": {}, "calibrator": {"size": 2}}),
        "'calibrator' (given {'size': 2})",
        "Did you mean 'calibrator_config'?\nAllowed: cache_config, calibrator_config, tuned.",
    ),
    Row("fields", lambda _: load_configs({"cache_config": [1]}), "got [1]", "must be a mapping of fields"),
    Row(
        "named-mask",
        lambda _: load_configs({"steps_computation_mask": "fast"}),
        "steps_computation_mask='fast', got None",
        "num_inference_steps must be given with",
    ),
    of_file("no-file", "cache.yaml' cannot be read", "No such file", "cache.yaml"),
    of_file("no-json", "line 1 column 2", "cannot be parsed: expected JSON", "cache.json", "{"),
    of_file("no-mapping", "got [1, 2]", "must contain a mapping", "cache.json", "[1, 2]"),
    Row("no-yaml", without_yaml, "PyYAML", "pip install pyyaml"),
]

MASKS = [
    of_mask("total-steps", "got 0", "total_steps must be an int >= 1", total_steps=0),
    of_mask("bins", "got [-1]", "must be a list of ints >= 0", compute_bins=[-1], cache_bins=[1]),
    of_mask("one-of-two-bins", "got None", "cache_bins must be given together with compute_bins=[3]", compute_bins=[3]),
    of_mask("short-bins", "add up to 2", "total_steps=7", compute_bins=[1], cache_bins=[1], total_steps=7),
    of_mask("empty-bins", "got [], []", "must add up to at least one step", compute_bins=[], cache_bins=[]),
    of_mask("no-steps", "got None", "total_steps must be given with mask_policy='medium'"),
    of_mask("few-steps", "got 5", "must be 4, 6, or at least 8", total_steps=5),
    of_mask("policy", "got 'fats'", "Did you mean 'fast'?", mask_policy="fats", total_steps=28),
]

PATTERNS = [
    Row("registered-pattern", lambda _: register_pattern("mine"), "got 'mine'", "takes a BlockTemplate"),
    Row("numbered-pattern", lambda _: register_pattern(BUILT_IN[3]), "got 3", "number must be None"),
    of_template("no-hidden", f"takes=[{ENCODER!r}]", f"must take and return {HIDDEN!r}", takes=(ENCODER,)),
    of_template(
        "unknown-role",
        "got ['audio']",
        f"which are [{HIDDEN!r}]",
        cached={"audio": "value"},
    ),
    of_template("cached-as", "got 'delta'", "must be one of 'residual', 'value'", cached={HIDDEN: "delta"}),
]

FUNCTORS = [
    Row(
        "no-method",
        lambda _: PatchFunctor().replace_method(hybrid.build(), "foward", lambda self: None),
        "no method 'foward'",
        "Did you mean 'forward'?",
    ),
    of_function("no-function", "rope_aply", "Did you mean 'rope_apply'?", "tests.original_wan:rope_aply"),
    of_function("no-python-module", "no.such.module", "as 'package.module:function'", "no.such.module:f"),
    of_function(
        "another-function",
        "tests.original_wan:rope_apply",
        "use the same function for all models",
        "rope_apply",
        "rope_apply",
    ),
    of_sizes("not-read", "`joint`", "pass the node that a block reads", (2, None), is_read=False),
    of_sizes("kind-of-size", "got 2.0", "must be numbers or nodes (the last one may be None)", (2.0, None)),
    of_sizes("sum-of-sizes", "got [2, 3]", "sizes must add up to 6, the length of `joint` along", (2, 3)),
]

REST = [
    Row("session", lambda _: enter([1]), "got [1]", "needs a hashable key other than None"),
    Row(
        "lost-function",
        lambda _: from_json({"nodes": [GONE]}),
        "'gone.f'",
        "which the installed packages do not have",
    ),
]  # fmt: skip

CHEAP = [*CONFIG, *ADAPTER, *FILES, *MASKS, *PATTERNS, *FUNCTORS, *REST]
