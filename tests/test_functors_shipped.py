"""The patch functors of the package: the same outputs, one graph, and a complete restore."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel, HunyuanImageTransformer2DModel
from torch import Tensor, fx, nn

from cachedit_fx.cache_factory.patch_functors import HiDreamPatchFunctor, HunyuanImagePatchFunctor
from cachedit_fx.functors.functor import PatchFunctor

# Matrix products of other sizes may sum in another order; the spacing of float32 around 1 is 1.2e-7.
ROUNDING = 1e-6
BLOCKS = 1  # Blocks per list.
Inputs = dict[str, Any]


def hidream(experts: int = 4, chosen: int = 2, force_inference_output: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        num_single_layers=BLOCKS,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[8, 4],
        text_emb_dim=8,
        num_routed_experts=experts,
        num_activated_experts=chosen,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=tuple(range(2 * BLOCKS)),
        force_inference_output=force_inference_output,
    ).eval()


def hidream_inputs(
    batch: int = 2, height: int = 8, width: int = 8, text: int = 7, dtype: torch.dtype = torch.float32
) -> Inputs:
    generator = torch.Generator().manual_seed(batch + height + width + text)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator).to(dtype),
        "encoder_hidden_states_t5": torch.randn(batch, text, 8, generator=generator).to(dtype),
        "encoder_hidden_states_llama3": torch.randn(2 * BLOCKS, batch, text, 4, generator=generator).to(dtype),
        "pooled_embeds": torch.randn(batch, 8, generator=generator).to(dtype),
        "timesteps": torch.full((batch,), 500),
        "return_dict": False,
    }


def packed_by_the_caller(transformer: nn.Module, inputs: Inputs) -> Inputs:
    """The same inputs with an image that the caller has packed and with its size as integers."""
    patches, _, sizes, ids = type(transformer).patchify(transformer, inputs["hidden_states"])  # type: ignore[operator]
    packed = {"hidden_states": patches, "img_ids": ids, "img_sizes": [tuple(size) for size in sizes.tolist()]}
    return {**inputs, **packed, "hidden_states_masks": torch.ones(patches.shape[:2])}


def hunyuan_image() -> nn.Module:
    torch.manual_seed(0)
    return HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=BLOCKS,
        num_single_layers=BLOCKS,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=16,
        text_embed_2_dim=12,
        rope_axes_dim=(4, 4),
    ).eval()


def hunyuan_image_inputs(
    batch: int = 2,
    height: int = 4,
    width: int = 4,
    text: int = 7,
    valid: tuple[int, ...] = (),
    valid_2: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """`valid` and `valid_2`: the number of valid tokens of each text per sample, scattered over it; all if empty."""
    generator = torch.Generator().manual_seed(batch + height + width + text)

    def mask(length: int, counts: tuple[int, ...]) -> Tensor:
        ranks = torch.rand(batch, length, generator=generator)
        ranks[:, 0] = 0  # The first token of a row is always valid, because the model divides by their number.
        return (ranks.argsort(1).argsort(1) < torch.tensor(counts or (length,) * batch)[:, None]).float()

    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 500.0).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, 16, generator=generator).to(dtype),
        "encoder_attention_mask": mask(text, valid),
        "encoder_hidden_states_2": torch.randn(batch, 5, 12, generator=generator).to(dtype),
        "encoder_attention_mask_2": mask(5, valid_2),
        "return_dict": False,
    }


def without_second_text(inputs: Inputs) -> Inputs:
    return {name: value for name, value in inputs.items() if not name.endswith("_2")}


@dataclass(frozen=True)
class Case:
    """A model with its functor; `replaced` are the methods that it replaces, on the transformer and its submodules."""

    functor: type[PatchFunctor]
    build: Callable[[], nn.Module]
    inputs: Callable[..., Inputs]
    replaced: set[str]


HIDREAM = {"patchify", "unpatchify", "moe_infer"}
CASES = {
    "hidream": Case(HiDreamPatchFunctor, hidream, hidream_inputs, HIDREAM),
    "hidream-forced": Case(
        HiDreamPatchFunctor,
        functools.partial(hidream, experts=2, chosen=2, force_inference_output=True),
        hidream_inputs,
        HIDREAM,
    ),
    "hunyuan-image": Case(HunyuanImagePatchFunctor, hunyuan_image, hunyuan_image_inputs, {"forward"}),
}
SIZES: tuple[Inputs, ...] = (
    {},
    {"batch": 1},
    {"batch": 3, "text": 9},
    {"height": 8, "width": 12},
)
RAGGED: tuple[Inputs, ...] = (
    {"valid": (7, 1), "valid_2": (2, 5)},
    {"batch": 3, "text": 9, "valid": (1, 9, 4), "valid_2": (0, 1, 5)},
)


def variants(case: Case) -> list[Inputs]:
    ragged = RAGGED if case.inputs is hunyuan_image_inputs else ()
    found = [case.inputs(**sizes) for sizes in (*SIZES, *ragged)]
    return [*found, without_second_text(found[0])] if ragged else found


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@torch.no_grad()
def run(model: Callable[..., Any], inputs: Inputs) -> Tensor:
    output: Tensor = model(**inputs)[0]
    return output


def capture(model: nn.Module, dynamic: bool | None = None) -> tuple[Callable[..., Any], list[fx.GraphModule]]:
    """`model` compiled as one graph, and the graphs that Dynamo captured."""
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []
    return torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True, dynamic=dynamic), graphs


def count(graph: fx.GraphModule, part: str) -> int:
    return sum(part in str(node.target) for node in graph.graph.nodes)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(module.__dict__) for module in model.modules()]


def test_outputs_stay_the_same(case: Case) -> None:
    model = case.build()
    expected = [run(model, inputs) for inputs in variants(case)]
    case.functor().prepare(model)
    for inputs, output in zip(variants(case), expected, strict=True):
        assert_close(run(model, inputs), output)


def test_bfloat16_outputs_stay_the_same(case: Case) -> None:
    model = case.build().to(torch.bfloat16)
    inputs = case.inputs(dtype=torch.bfloat16)
    expected = run(model, inputs)
    case.functor().prepare(model)
    # The spacing of bfloat16 from 1 to 2, the size of the outputs, in case a product is rounded differently.
    torch.testing.assert_close(run(model, inputs), expected, rtol=0, atol=2**-7)


def test_one_graph_is_captured(case: Case) -> None:
    """For every kind of first call: square or not, ragged, with one text."""
    model = case.build()
    inputs = variants(case)
    inputs = [inputs[0], *inputs[3:]]
    expected = [run(model, each) for each in inputs]
    case.functor().prepare(model)
    for each, output in zip(inputs, expected, strict=True):
        compiled, graphs = capture(model)
        assert_close(run(compiled, each), output)
        assert len(graphs) == 1


def test_one_graph_is_captured_in_inference_mode(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    expected = run(model, inputs)
    case.functor().prepare(model)
    compiled, graphs = capture(model)
    with torch.inference_mode():
        assert_close(compiled(**inputs)[0], expected)
    assert len(graphs) == 1


def test_the_original_is_not_captured_as_one_graph(case: Case) -> None:
    """If diffusers' code can be captured as one graph, the functor can be removed."""
    compiled, _ = capture(case.build())
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        run(compiled, case.inputs())


