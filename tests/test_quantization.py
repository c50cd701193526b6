"""Quantized models are cached: torchao, GGUF, quanto and bitsandbytes, also through the configurations of diffusers.

Methods whose package is not installed are skipped. They run on a CPU; torchao's int4 and dynamic float8 need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import cachedit_fx
from cachedit_fx.frontend.region_watch import RegionWatch
from tests import tiny
from tests.tiny_pipelines import PIPELINES

Model = tiny.Transformer
OFF = dict(residual_diff_threshold=0.0)


# Methods: how the linear layers of the blocks are quantized, in place.


def torchao(config: str) -> Callable[[Model], None]:
    def quantize(model: Model) -> None:
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        quantization.quantize_(model.blocks, getattr(quantization, config)())

    return quantize


def gguf(model: Model) -> None:
    """The layers as diffusers makes them of the tensors of a file; one block of 32 values per 34 bytes."""
    package = pytest.importorskip("gguf", reason="gguf is not installed")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = package.GGMLQuantizationType.Q8_0
    for owner, name, linear in linears(model.blocks):
        layer = GGUFLinear(linear.in_features, linear.out_features, compute_dtype=torch.float32)
        packed = torch.from_numpy(package.quants.quantize(linear.weight.numpy(), kind))
        layer.weight, layer.bias = GGUFParameter(packed, quant_type=kind), linear.bias
        setattr(owner, name, layer)


def quanto(weights: str) -> Callable[[Model], None]:
    def quantize(model: Model) -> None:
        package = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        package.quantize(model.blocks, weights=getattr(package, weights))
        package.freeze(model.blocks)

    return quantize


def bitsandbytes(bits: int) -> Callable[[Model], None]:
    def quantize(model: Model) -> None:
        package = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
        for owner, name, linear in linears(model.blocks):
            sizes = (linear.in_features, linear.out_features)
            if bits == 4:
                layer = package.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.float32)
                layer.weight = package.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            else:
                layer = package.Linear8bitLt(*sizes, has_fp16_weights=False)
                layer.weight = package.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            layer.bias = linear.bias
            setattr(owner, name, layer.to("cpu"))  # Quantizes.

    return quantize


def linears(module: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    found = [(owner, name, child) for owner in module.modules() for name, child in owner.named_children()]
    return [(owner, name, child) for owner, name, child in found if isinstance(child, nn.Linear)]


METHODS: dict[str, Callable[[Model], None]] = {
    "torchao int8 weights": torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8 weights": torchao("Float8WeightOnlyConfig"),
    "GGUF Q8_0": gguf,
    "quanto int8": quanto("qint8"),
    "quanto int4": quanto("qint4"),
    "quanto float8": quanto("qfloat8"),
    "bitsandbytes nf4": bitsandbytes(4),
    "bitsandbytes int8": bitsandbytes(8),
}


class Wide(nn.Module):
    """A block of `tiny` with layers of 64 channels inside, which every method can quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)
        self.project = nn.Buffer(torch.randn(tiny.WIDTH, 64) / 8)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        context = encoder_hidden_states.mean(1, keepdim=True)
        update = self.up((hidden_states + context) @ self.project).tanh() @ self.project.T
        text = self.down(encoder_hidden_states @ self.project).tanh() @ self.project.T
        return hidden_states + scale * update, encoder_hidden_states + scale * text


def build(method: str = "") -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny.Transformer(0)
        model.blocks = nn.ModuleList(Wide() for _ in range(tiny.NUM_BLOCKS))
    model = tiny.frozen(model)
    if method:
        METHODS[method](model)
    return tiny.frozen(model)


def generate(module: Any) -> list[Tensor]:
    with torch.no_grad():
        return tiny.generate(module, tiny.prompt(), tiny.latents())


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_model_is_cached(method: str):
    """Computed steps give what the model gives without the cache. Reused steps add the residual that it computed."""
    model = build(method)
    expected = generate(model)
    assert 0 < distance(expected, generate(build())) < 1
    reference = tiny.reference(model, tiny.prompt(), tiny.latents())
    cachedit_fx.enable_cache(model, **tiny.fields(**OFF), inner_backend="eager", on_no_match="raise")
    tiny.assert_bitwise(generate(model), expected)
    cachedit_fx.enable_cache(model, **tiny.fields(), inner_backend="eager", on_no_match="raise")
    tiny.assert_bitwise(generate(model), [record.output for record in reference.records])
    (stats,) = cachedit_fx.summary(model, logging=False)
    assert stats.cached_steps == [record.step for record in reference.records if record.reused]
    assert len(stats.cached_steps) > 2


@pytest.mark.parametrize("method", ["torchao int8 weights", "GGUF Q8_0", "bitsandbytes int8"])
def test_the_bare_backend_caches_a_quantized_model(method: str):
    model = build(method)
    expected = generate(model)
    tiny.assert_bitwise(generate(tiny.compiled(model, **OFF)), expected)
    assert cachedit_fx.is_cached(model)
    (stats,) = cachedit_fx.summary(model, logging=False)
    assert stats.num_steps == len(expected)


# Inductor. It fuses the layers with what surrounds them, so results are rounded in another way than in eager mode.


@pytest.mark.parametrize("enable", [False, True], ids=["torch.compile", "enable_cache"])
def test_int8_weights_differ_by_rounding_under_inductor(enable: bool):
    model = build("torchao int8 weights")
    expected = generate(model)
    torch.testing.assert_close(generate(under_inductor(model, enable)), expected)


