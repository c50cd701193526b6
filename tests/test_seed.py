"""Every usage snippet below runs unchanged and does what its text says.

The snippets are those of a written specification, with the package's name in the imports and without trailing blanks.
Checkpoints are replaced by tiny random pipelines, `pipe(...)` by a call with inputs for them, and Inductor, except in
one test, by the backend "eager".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx.cache_factory.patch_functors import HiDreamPatchFunctor
from cachedit_fx.config.cache_config import FIELD_NAMES
from tests.sessions import every_session
from tests.tiny_pipelines import PIPELINES, TinyPipeline

NUM_STEPS = 11
WARMUP_STEPS = 2  # By default the first sixth of the timesteps.
NUM_BLOCKS = 3  # By default, one of them runs at every step.
# The steps of a random model differ by more than the threshold.
NOTHING_REUSED = ["warmup"] * WARMUP_STEPS + ["diff-above"] * (NUM_STEPS - WARMUP_STEPS)

SNIPPETS = {
    "one line": """
import cachedit_fx as cache_dit
from diffusers import DiffusionPipeline

# Can be any diffusion pipeline
pipe = DiffusionPipeline.from_pretrained("Qwen/Qwen-Image")

# One-line code with default cache options.
cache_dit.enable_cache(pipe)

# Just call the pipe as normal.
output = pipe(...)

# Disable cache and run original pipe.
cache_dit.disable_cache(pipe)
""",
    "block adapter": """
from cachedit_fx import ForwardPattern, BlockAdapter

# Use BlockAdapter with `auto` mode.
cache_dit.enable_cache(
    BlockAdapter(
        # Any DiffusionPipeline, Qwen-Image, etc.
        pipe=pipe, auto=True,
        # Check `Forward Pattern Matching` documentation and hack the code of
        # of Qwen-Image, you will find that it has satisfied `FORWARD_PATTERN_1`.
        forward_pattern=ForwardPattern.Pattern_1,
    ),
)

# Or, manually setup transformer configurations.
cache_dit.enable_cache(
    BlockAdapter(
        pipe=pipe, # Qwen-Image, etc.
        transformer=pipe.transformer,
        blocks=pipe.transformer.transformer_blocks,
        forward_pattern=ForwardPattern.Pattern_1,
    ),
)
""",
    "hybrid patterns": """
# For diffusers <= 0.34.0, FLUX.1 transformer_blocks and
# single_transformer_blocks have different forward patterns.
cache_dit.enable_cache(
    BlockAdapter(
        pipe=pipe, # FLUX.1, etc.
        transformer=pipe.transformer,
        blocks=[
            pipe.transformer.transformer_blocks,
            pipe.transformer.single_transformer_blocks,
        ],
        forward_pattern=[
            ForwardPattern.Pattern_1,
            ForwardPattern.Pattern_3,
        ],
    ),
)
""",
    "two transformers": """
from cachedit_fx import ForwardPattern, BlockAdapter, ParamsModifier

cache_dit.enable_cache(
    BlockAdapter(
        pipe=pipe,
        transformer=[
            pipe.transformer,
            pipe.transformer_2,
        ],
        blocks=[
            pipe.transformer.blocks,
            pipe.transformer_2.blocks,
        ],
        forward_pattern=[
            ForwardPattern.Pattern_2,
            ForwardPattern.Pattern_2,
        ],
        # Setup different cache params for each 'blocks'. You can
        # pass any specific cache params to ParamModifier, the old
        # value will be overwrite by the new one.
        params_modifiers=[
            ParamsModifier(
                cache_config=BasicCacheConfig(
                    max_warmup_steps=4,
                    max_cached_steps=8,
                ),
            ),
            ParamsModifier(
                cache_config=BasicCacheConfig(
                    max_warmup_steps=2,
                    max_cached_steps=20,
                ),
            ),
        ],
        has_separate_cfg=True,
    ),
)
""",
    "patch functor": """
@BlockAdapterRegistry.register("HiDream")
def hidream_adapter(pipe, **kwargs) -> BlockAdapter:
    from diffusers import HiDreamImageTransformer2DModel
    from cachedit_fx.cache_factory.patch_functors import HiDreamPatchFunctor

    assert isinstance(pipe.transformer, HiDreamImageTransformer2DModel)
    return BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=[
            pipe.transformer.double_stream_blocks,
            pipe.transformer.single_stream_blocks,
        ],
        forward_pattern=[
            ForwardPattern.Pattern_0,
            ForwardPattern.Pattern_3,
        ],
        # NOTE: Setup your custom patch functor here.
        patch_functor=HiDreamPatchFunctor(),
        **kwargs,
    )