def test_sizes_may_be_dynamic(case: Case) -> None:
    """Batch, image and text are not fixed in the graph. (A size that equals a width of the model would be.)"""
    model = case.build()
    inputs = [
        case.inputs(batch=batch, height=side, width=side, text=text)
        for batch, side, text in ((3, 10, 7), (5, 6, 9), (6, 14, 5))
    ]
    expected = [run(model, i) for i in inputs]
    case.functor().prepare(model)
    compiled, graphs = capture(model, dynamic=True)
    for each, output in zip(inputs, expected, strict=True):
        assert_close(run(compiled, each), output)
    assert len(graphs) == 1


def test_restore_leaves_nothing_behind(case: Case) -> None:
    model, other = case.build(), case.build()
    inputs, own_class = case.inputs(), dict(type(model).__dict__)
    expected = run(model, inputs)
    functor = case.functor()
    compiled, _ = capture(model)  # Before the attributes are recorded, because torch.compile marks the model.
    before, other_before = attributes(model), attributes(other)
    functor.prepare(model)
    added = {name for old, new in zip(before, attributes(model), strict=True) for name in new.keys() - old.keys()}
    assert added == case.replaced
    run(model, inputs)
    run(compiled, inputs)
    assert attributes(other) == other_before
    assert dict(type(model).__dict__) == own_class
    functor.restore(model)
    assert attributes(model) == before
    torch.testing.assert_close(run(model, inputs), expected, rtol=0, atol=0)


