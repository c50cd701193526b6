"""`check_pattern` accepts correct templates, rejects wrong ones, and leaves no trace."""

from __future__ import annotations

import inspect
import re
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
import cachedit_fx.testing.pattern_check
from cachedit_fx import BlockTemplate
from cachedit_fx.errors import ConfigError
from cachedit_fx.patterns import BUILT_IN, templates
from cachedit_fx.patterns.blocks import ENCODER, HIDDEN
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.runtime.instances import instances_in
from cachedit_fx.testing.pattern_check import UncheckableError, check_pattern
from examples.custom_pattern import Block, TwoScaleTransformer
from tests import synthetic
from tests.messages import flat
from tests.researchers.cases import CASES
from tests.researchers.port_reference import build
from tests.synthetic import PATTERNS, SelfBlock, TextTransformer, Transformer, make_inputs

BOTH = (HIDDEN, ENCODER)
SLOW = pytest.mark.slow
TWO_SCALES = dict(
    latents=torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0)), timestep=torch.tensor([0.9])
)


def two_scales(takes=BOTH, returns=BOTH, hidden="fine", **fields) -> BlockTemplate:
    names = {HIDDEN: hidden, ENCODER: "coarse" if hidden == "fine" else "fine"}
    return BlockTemplate("two-scale", takes, returns, streams=names, **fields)


def alone(**fields) -> BlockTemplate:
    return BlockTemplate("mine", (HIDDEN,), (HIDDEN,), **fields)


class NamelessBlock(Block):
    """Its arguments have other names than its results."""

    def forward(self, a: Tensor, b: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(a, b, emb)


def make(block: type[nn.Module] = Block) -> TwoScaleTransformer:
    """The model of the example, with few blocks."""
    model = TwoScaleTransformer()
    model.layers = nn.ModuleList(block() for _ in range(3))
    return model


def researcher(case: str) -> tuple[nn.Module, list[dict[str, object]]]:
    """A model of tests/researchers, and three calls of it."""
    model, calls = build(CASES[case].model), []
    signature = inspect.signature(model.forward)

    def note(*args: object, **kwargs: object) -> MagicMock:
        calls.append(signature.bind(*args, **kwargs).arguments)
        return MagicMock()

    for call in CASES[case].calls():
        call(note)
    return model, calls


# Correct templates.


@pytest.mark.parametrize(
    ("number", "fn", "bn"),
    [
        (0, 1, 0),
        pytest.param(1, 2, 1, marks=SLOW),
        pytest.param(2, 1, 0, marks=SLOW),
        (3, 2, 1),
        pytest.param(4, 1, 0, marks=SLOW),
        (5, 2, 1),
    ],
)
def test_a_built_in_pattern_is_correct_for_its_model(number, fn, bn):
    model = PATTERNS[number]().eval()
    check = check_pattern(BUILT_IN[number], model, make_inputs(model), Fn_compute_blocks=fn, Bn_compute_blocks=bn)
    assert check.decisions == ("warmup", "diff-below", "max-cached")
    assert (check.difference, check.num_blocks) == (0.0, 4)
    assert check.region == f"blocks[{fn}:{4 - bn}]"
    assert check.distance > 0 and check.diff > 0
    assert "equal to the reference, bitwise" in str(check)


@pytest.mark.parametrize(("kinds", "bn"), [({HIDDEN: "value"}, 0), pytest.param({ENCODER: "value"}, 1, marks=SLOW)])
def test_streams_may_be_cached_as_values(kinds, bn):
    template = two_scales(cached=kinds)
    assert check_pattern(template, make(), TWO_SCALES, Bn_compute_blocks=bn).difference == 0


@pytest.mark.parametrize("hidden", ["fine", pytest.param("coarse", marks=SLOW)])
def test_a_template_that_names_its_streams_is_correct(hidden):
    order = BOTH if hidden == "fine" else BOTH[::-1]
    check = check_pattern(two_scales(returns=order, hidden=hidden), make(), TWO_SCALES)
    assert (check.difference, check.region) == (0.0, "layers[1:3]")
    assert re.fullmatch(
        r"template 'two-scale' is correct: 3 blocks, of which a reused step skips layers\[1:3\]\n"
        r"  computed \(step 0, 2\): equal to the model without the cache, bitwise\n"
        r"  reused \(step 1\): equal to the reference, bitwise; [\d.]+% away from a computed step\n"
        r"  probe: hidden_states, whose residual diff at step 1 was 0\.\d+",
        str(check),
    )


def test_arguments_with_other_names_are_identified_by_position():
    assert check_pattern(two_scales(), make(NamelessBlock), TWO_SCALES).difference == 0


@SLOW
def test_there_is_no_probe_without_fn_blocks():
    model = Transformer()
    check = check_pattern(BUILT_IN[3], model, make_inputs(model), Fn_compute_blocks=0)
    assert check.decisions == ("warmup", "mask-static", "mask") and check.diff is None


@SLOW
def test_inputs_may_be_a_list_of_calls():
    model = TextTransformer()
    calls = [make_inputs(model, seed, 1 - seed / 10) for seed in range(5)]
    for call in calls:
        call["encoder_hidden_states"] = calls[0]["encoder_hidden_states"]
    check = check_pattern(BUILT_IN[2], model, calls)
    assert check.decisions == ("warmup", "diff-below", "max-cached", "max-cached", "max-cached")


@SLOW
def test_bfloat16_and_integer_timesteps_are_supported():
    model = Transformer().bfloat16()
    model.embed_time = lambda t: model.time_embedder(t[:, None].bfloat16().expand(-1, 16) / 1000)
    inputs = {**make_inputs(model), "timestep": torch.tensor([900, 900])}
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    assert check_pattern(BUILT_IN[3], model, inputs).difference == 0


class TwoLists(synthetic.DualStream):
    def __init__(self) -> None:
        super().__init__(depth=2)
        self.more_blocks = nn.ModuleList(synthetic.DualBlockEncoderFirst() for _ in range(2))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        for block in self.blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, temb)
        for block in self.more_blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, temb)
        return self.unembed(hidden_states, temb)


