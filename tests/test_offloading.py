"""Offloaded models: the hooks that move weights are left out of the graph, and each piece moves the weights it reads.

Everything is on the CPU. That weights are moved shows in the modes that have no usable weight in the module between two
calls: accelerate leaves tensors on the meta device there, and diffusers' offloading to disk uninitialized ones.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch._dynamo.utils import counters

import cachedit_fx
from cachedit_fx import NoMatchError
from cachedit_fx.frontend import inner_compiler
from cachedit_fx.frontend.weight_hooks import find_weight_hooks
from cachedit_fx.inspect import CallCounts
from tests import tiny
from tests.idle import CALLS, counts, enabled, run, warnings_in
from tests.tiny import TIMES, build, config, latents, prompt, step
from tests.tiny_pipelines import PIPELINES

CPU = torch.device("cpu")


def sequential(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def whole_blocks(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=["Block"])


def to_disk(model: nn.Module) -> None:
    accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device=CPU)


def dispatched(model: nn.Module) -> None:
    places = {name: "disk" if name == "blocks" else "cpu" for name, _ in model.named_children()}
    folder = tempfile.mkdtemp()
    accelerate.dispatch_model(model, device_map=places, main_device="cpu", force_hooks=True, offload_dir=folder)


def grouped(model: nn.Module, level: str = "block_level", size: int = 1, *, on_disk: bool = False) -> None:
    folder = tempfile.mkdtemp() if on_disk else None
    apply_group_offloading(
        model,
        onload_device=CPU,
        offload_device=CPU,
        offload_type=level,
        num_blocks_per_group=size,
        offload_to_disk_path=folder,
    )


MODES: dict[str, Callable[[nn.Module], None]] = {
    "cpu_offload": sequential,
    "cpu_offload-blocks": whole_blocks,
    "disk_offload": to_disk,
    "dispatch_model": dispatched,
    "pairs-of-blocks-disk": functools.partial(grouped, size=2, on_disk=True),
    "leaves-disk": functools.partial(grouped, level="leaf_level", on_disk=True),
}


class Moves:
    """What was brought to the device.

    Attributes:
        onloads: The paths of the modules, in order, since it was last cleared.
        most: The most groups of whole blocks that were on the device at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.onloads: list[str] = []
        self._on: set[str] = set()
        self.most = 0

    def onload(self, modules: Any) -> None:
        paths = [self.names[module] for module in modules]
        self.onloads += paths
        self._on |= {path for path in paths if path.startswith("blocks.")}
        self.most = max(self.most, len(self._on))

    def offload(self, modules: Any) -> None:
        self._on -= {self.names[module] for module in modules}


@contextlib.contextmanager
def watched_moves(model: nn.Module) -> Iterator[Moves]:
    found, patch = Moves(model), pytest.MonkeyPatch()

    def watch(cls: type, name: str, report: Callable[[Any], None], modules_of: Callable[..., Any]) -> None:
        before = getattr(cls, name)

        def call(hook: Any, *args: Any, **kwargs: Any) -> Any:
            report(modules_of(hook, *args))
            return before(hook, *args, **kwargs)

        patch.setattr(cls, name, call)

    def of_group(group: Any) -> Any:
        return group.modules

    def of_hook(hook: Any, module: nn.Module, *_: Any) -> Any:
        return [module] if hook.offload else []

    with patch.context():
        watch(ModuleGroup, "onload_", found.onload, of_group)
        watch(ModuleGroup, "offload_", found.offload, of_group)
        watch(AlignDevicesHook, "pre_forward", found.onload, of_hook)
        watch(AlignDevicesHook, "post_forward", found.offload, of_hook)
        try:
            yield found
        finally:
            patch.undo()


@functools.cache
def uncached_outputs(mode: str) -> list[Tensor]:
    model = build()
    MODES[mode](model)
    return run(model)


@functools.cache
def cached_outputs() -> list[Tensor]:
    """The outputs of the model with the cache and without offloading, of which every other one is computed."""
    return run(enabled())


@pytest.fixture
def logged_warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: warnings_in(caplog)


# Cached.