""",
    "summary": """
stats = cache_dit.summary(pipe)
""",
}

TABLE = """
Cache Steps and Residual Diffs Statistics: QwenImagePipeline

| Cache Steps | Diffs Min | Diffs P25 | Diffs P50 | Diffs P75 | Diffs P95 | Diffs Max |
|-------------|-----------|-----------|-----------|-----------|-----------|-----------|
| 23          | 0.045     | 0.084     | 0.114     | 0.147     | 0.241     | 0.297     |
"""


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes "eager" the default inner backend: it compiles fast, and outputs can be compared bitwise."""
    defaults = list(cachedit_fx.CacheConfig.__init__.__defaults__)
    defaults[FIELD_NAMES.index("inner_backend")] = "eager"
    monkeypatch.setattr(cachedit_fx.CacheConfig.__init__, "__defaults__", tuple(defaults))


@pytest.fixture
def registry() -> Iterator[None]:
    """Removes the registrations of the test."""
    before = set(cachedit_fx.integrations.BlockAdapterRegistry.supported_pipelines()[1])
    yield
    for name in set(cachedit_fx.integrations.BlockAdapterRegistry.supported_pipelines()[1]) - before:
        cachedit_fx.integrations.BlockAdapterRegistry.unregister(name)


def built(tiny: TinyPipeline, num_blocks: int = NUM_BLOCKS, **inputs: Any) -> DiffusionPipeline:
    """A pipeline whose call `pipe(...)` uses the tiny inputs, updated by `inputs`."""
    pipe = tiny.build(num_blocks)

    def call(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        if args == (...,):
            args, kwargs = (), tiny.arguments() | dict(num_inference_steps=NUM_STEPS) | inputs | kwargs
        return tiny.kind.__call__(self, *args, **kwargs)

    pipe.__class__ = type(tiny.kind.__name__, (tiny.kind,), {"__call__": call})
    return pipe


def namespace(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The names that are defined before a snippet runs."""
    names = ("BlockAdapter", "BlockAdapterRegistry", "BasicCacheConfig", "ForwardPattern")
    return {name: getattr(cachedit_fx, name) for name in names} | {"cache_dit": cachedit_fx, "pipe": pipe}


def statements(name: str, scope: dict[str, Any]) -> Iterator[ast.stmt]:
    """Runs the snippet statement by statement, and stops after each."""
    for statement in ast.parse(SNIPPETS[name]).body:
        exec(compile(ast.Module([statement], []), name, "exec"), scope)
        yield statement


def run(name: str, pipe: DiffusionPipeline) -> dict[str, Any]:
    """Runs the whole snippet. Returns the names that it defines."""
    scope = namespace(pipe)
    exec(compile(SNIPPETS[name], name, "exec"), scope)
    return scope


def from_hub(pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", {"Qwen/Qwen-Image": pipe}.__getitem__)


def assert_equal(output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def decisions(module: nn.Module) -> dict[tuple[str, str], list[str]]:
    """(guidance branch, region) -> the reasons of all of its steps, for the latest sessions of the module."""
    return {(stats.session, stats.region): stats.decisions for stats in every_session(module)}


def prompts_of_one_length() -> dict[str, Any]:
    names = ("prompt_embeds", "prompt_embeds_mask")
    other = PIPELINES["qwen_image"].arguments(seed=2)
    return {f"negative_{name}": other[name] for name in names}


def is_enabled(module: nn.Module) -> bool:
    return "_compiled_call_impl" in vars(module)


# Cache acceleration with one line of code.


def test_one_line_caches_any_pipeline_until_the_cache_is_disabled(eager, monkeypatch):
    # The prompts have one length, because a second length would need a second graph.
    pipe = built(PIPELINES["qwen_image"], **prompts_of_one_length())
    expected = pipe(...)[0]
    from_hub(pipe, monkeypatch)
    scope = run("one line", pipe)
    assert scope["pipe"] is pipe
    assert_equal(scope["output"][0], expected)
    ran = decisions(pipe.transformer)
    assert {*ran} == {
        (guidance_branch, f"transformer_blocks[1:{NUM_BLOCKS}]") for guidance_branch in ("cond", "uncond")
    }
    assert [*ran.values()] == [NOTHING_REUSED] * 2
    assert not is_enabled(pipe.transformer) and not cachedit_fx.is_cached(pipe.transformer)
    assert_equal(pipe(...)[0], expected)
    assert decisions(pipe.transformer) == ran  # The uncached pipeline ran, so there is no new session.


@pytest.mark.slow
def test_one_line_runs_with_inductor(monkeypatch):
    pipe = built(PIPELINES["qwen_image"])
    expected = pipe(...)[0]
    from_hub(pipe, monkeypatch)
    output = run("one line", pipe)["output"][0]
    ran = decisions(pipe.transformer)
    assert {*ran} == {
        (guidance_branch, f"transformer_blocks[1:{NUM_BLOCKS}]") for guidance_branch in ("cond", "uncond")
    }
    assert [*ran.values()] == [NOTHING_REUSED] * 2
    # Latents are of order 1. Fused float32 kernels round differently, and a random transformer feeds its error back for
    # eleven steps.
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)
    assert_equal(pipe(...)[0], expected)


def test_one_line_caches_flux_2_whose_first_list_is_as_long_as_fn(eager):
    pipe = built(
        PIPELINES["flux2"], 2
    )  # FLUX.2-dev has eight double blocks, which is the number of Fn blocks of cache-dit.
    expected = pipe(...)[0]
    cachedit_fx.enable_cache(pipe, Fn_compute_blocks=2)
    assert_equal(pipe(...)[0], expected)
    assert cachedit_fx.is_cached(pipe.transformer)


# Automatic block adapter.


def test_an_adapter_finds_the_blocks_by_pattern_or_gets_them_explicitly(eager):
    pipe = built(PIPELINES["qwen_image"], true_cfg_scale=1.0)
    expected = pipe(...)[0]
    ways = 0
    for statement in statements("block adapter", namespace(pipe)):
        if isinstance(statement, ast.Expr):
            cachedit_fx.reset()
            assert_equal(pipe(...)[0], expected)
            assert decisions(pipe.transformer) == {("cond", f"transformer_blocks[1:{NUM_BLOCKS}]"): NOTHING_REUSED}
            ways += 1
    assert ways == 2
    cachedit_fx.disable_cache(pipe)
    assert not is_enabled(pipe.transformer)
    assert_equal(pipe(...)[0], expected)


# Hybrid forward patterns.


def test_lists_of_patterns_1_and_3_are_cached_as_one_chain(eager):
    pipe = built(PIPELINES["chroma"])
    expected = pipe(...)[0]
    run("hybrid patterns", pipe)
    assert_equal(pipe(...)[0], expected)
    found = decisions(pipe.transformer)
    assert [*found.values()] == [NOTHING_REUSED] * 2  # One per guidance branch.
    region = f"transformer_blocks[1:{NUM_BLOCKS}]+single_transformer_blocks"
    assert {found_region for _, found_region in found} == {region}
    cachedit_fx.disable_cache(pipe)
    assert_equal(pipe(...)[0], expected)


def test_flux_of_newer_diffusers_is_reported_to_match_pattern_1_throughout(eager):
    pipe = built(PIPELINES["flux"], 2)
    run("hybrid patterns", pipe)
    with pytest.raises(cachedit_fx.errors.PatternError) as caught:
        pipe(...)
    message = str(caught.value)
    assert re.search(r"pattern 3 \(.*\) was declared for single_transformer_blocks", message)
    assert "single_transformer_blocks fits pattern 1" in message


# Two transformers with separate limits.


def test_each_transformer_of_wan_22_has_its_own_limits(eager):
    num_steps = 50  # About 25 for each transformer.
    pipe = built(PIPELINES["wan22"])
    expected = pipe(...)[0]
    run("two transformers", pipe)
    modules = pipe.transformer, pipe.transformer_2

    for module in modules:
        cachedit_fx.refresh_context(module, residual_diff_threshold=1.0)  # Only the limits decide.
    pipe(..., num_inference_steps=num_steps)
    steps = 0
    for module, warmup, cached in zip(modules, (4, 2), (8, 20), strict=True):
        found = decisions(module)
        assert {*found} == {(guidance_branch, f"blocks[1:{NUM_BLOCKS}]") for guidance_branch in ("cond", "uncond")}
        for reasons in found.values():
            rest = len(reasons) - warmup - cached
            assert rest > 0
            assert reasons == ["warmup"] * warmup + ["threshold-one"] * cached + ["max-cached"] * rest
            steps += len(reasons)
    assert steps == 2 * num_steps

    for module in modules:
        cachedit_fx.refresh_context(module, residual_diff_threshold=0.0)
    assert_equal(pipe(...)[0], expected)
    cachedit_fx.disable_cache(pipe)
    assert not any(map(is_enabled, modules))
    assert_equal(pipe(...)[0], expected)


# Patch functors.


def test_a_registered_adapter_with_a_functor_caches_hidream(eager, registry):
    pipe = built(PIPELINES["hidream"], 2)  # Two blocks in each of its two lists.
    expected = pipe(...)[0]
    scope = run("patch functor", pipe)
    adapter = cachedit_fx.integrations.BlockAdapterRegistry.get(pipe)
    assert isinstance(adapter, cachedit_fx.BlockAdapter)
    assert isinstance(adapter.patch_functor, HiDreamPatchFunctor)
    assert scope["hidream_adapter"](pipe, has_separate_cfg=True).has_separate_cfg

    cachedit_fx.enable_cache(pipe, Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=0.0)
    # Latents are of order 1. The functor sums the experts in matrix products of other sizes.
    torch.testing.assert_close(pipe(...)[0], expected, rtol=0, atol=1e-5)
    cachedit_fx.refresh_context(pipe.transformer, residual_diff_threshold=1.0)
    pipe(...)
    (last,) = cachedit_fx.summary(pipe, logging=False)  # Both guidance branches are one batch.
    assert last.region == "double_stream_blocks[1:2]+single_stream_blocks"
    assert last.decisions == ["warmup"] * 3 + ["threshold-one"] * (NUM_STEPS - 3)
    cachedit_fx.disable_cache(pipe)
    assert_equal(pipe(...)[0], expected)


# Statistics.


def test_summary_prints_the_documented_table_and_with_details_one_line_per_step(eager, capsys):
    pipe = built(PIPELINES["qwen_image"], 2, **prompts_of_one_length())
    cachedit_fx.enable_cache(pipe, Fn_compute_blocks=1, max_warmup_steps=2)
    pipe(...)
    stats = run("summary", pipe)["stats"]
    ran = [("transformer", guidance_branch, NUM_STEPS) for guidance_branch in ("cond", "uncond")]
    assert [(entry.module, entry.session, entry.num_steps) for entry in stats] == ran
    assert str(stats) in capsys.readouterr().out
    title, empty, header, rule, row = TABLE.strip().splitlines()
    ours, below = str(stats).splitlines()[:6], str(stats).splitlines()[6:]
    assert below[0] == "" and below[1].startswith(f"transformer: {2 * NUM_STEPS} calls since the cache was enabled: ")
    assert ours[:2] == [title, empty]
    assert ours[2].startswith(header)  # The columns of this package come after those of cache-dit.
    assert ours[3].startswith(rule)
    for line in ours[4:]:
        for ours_cell, cell in zip(cells_of(line), cells_of(row), strict=False):
            assert re.fullmatch(re.sub(r"\d+", r"\\d+", re.escape(cell)), ours_cell)

    details = str(cachedit_fx.summary(pipe, details=True, logging=False))
    assert details.startswith(str(stats))
    lines = [cells_of(line) for line in details[len(str(stats)) :].strip().splitlines()]
    assert lines[0][:4] == ["Step", "Decision", "Reason", "Diff"]
    for entry in stats:
        steps = [line[:4] for line in lines[2:] if line[-1] == entry.session]
        diffs = ["-"] * 2 + [f"{entry.residual_diffs[step]:.3f}" for step in range(2, NUM_STEPS)]
        reuse = ["reuse" if step in entry.cached_steps else "compute" for step in range(NUM_STEPS)]
        assert steps == [
            [str(step), *line] for step, line in enumerate(zip(reuse, entry.decisions, diffs, strict=True))
        ]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]