@SLOW
def test_the_list_that_fits_is_checked_if_there_are_two():
    model = TwoLists()
    assert check_pattern(BUILT_IN[0], model, make_inputs(model)).region == "blocks[1:2]"


@SLOW
def test_a_region_may_span_two_lists():
    from tests.models import FLUX  # Imported here, because it takes long.

    model, latents = FLUX.build(), FLUX.latents(1)
    inputs = dict(hidden_states=latents, timestep=torch.full((2,), 0.9), return_dict=False, **FLUX.prompt(1).cond)
    check = check_pattern(BUILT_IN[1], model, inputs, Bn_compute_blocks=1)
    assert check.region.startswith("transformer_blocks[1:") and "+single_transformer_blocks[0:" in check.region


@pytest.mark.parametrize("bn", [pytest.param(0, marks=SLOW), 1])
def test_work_between_two_blocks_belongs_to_the_first_of_them(bn):
    model, calls = researcher("dit-controls")
    assert check_pattern(BUILT_IN[3], model, calls, Bn_compute_blocks=bn).difference == 0


# Wrong templates.

MISSES = [
    pytest.param(synthetic.DualStream, BUILT_IN[1], "return-order: expected: .*encoder_hidden_states, hidden_states.*"
                 r"found: `return hidden_states, encoder_hidden_states`.*\nWhat to do: give returns the order of the",
                 id="order"),
    pytest.param(synthetic.DualStream, BUILT_IN[3], r"stream-count: expected: 1 stream .*found: 2 streams .*\n"
                 r"What to do: .*\nblocks fits pattern 0 \(dual-stream\)\.\n", id="count"),
    pytest.param(Transformer, BUILT_IN[0], r"stream-count: expected: 2 streams .*found: 1 stream .*\n.*\n"
                 "blocks fits pattern 3", id="count-of-one", marks=SLOW),
    pytest.param(Transformer, BUILT_IN[2], r"no-context: .*\nWhat to do: remove the context from takes", id="context"),
    pytest.param(Transformer, BUILT_IN[4], r"no-emitted: .*\nWhat to do: remove from returns what is not used",
                 id="emit", marks=SLOW),
    pytest.param(Transformer, alone(streams={HIDDEN: "x"}), "stream-name: .*with the name 'x', .*; found: streams with "
                 "the names hidden_states", id="name", marks=SLOW),
    pytest.param(Transformer, alone(block_class="Other"), "restricted: .*class Other; found: blocks of class SelfBlock",
                 id="class", marks=SLOW),
    pytest.param(synthetic.Halving, BUILT_IN[3], r"stream-count: .* block 2 to block 3 .* found: no output of block 2",
                 id="none"),
]  # fmt: skip