@pytest.mark.parametrize("mode", MODES)
def test_an_offloaded_model_is_cached_and_a_reused_step_onloads_nothing_of_the_skipped_blocks(mode):
    model, onloads = build(), []
    MODES[mode](model)
    enabled(model)
    counters.clear()
    text, outputs = prompt(), []
    with torch.no_grad(), watched_moves(model) as moves:
        for timestep in TIMES:
            outputs.append(step(model, text, timestep, latents()))
            onloads.append([path for path in moves.onloads if path > "blocks.1"])
            moves.onloads.clear()
    assert counts(model) == CallCounts(computed=4, reused=4)
    assert counters["stats"]["unique_graphs"] == 1
    tiny.assert_bitwise(outputs[::2], uncached_outputs(mode)[::2])
    tiny.assert_bitwise(outputs, cached_outputs())
    computed, reused = onloads[::2], onloads[1::2]
    is_skipped = [path for step in reused for path in step if path.startswith("blocks.")]
    assert not is_skipped and all(any(path.startswith("blocks.3") for path in step) for step in computed)


@pytest.mark.parametrize("mode", ["cpu_offload", "pairs-of-blocks-disk"])
def test_a_model_that_is_offloaded_after_it_ran_with_the_cache_is_cached_again(mode):
    model = enabled()
    run(model, seed=2)
    MODES[mode](model)
    cachedit_fx.reset(model)
    tiny.assert_bitwise(run(model), cached_outputs())
    assert counts(model) == CallCounts(computed=4, reused=4) and cachedit_fx.is_cached(model)


def test_groups_of_blocks_are_on_the_device_one_at_a_time(logged_warnings):
    model = build()
    grouped(model)
    enabled(model)
    with watched_moves(model) as moves:
        run(model)
    assert moves.most == 1 and logged_warnings() == []


def test_pairs_of_blocks_are_onloaded_once_per_computed_step():
    model = build()
    grouped(model, size=2)
    enabled(model, Fn_compute_blocks=2, residual_diff_threshold=0.0)
    with torch.no_grad(), watched_moves(model) as moves:
        step(model, prompt(), 1.0, latents())
    assert [path for path in moves.onloads if path.startswith("blocks.")] == [f"blocks.{i}" for i in range(4)]


def test_layers_that_are_moved_one_by_one_are_moved_by_block_with_one_warning(logged_warnings):
    model = build()
    grouped(model, level="leaf_level")
    enabled(model)
    run(model)
    run(model)
    (warning,) = logged_warnings()
    assert "Transformer has up to " in warning and "the weights that one compiled piece reads (a block)" in warning