def test_int8_dynamic_differs_by_less_than_its_own_error_under_inductor():
    """Activations are rounded to 1/127 of the largest one of their token. A difference of 1e-7 before the rounding can
    move one of them by a whole step. Uncached Inductor differs from eager mode, and from itself when each block is
    compiled alone, by as much."""
    model = build("torchao int8 dynamic")
    expected = generate(model)
    error = distance(expected, generate(build()))
    assert distance(generate(under_inductor(model, enable=True)), expected) < error


def under_inductor(model: Model, enable: bool) -> Any:
    fields = tiny.fields(**OFF)
    if enable:
        return cachedit_fx.enable_cache(model, **fields, on_no_match="raise")
    return torch.compile(model, backend="cachedit", options=fields)


# Through diffusers.


@pytest.mark.parametrize(
    ("name", "config"),
    [("wan", "Int8DynamicActivationInt8WeightConfig"), ("flux", "GGUF")],
)
def test_a_pipeline_with_a_quantization_config_gives_what_it_gives_without_the_cache(
    name: str, config: str, tmp_path: Path
):
    pipe = PIPELINES[name].build(2)
    full = PIPELINES[name].run(pipe, num_steps=3)
    pipe.transformer = loaded(pipe.transformer, config, tmp_path)
    expected = PIPELINES[name].run(pipe, num_steps=3)
    assert not torch.equal(expected, full)
    fields = dict(Fn_compute_blocks=1, forecaster=None, inner_backend="eager", on_no_match="raise")
    cachedit_fx.enable_cache(pipe, **fields, **OFF)
    torch.testing.assert_close(PIPELINES[name].run(pipe, num_steps=3), expected, rtol=0, atol=0)
    cachedit_fx.enable_cache(pipe, **fields, residual_diff_threshold=1e6, max_warmup_steps=1)
    PIPELINES[name].run(pipe, num_steps=3)
    assert all(stats.cached_steps == [1, 2] for stats in cachedit_fx.summary(pipe, logging=False))


def loaded(transformer: Any, config: str, folder: Path) -> Any:
    """The transformer, saved and loaded again with a quantization config of diffusers."""
    import diffusers

    transformer.save_pretrained(folder)
    if config == "GGUF":
        write_gguf(transformer, folder / "model.gguf")
        quantization: Any = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
        found = type(transformer).from_single_file(
            str(folder / "model.gguf"), config=str(folder), quantization_config=quantization
        )
    else:
        package = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        quantization = diffusers.TorchAoConfig(getattr(package, config)())
        found = type(transformer).from_pretrained(folder, quantization_config=quantization, torch_dtype=torch.float32)
    assert any(type(weight) not in (Tensor, nn.Parameter) for weight in found.parameters())
    return tiny.frozen(found)


def write_gguf(module: nn.Module, path: Path) -> None:
    package = pytest.importorskip("gguf", reason="gguf is not installed")
    writer, kind = package.GGUFWriter(str(path), "flux"), package.GGMLQuantizationType.Q8_0
    for name, weight in module.state_dict().items():
        if "blocks" in name and weight.dim() == 2 and weight.shape[1] % 32 == 0:
            writer.add_tensor(name, package.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Weights that change.


def overwrite(model: Model, other: Model) -> None:
    for name, weight in model.named_parameters():
        weight.copy_(other.get_parameter(name))


CHANGES: dict[str, Callable[[Model, Model], object]] = {
    "a weight": lambda model, other: setattr(model.blocks[2].up, "weight", other.blocks[2].up.weight),
    "a layer": lambda model, other: setattr(model.blocks[2], "up", other.blocks[2].up),
    "what stands in the weights": overwrite,
}


@pytest.mark.parametrize("method", ["torchao int8 weights", "GGUF Q8_0", "quanto int8", "bitsandbytes int8"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_quantized_weight_is_detected_by_identity(method: str, change: str, monkeypatch: pytest.MonkeyPatch):
    model, other = build(method), build(method)
    generate(model)  # bitsandbytes moves the weights of its layers at the first call.
    watch = RegionWatch(model, ["blocks.1", "blocks.2"])
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__eq__", None)  # No values are compared.
        assert not watch.has_changed()
        CHANGES[change](model, other)
        assert watch.has_changed()


# Weights that every forward sets, as bitsandbytes' `Linear8bitLt` does. Without that package:


class Rebinding(nn.Linear):
    def __init__(self) -> None:
        super().__init__(tiny.WIDTH, tiny.WIDTH)
        self.state = SimpleNamespace(weight=self.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        result = nn.functional.linear(x, self.state.weight, self.bias)
        self.weight.data = self.state.weight
        return result


class Overwriting(Rebinding):
    def forward(self, x: Tensor) -> Tensor:
        result = nn.functional.linear(x, self.state.weight, self.bias)
        self.weight.data = result
        return result


def rebinding(cls: type[Rebinding]) -> Model:
    model = tiny.build()
    for block in model.blocks:
        block.image = tiny.frozen(cls())
    return model


def test_weights_that_every_forward_sets_to_the_same_are_no_reason_not_to_cache():
    model = rebinding(Rebinding)
    reference = tiny.reference(model, tiny.prompt(), tiny.latents())
    compiled = tiny.compiled(model, on_no_match="raise")
    tiny.assert_bitwise(generate(compiled), [record.output for record in reference.records])
    (stats,) = cachedit_fx.summary(model, logging=False)
    assert stats.cached_steps == [record.step for record in reference.records if record.reused] != []


def test_weights_that_a_forward_sets_to_an_activation_are_not_cached():
    with pytest.raises(BackendCompilerFailed, match=r"streams that are not written in place\n.*`set_"):
        generate(tiny.compiled(rebinding(Overwriting), on_no_match="raise"))