@pytest.mark.parametrize(("make_model", "template", "text"), MISSES)
def test_a_template_that_does_not_fit_raises_an_error_with_the_cause(make_model, template, text):
    model = make_model()
    with pytest.raises(AssertionError) as error:
        check_pattern(template, model, make_inputs(model))
    assert re.search(text, flat(str(error.value)))
    assert str(error.value).startswith(f"cachedit_fx: {template} does not fit {type(model).__name__}")
    assert "cachedit_fx.explain(model, **inputs)" in str(error.value)


def test_a_model_without_blocks_raises_an_error():
    class Flat(Transformer):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return self.proj_out(self.x_embedder(hidden_states) + self.embed_time(timestep)[:, None])

    with pytest.raises(AssertionError, match=r"no-chain:\n  expected: a list of blocks .*\n.*\nWhat to do: call the"):
        check_pattern(BUILT_IN[3], Flat(), make_inputs(Flat()))


@SLOW
def test_too_few_blocks_raise_an_error():
    with pytest.raises(AssertionError, match=r"too-few-blocks:\n.*\n  found:    4 \+ 0"):
        check_pattern(BUILT_IN[3], Transformer(), make_inputs(Transformer()), Fn_compute_blocks=4)


@pytest.mark.parametrize(
    "template", [two_scales(returns=BOTH[::-1]), two_scales(hidden="coarse")], ids=["returns", "streams"]
)
def test_a_swapped_order_that_the_source_does_not_show_is_detected_at_the_next_block(template):
    first, second = template.returns
    text = (
        rf"takes, returns and streams contradict each other.*\n  expected: value 1 of what layers\.0 returns is "
        rf"{second}, by returns\n  found: +layers\.1 takes it as `coarse`, which is {first}\n"
        r".*list the roles in returns in the order"
    )
    with pytest.raises(AssertionError, match=text):
        check_pattern(template, make(), TWO_SCALES)


@SLOW
def test_a_swapped_order_of_arguments_with_other_names_is_detected():
    with pytest.raises(AssertionError, match=r"layers\.1 takes it as `b`, which is hidden_states"):
        check_pattern(two_scales(takes=BOTH[::-1]), make(NamelessBlock), TWO_SCALES)


def test_a_probe_of_another_stream_is_detected():
    template = two_scales(takes=BOTH[::-1], returns=BOTH[::-1])  # Consistent, but the code uses `a` for "fine".
    with pytest.raises(
        AssertionError, match=r"the probe of the graph is another stream .*\n  expected: a change of 0\.\d+ .*\n.*found"
    ):
        check_pattern(template, make(NamelessBlock), TWO_SCALES)


def test_a_block_that_returns_fewer_values_than_declared_raises_an_error():
    class Block(SelfBlock):
        def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
            self.side_output = self.norm(hidden_states, temb)
            return super().forward(hidden_states, temb)

    class Emitting(Transformer):
        """Uses a tensor that the last block stores as an attribute; the block returns only its stream."""

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
            temb = self.embed_time(timestep)
            hidden_states = self.x_embedder(hidden_states)
            for block in self.blocks:
                hidden_states = block(hidden_states, temb)
            return self.unembed(hidden_states + self.blocks[-1].side_output, temb)

    model = Emitting(Block)
    with pytest.raises(
        AssertionError, match=r"expected: 2 values \(hidden_states, encoder.*\n  found: +1 from blocks\.0"
    ):
        check_pattern(BUILT_IN[4], model, make_inputs(model))


def test_a_graph_that_caches_something_else_than_the_template_declares_is_detected(monkeypatch):
    other = two_scales(cached={ENCODER: "value"})
    monkeypatch.setattr(
        cachedit_fx.testing.pattern_check, "Declaration", lambda patterns: Declaration(patterns=(other,))
    )
    text = (
        r"step 1, which is reused, .*\n.*layers\.1 to layers\.2 skipped.*\n  found: +tensor 0 of the output differs by"
    )
    with pytest.raises(AssertionError, match=text):
        check_pattern(two_scales(), make(), TWO_SCALES)
    assert check_pattern(two_scales(), make(), TWO_SCALES, tolerance=1.0).difference > 0


# Models that cannot be checked.


class Noisy(Transformer):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return super().forward(hidden_states + torch.randn_like(hidden_states), timestep)


class Direct(Transformer):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        for block in self.blocks:
            hidden_states = block.forward(hidden_states, temb)
        return self.unembed(hidden_states, temb)


def closed() -> Transformer:
    """A model before training, whose output is zero."""
    model = Transformer()
    nn.init.zeros_(model.proj_out.weight)
    return model