def test_the_hooks_are_in_place_after_every_call():
    model = build()
    MODES["cpu_offload"](model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    weights = dict(model.named_parameters())
    enabled(model)
    run(model)
    cachedit_fx.disable_cache(model)
    assert {name: {*vars(module)} for name, module in model.named_modules()} == {n: {*b} for n, b in before.items()}
    assert all(vars(m).get("forward") is before[n].get("forward") for n, m in model.named_modules())
    assert all(found is weights[name] for name, found in model.named_parameters())
    tiny.assert_bitwise(run(model), uncached_outputs("cpu_offload"))


@pytest.mark.parametrize("mode", ["disk_offload", "leaves-disk"])
def test_a_call_that_raises_leaves_the_weights_offloaded_and_the_hooks_in_place(mode):
    model = build()
    MODES[mode](model)
    enabled(model)
    tiny.Watch.ran, tiny.Watch.error, tiny.Watch.error_at = 0, RuntimeError("stopped"), 3
    try:
        with pytest.raises(RuntimeError, match="stopped"), watched_moves(model) as moves:
            run(model)
    finally:
        tiny.Watch.error = None
    assert moves._on == set()
    cachedit_fx.reset(model)
    tiny.assert_bitwise(run(model), cached_outputs())
    cachedit_fx.disable_cache(model)
    tiny.assert_bitwise(run(model), uncached_outputs(mode))


def test_hooks_that_are_removed_again_leave_a_cached_model():
    model = build()
    grouped(model)
    enabled(model)
    run(model, seed=2)
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("group_offloading", recurse=True)
    cachedit_fx.reset(model)
    tiny.assert_bitwise(run(model), cached_outputs())
    assert counts(model) == CallCounts(computed=4, reused=4)
    assert model._compiled_call_impl.fast_dispatch.reason == ""


def test_calls_of_several_threads_take_turns():
    model, outputs = build(), {}
    MODES["leaves-disk"](model)
    enabled(model)

    def call(seed: int) -> None:
        outputs[seed] = run(model, seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, found in outputs.items():
        tiny.assert_bitwise(found[:1], run(build(), seed)[:1])
    assert counts(model) == CallCounts(computed=12, reused=12)
    tiny.assert_bitwise(outputs[1], cached_outputs())


def test_layerwise_casting_and_offloading_to_disk_work_together():
    def prepared() -> nn.Module:
        model = build()
        apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        grouped(model, level="leaf_level", on_disk=True)
        return model

    model = enabled(prepared())
    tiny.assert_bitwise(run(model)[::2], run(prepared())[::2])
    assert counts(model) == CallCounts(computed=4, reused=4)
    assert model.blocks[0].image.weight.dtype == torch.float8_e4m3fn


def test_cast_and_offloaded_weights_reach_code_that_inductor_compiled():
    model, plain = build(), build()
    for one in (model, plain):
        apply_layerwise_casting(one, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        grouped(one, on_disk=True)
    cachedit_fx.enable_cache(model, cachedit_fx.CacheConfig(**tiny.fields()))
    torch.testing.assert_close(run(model)[::2], run(plain)[::2])
    assert counts(model) == CallCounts(computed=4, reused=4)


def test_a_pipeline_with_model_offload_is_captured_whole_and_cached():
    """Without `device="cpu"`, `enable_model_cpu_offload` requires an accelerator."""
    flux, fields = PIPELINES["flux"], config(residual_diff_threshold=1.0, max_warmup_steps=2)
    pipe = flux.build(2)
    expected = flux.run(cachedit_fx.enable_cache(pipe, fields), num_steps=4)
    pipe.enable_model_cpu_offload(device="cpu")
    cachedit_fx.reset(pipe.transformer)
    tiny.assert_bitwise([flux.run(pipe, num_steps=4)], [expected])
    assert counts(pipe) == CallCounts(computed=2, reused=2)


def test_explain_leaves_the_hooks_out_as_enable_cache_does():
    model = build()
    grouped(model, level="leaf_level", on_disk=True)
    inputs = dict(hidden_states=latents(), encoder_hidden_states=prompt(), timestep=torch.ones(2))
    found = cachedit_fx.explain(model, **inputs, cache_config=config())
    assert "captured whole, 1 graph, 1 cached" in str(found)
    tiny.assert_bitwise(run(model), uncached_outputs("leaves-disk"))


# Not cached.


class Doubles(ModelHook):
    """A hook of other code."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output


def test_a_hook_that_is_not_known_is_named_and_all_hooks_run(logged_warnings):
    model = build()
    grouped(model, on_disk=True)
    HookRegistry.check_if_exists_or_initialize(model.blocks[2]).register_hook(Doubles(), "doubles")
    enabled(model)
    tiny.assert_bitwise(run(model), uncached_outputs("pairs-of-blocks-disk"))
    (warning,) = logged_warnings()
    assert "found:    hooks that are not known: doubles" in warning
    assert counts(model).uncached == CALLS
    cachedit_fx.enable_cache(model, config(on_no_match="raise"))
    with pytest.raises(NoMatchError, match="hooks that are not known: doubles"):
        run(model)


class Quantized(nn.Parameter):
    """A weight of a class of its own."""


def test_weights_of_another_class_are_moved_by_the_hooks():
    model = build()
    model.blocks[3].text.weight = Quantized(model.blocks[3].text.weight.data, requires_grad=False)
    grouped(model)
    enabled(model)
    tiny.assert_bitwise(run(model), run(build()))
    ((reason, count),) = counts(model).reasons.items()
    assert "weights of the class Quantized" in reason and count == CALLS


def test_hooks_for_several_devices_run():
    model = build()
    for block, device in zip(model.blocks, ("cpu", "meta", "cpu", "cpu"), strict=True):
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", offload=True, place_submodules=True))
        block._hf_hook.execution_device = device
    assert find_weight_hooks(model).obstacle == "hooks for several devices (cpu, meta)"


def test_a_function_around_a_hooked_forward_is_not_left_out():
    model, calls = build(), []
    grouped(model, on_disk=True)
    inner = model.blocks[2].forward

    @functools.wraps(inner)
    def around(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.blocks[2].forward = around
    enabled(model)
    tiny.assert_bitwise(run(model), uncached_outputs("pairs-of-blocks-disk"))
    assert len(calls) == CALLS and counts(model).uncached == CALLS


def test_a_forward_hook_that_moves_weights_is_named(logged_warnings):
    def brings_weights(layer: nn.Module, _args: Any) -> None:
        layer.to("cpu")

    def sends_weights_away(_layer: nn.Module, _args: Any, _output: Any) -> None:
        torch._dynamo.graph_break()

    for hook in (brings_weights, sends_weights_away):
        model = build()
        if hook is brings_weights:
            model.blocks[2].image.register_forward_pre_hook(hook)
        else:
            model.blocks[2].image.register_forward_hook(hook)
        enabled(model)
        run(model)
        (warning,) = logged_warnings()
        assert hook.__qualname__ in warning
        assert counts(model).uncached == CALLS and all(hook.__name__ in reason for reason in counts(model).reasons)
        torch._dynamo.reset()


def test_a_refusal_by_the_passes_is_the_reason_and_the_hooks_run(logged_warnings):
    model = build()
    MODES["leaves-disk"](model)
    enabled(model, Fn_compute_blocks=4)
    tiny.assert_bitwise(run(model), uncached_outputs("leaves-disk"))
    (warning,) = logged_warnings()
    assert "too-few-blocks" in warning
    assert [reason.partition(":")[0] for reason in counts(model).reasons] == ["too-few-blocks"]


@pytest.mark.parametrize("mode", ["disk_offload", "leaves-disk"])
def test_with_dynamo_turned_off_the_hooks_run(mode, logged_warnings):
    model = build()
    MODES[mode](model)
    enabled(model)
    with torch.compiler.set_stance("force_eager"):
        tiny.assert_bitwise(run(model), uncached_outputs(mode))
    (warning,) = logged_warnings()
    assert "Dynamo ran no graph of it" in warning and "torch.compiler.set_stance" in warning
    cachedit_fx.reset(model)
    tiny.assert_bitwise(run(model), cached_outputs())


def test_past_the_recompile_limit_the_hooks_run():
    class OfThisTest(tiny.Transformer):
        """The graphs of a class raise its limit, also those of an earlier test while they are in memory."""

    model = tiny.frozen(OfThisTest())
    model.load_state_dict(build().state_dict())
    MODES["leaves-disk"](model)
    enabled(model)
    text, noise = prompt(length=4), latents(tokens=3)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        step(model, prompt(), 1.0, latents())
        found = step(model, text, 1.0, noise)
    tiny.assert_bitwise([found], [step(build(), text, 1.0, noise)])
    ((reason, count),) = counts(model).reasons.items()
    assert "cannot be left out of the graph" in reason and "recompile limit" in reason and count == 1


def test_a_model_may_return_a_weight():
    class ReturnsWeight(tiny.Transformer):
        def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
            return (*super().forward(*args, **kwargs), self.proj_out.weight)

    model = tiny.frozen(ReturnsWeight())
    grouped(model)
    enabled(model)
    inputs = dict(hidden_states=latents(), encoder_hidden_states=prompt(), timestep=torch.ones(2))
    with torch.no_grad():
        assert model(**inputs)[1] is model.proj_out.weight
    assert counts(model).uncached == 0


def test_cuda_graphs_are_not_used_for_weights_that_move():
    model = build()
    grouped(model)
    enabled(model)
    with unittest.mock.patch.object(inner_compiler, "named_backend", lambda *_: lambda gm, _inputs: gm):
        cachedit_fx.enable_cache(model, cachedit_fx.CacheConfig(**tiny.fields(inner_backend="cudagraphs")))
        run(model)
    ((reason, count),) = counts(model).reasons.items()
    assert "CUDA graphs, for which weights must not move" in reason and count == CALLS