def test_preparing_twice_is_the_same_as_once(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    expected, before = run(model, inputs), attributes(model)
    functors = case.functor(), case.functor()
    for functor in functors:
        functor.prepare(model)
        functor.prepare(model)
    compiled, graphs = capture(model)
    assert_close(run(compiled, inputs), expected)
    assert len(graphs) == 1
    for functor in reversed(functors):
        functor.restore(model)
    del model._is_torch_compile
    assert attributes(model) == before


def test_a_deep_copy_runs_its_own_weights(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    case.functor().prepare(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not run(copied, inputs).any()


def test_images_packed_by_the_caller_are_unpacked_as_before() -> None:
    model = hidream()
    inputs = packed_by_the_caller(model, hidream_inputs())
    expected = run(model, inputs)
    HiDreamPatchFunctor().prepare(model)
    compiled, graphs = capture(model)
    assert_close(run(model, inputs), expected)
    assert_close(run(compiled, inputs), expected)
    assert len(graphs) == 1


def test_packed_images_of_two_sizes_are_refused_as_before() -> None:
    model = hidream()
    packed = packed_by_the_caller(model, hidream_inputs())
    HiDreamPatchFunctor().prepare(model)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        run(model, {**packed, "img_sizes": [(4, 4), (2, 4)]})


def test_training_mode_unpatchifies_as_before() -> None:
    model = hidream()
    patches = torch.randn(2, 16, 16)
    expected = model.unpatchify(patches, [(4, 4)], True)
    HiDreamPatchFunctor().prepare(model)
    torch.testing.assert_close(model.unpatchify(patches, [(4, 4)], True), expected, rtol=0, atol=0)


def test_a_forward_that_hooks_replaced_is_still_called() -> None:
    model, inputs = hunyuan_image(), hunyuan_image_inputs(valid=(3, 6))
    expected, calls = run(model, inputs), []
    for module in (model, model.context_embedder):

        def hooked(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            calls.append(forward)
            return forward(*args, **kwargs)

        module.forward = functools.partial(hooked, module.forward)
    before = attributes(model)
    functor = HunyuanImagePatchFunctor()
    functor.prepare(model)
    assert_close(run(model, inputs), expected)
    assert len(calls) == 2
    functor.restore(model)
    assert attributes(model) == before


def test_arguments_may_be_positional() -> None:
    model, inputs = hunyuan_image(), hunyuan_image_inputs(valid=(3, 6))
    values = [value for name, value in inputs.items() if name != "return_dict"]
    positional = (*values[:4], None, *values[4:], None, None, False)
    with torch.no_grad():
        expected = model(*positional)[0]
        HunyuanImagePatchFunctor().prepare(model)
        torch.testing.assert_close(model(*positional)[0], expected, rtol=0, atol=0)


def mixture(model: nn.Module) -> nn.Module:
    """The first mixture of experts in a HiDream transformer; takes [B, N, 32]."""
    return next(module for module in model.modules() if hasattr(module, "moe_infer"))


@torch.no_grad()
def compare_mixture(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """Asserts that the functor does not change the outputs of `mixture(model)`, captured or not. Returns the graph."""
    layer = mixture(model)
    expected = layer(x)
    HiDreamPatchFunctor().prepare(model)
    compiled, graphs = capture(layer)
    # The spacing of bfloat16 from 0.5 to 1, the size of the outputs.
    atol = ROUNDING if expected.dtype == torch.float32 else 2**-8
    for output in (layer(x), compiled(x)):
        torch.testing.assert_close(output, expected, rtol=0, atol=atol)
    return graphs[0]


def doubled_by_hooks(expert: nn.Module) -> None:
    expert.w1.register_forward_pre_hook(lambda _, args: (2 * args[0],))


def doubled_by_another_forward(expert: nn.Module) -> None:
    forward = expert.w1.forward
    expert.w1.forward = lambda x: 2 * forward(x)


def doubled_by_another_class(expert: nn.Module) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    expert.w1.__class__ = Doubled


def with_a_bias(expert: nn.Module) -> None:
    expert.w1.bias = nn.Parameter(torch.ones_like(expert.w1.weight[:, 0]))


# Linear layers of a mixture other than those of its experts: one of the gate and three of the shared expert.
BESIDE = 4


@pytest.mark.parametrize(("experts", "chosen"), [(4, 2), (7, 3), (5, 1)])
def test_bfloat16_tokens_go_only_through_their_chosen_experts(experts: int, chosen: int) -> None:
    model = hidream(experts, chosen).to(torch.bfloat16)
    graph = compare_mixture(model, torch.randn(2, 19, 32, dtype=torch.bfloat16))
    assert (count(graph, "grouped_mm"), count(graph, "linear")) == (3, BESIDE)


def test_other_dtypes_go_through_all_experts() -> None:
    graph = compare_mixture(hidream(4, 2), torch.randn(2, 19, 32))
    assert (count(graph, "grouped_mm"), count(graph, "linear")) == (0, 3 * 4 + BESIDE)


def test_nothing_is_grouped_if_all_experts_are_chosen() -> None:
    graph = compare_mixture(hidream(2, 2).to(torch.bfloat16), torch.randn(2, 19, 32, dtype=torch.bfloat16))
    assert (count(graph, "grouped_mm"), count(graph, "linear")) == (0, 3 * 2 + BESIDE)


@pytest.mark.parametrize(
    "change", [doubled_by_hooks, doubled_by_another_forward, doubled_by_another_class, with_a_bias]
)
def test_experts_with_hooks_other_forwards_or_biases_are_called(change: Callable[[nn.Module], None]) -> None:
    model = hidream(4, 2).to(torch.bfloat16)
    change(mixture(model).experts[2])
    graph = compare_mixture(model, torch.randn(2, 19, 32, dtype=torch.bfloat16))
    assert count(graph, "grouped_mm") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_chooses_the_dtype_of_the_experts(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        graph = compare_mixture(hidream(4, 2).to(dtype), torch.randn(2, 19, 32, dtype=dtype))
    assert count(graph, "grouped_mm") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_no_token_chose_do_not_change_the_output(dtype: torch.dtype) -> None:
    model = hidream(4, 2).to(dtype)
    layer = mixture(model)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([-1.0, 0.1, -1.0, 0.2])[:, None])  # Positive tokens choose 3 and 1.
        for index in (0, 2):
            layer.experts[index].w2.weight.fill_(torch.inf)
    x = torch.rand(2, 19, 32).to(dtype)
    compare_mixture(model, x)
    assert run(lambda x: (layer(x),), {"x": x}).isfinite().all()


def test_the_functors_can_be_imported_without_diffusers() -> None:
    code = "import sys; sys.modules['diffusers'] = None; import cachedit_fx.cache_factory.patch_functors"
    subprocess.run([sys.executable, "-c", code], check=True)