@pytest.mark.parametrize(
    ("make_model", "text"),
    [
        pytest.param(Noisy, r"not deterministic", id="noise", marks=SLOW),
        pytest.param(
            closed, r"a wrong template would not show; are the gates or the output projection zero", id="zero"
        ),
        pytest.param(Direct, r"0 of its 4 blocks were called as modules", id="no-call"),
    ],
)
def test_a_model_that_cannot_be_checked_is_refused(make_model, text):
    model = make_model()
    with pytest.raises(UncheckableError, match=r"check_pattern cannot check this model: .*" + text):
        check_pattern(BUILT_IN[3], model, make_inputs(model))


@pytest.mark.parametrize(
    ("case", "number", "text"),
    [
        (
            "dit-norms-beside-blocks",
            3,
            r"between blocks\.1 and blocks\.2, the loop does more .* it holds hidden_states",
        ),
        pytest.param("dit-loss-summed", 3, r"the loop derives more than the streams from", marks=SLOW),
        (
            "mmdit-dict",
            0,
            r"double_blocks\.0 takes \(streams, vec, pe\), and none of these is a tensor for hidden_states",
        ),
        pytest.param(
            "mmdit-kwargs-handed-on",
            0,
            r"double_blocks\.0 returns a dict; only blocks that return a tensor",
            marks=SLOW,
        ),
        pytest.param(
            "video-two-lists-in-turns", 3, r"spatial_blocks and temporal_blocks are called alternately", marks=SLOW
        ),
        pytest.param("uvit", 3, r"passes more to out_blocks\.0 than the streams", marks=SLOW),
    ],
)
def test_models_of_researchers_that_cannot_be_checked_are_refused(case, number, text):
    model, calls = researcher(case)
    with pytest.raises(UncheckableError, match=r"check_pattern cannot check this model: .*" + text):
        check_pattern(BUILT_IN[number], model, calls)


def test_steps_of_two_generations_are_refused():
    model = TextTransformer()
    calls = [make_inputs(model, seed, 1 - seed / 10) for seed in range(2)]  # Every step has another prompt.
    with pytest.raises(UncheckableError, match=r"2 calls were taken for 2 generations; pass the same prompt"):
        check_pattern(BUILT_IN[2], model, calls)


def test_calls_of_two_sizes_are_refused():
    model = Transformer()
    with pytest.raises(UncheckableError, match="the calls differ in size"):
        check_pattern(BUILT_IN[3], model, [make_inputs(model), make_inputs(model, 1, 0.8, tokens=4)])


@pytest.mark.parametrize("given", [[], [1], ["latents"]])
def test_inputs_must_be_calls(given):
    with pytest.raises(ConfigError, match="inputs must be the keyword arguments of a call"):
        check_pattern(BUILT_IN[3], Transformer(), given)


def test_the_template_must_be_a_block_template():
    with pytest.raises(ConfigError, match="template must be a BlockTemplate, got 3"):
        check_pattern(3, Transformer(), {})


# No trace.


def state_of(model: nn.Module) -> dict[str, object]:
    return {f"{path}.{name}": value for path, m in model.named_modules() for name, value in vars(m).items()
            if not isinstance(value, dict)} | {name: id(p) for name, p in model.named_parameters()}  # fmt: skip


@pytest.mark.parametrize("is_right", [True, False])
def test_check_pattern_leaves_the_model_unchanged(is_right):
    model = make().train()
    before, known = state_of(model), templates()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    template = two_scales(returns=BOTH if is_right else BOTH[::-1])
    with torch.enable_grad():
        try:
            check_pattern(template, model, TWO_SCALES)
        except AssertionError:
            assert not is_right
    assert state_of(model) == before and templates() == known
    assert all(map(torch.equal, weights.values(), model.state_dict().values()))
    assert not instances_in(model) and all(p.requires_grad and p.grad is None for p in model.parameters())


@SLOW
def test_check_pattern_leaves_the_graphs_and_sessions_of_the_model_unchanged():
    model, inputs = Transformer().eval(), make_inputs(Transformer())
    config = cachedit_fx.CacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, inner_backend="eager")
    cachedit_fx.enable_cache(model, config)
    with torch.no_grad():
        model(**inputs)
    before, compiled = cachedit_fx.summary(model), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    check_pattern(BUILT_IN[3], model, inputs)
    assert cachedit_fx.summary(model) == before
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert made > compiled
    with torch.no_grad():
        model(**inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made  # No graph of the user was compiled again.


@SLOW
def test_a_compiled_model_is_checked_as_the_original_module():
    model = torch.compile(Transformer().eval(), backend="eager")
    assert check_pattern(BUILT_IN[3], model, make_inputs(Transformer())).difference == 0
