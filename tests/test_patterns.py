"""The template that the blocks of a model match, and the reasons why the others do not match."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import cachedit_fx
from cachedit_fx import BlockTemplate, register_pattern
from cachedit_fx.errors import ConfigError
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.locate_blocks import locate_blocks
from cachedit_fx.passes.plan import Plan
from cachedit_fx.patterns import (
    BUILT_IN,
    BlockList,
    Cause,
    Match,
    Mismatch,
    MismatchError,
    match_any,
    match_list,
    templates,
    unregister_pattern,
)
from cachedit_fx.patterns.blocks import ENCODER, HIDDEN
from cachedit_fx.patterns.nodes import SourceLine
from tests import synthetic
from tests.sessions import every_session
from tests.synthetic import (
    PATTERNS,
    DropsText,
    DropsTokens,
    DualStream,
    DualStreamEncoderFirst,
    EmitsForNobody,
    Emitting,
    EmittingEncoderFirst,
    Halving,
    SelfBlock,
    SkipsText,
    TextTransformer,
    Transformer,
    capture,
    make_inputs,
    plan,
)

MINE = "mine"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def no_registered_patterns():
    yield
    for template in templates():
        if template.number is None:
            unregister_pattern(template.name)


def blocks_of(model: nn.Module) -> BlockList:
    """The block list at `blocks`, whether or not it is a chain."""

    def analyse(gm: fx.GraphModule) -> BlockList:
        return next(blocks for blocks in locate_blocks(Program(gm.graph)) if blocks.path == "blocks")

    return capture(model.eval(), make_inputs(model), analyse).found


def matched(model: nn.Module) -> Match:
    """The only match of a model."""
    found = plan(model.eval())
    assert isinstance(found, Plan), [str(mismatch) for mismatch in found]
    (match,) = found.chain
    return match


def mismatches(blocks: BlockList, among: Iterable[BlockTemplate] | None = None) -> tuple[Mismatch, ...]:
    """The mismatches of all templates."""
    with pytest.raises(MismatchError) as caught:
        match_any(blocks, among)
    return caught.value.mismatches


def mismatch_with(blocks: BlockList, template: BlockTemplate) -> Mismatch:
    """The mismatch of one template."""
    (mismatch,) = mismatches(blocks, (template,))
    return mismatch


def source_at(where: SourceLine) -> str:
    """The line that `where` points at, in tests/synthetic.py."""
    assert Path(where.path).samefile(synthetic.__file__)
    return Path(where.path).read_text(encoding="utf-8").splitlines()[where.line - 1]


# Matches.


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0, "dual-stream"),
        (1, "dual-stream, encoder first"),
        (2, "cross-attention"),
        (3, "hidden-only"),
        (4, "hidden-only, emits encoder"),
        (5, "hidden-only, emits encoder first"),
    ],
)
def test_each_model_matches_its_pattern(number, name):
    match = matched(PATTERNS[number]())
    assert (match.template.number, match.template.name) == (number, name)
    assert match.label == f"pattern {number} ({name})"
    assert len(match.blocks.blocks) == synthetic.DEPTH


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param(DropsText, None, id="drops-text"),
        pytest.param(SkipsText, 3, id="skips-text"),
        pytest.param(Halving, None, id="halving"),
        pytest.param(EmitsForNobody, 3, id="emits-for-nobody"),
    ],
)
def test_a_model_that_differs_from_its_pattern_in_one_respect_matches_another_or_none(model, expected):
    blocks = blocks_of(model())
    if expected is None:
        assert len(mismatches(blocks)) == len(BUILT_IN)
    else:
        assert match_any(blocks).template.number == expected


# A block class without source: its methods are compiled from a string.

UNREADABLE = """
class Unreadable(Base):
    def forward(self, {arguments}):
        hidden_states, encoder_hidden_states = super().forward({arguments})
        return {returns}
"""


def without_source(base: type, returns: str) -> type:
    arguments = ", ".join(list(inspect.signature(base.forward).parameters)[1:])
    namespace = {"__name__": __name__, "Base": base}
    exec(UNREADABLE.format(arguments=arguments, returns=returns), namespace)
    return namespace["Unreadable"]


@pytest.mark.parametrize(
    ("number", "base", "returns", "label"),
    [
        (0, synthetic.DualBlock, (HIDDEN, ENCODER), r"pattern 0 or 1 \(dual-stream;"),
        (1, synthetic.DualBlock, (ENCODER, HIDDEN), r"pattern 0 or 1 \(dual-stream;"),
        (4, synthetic.EmitBlock, (HIDDEN, ENCODER), r"pattern 4 or 5 \(hidden-only"),
        (5, synthetic.EmitBlock, (ENCODER, HIDDEN), r"pattern 4 or 5 \(hidden-only"),
    ],
    ids=["0", "1", "4", "5"],
)
def test_without_source_the_label_does_not_state_the_return_order(number, base, returns, label):
    block = without_source(base, ", ".join(returns))
    assert re.match(label + r".*the return order is not known\)", matched(PATTERNS[number](block)).label)


# Mismatches.

EMITTED = r"encoder_hidden_states_\d+ float32\[2, 6, 16\]"
SWAPPED = r"returns \(encoder_hidden_states, hidden_states\); found: `return hidden_states, encoder_hidden_states`"

# Model, pattern, cause, reason, node, content of the user's line, number of blocks that matched. None: no node of the
# graph is the cause.
NEAR_MISMATCHES = [
    pytest.param(DropsText, 0, Cause.STREAM_COUNT, r"expected: 2 streams .* from block 1 to block 2 .* found: 1",
                 r"hidden_states_\d+", "hidden_states + self.mlp(hidden_states)", 1, id="0-text-dropped"),
    pytest.param(DropsText, 1, Cause.STREAM_COUNT, r"expected: 2 streams .* from block 1 to block 2 .* found: 1",
                 r"hidden_states_\d+", "hidden_states + self.mlp(hidden_states)", 1, id="1-text-dropped"),
    pytest.param(DropsTokens, 0, Cause.STREAM_COUNT, r"from block 1 to block 2 .* found: 1 .* hidden_states changes "
                 r"from float32\[2, 6, 16\] to float32\[2, 3, 16\] between block 1 and block 2", r"hidden_states_\d+",
                 "hidden_states = hidden_states[:, ::2]", 1, id="0-tokens-dropped"),
    pytest.param(DropsText, 3, Cause.STREAM_COUNT, r"expected: 1 stream \(hidden_states\) .* found: 2 streams "
                 r"\(hidden_states_2",
                 r"hidden_states_\d+", "hidden_states + self.mlp(hidden_states)", 0, id="3-text-at-first"),
    pytest.param(DualStreamEncoderFirst, 0, Cause.RETURN_ORDER, r"`return encoder_hidden_states, hidden_states` in "
                 r"DualBlockEncoderFirst\.forward", None, None, 4, id="0-encoder-first"),
    pytest.param(DualStream, 1, Cause.RETURN_ORDER, SWAPPED + r" in DualBlock\.forward", None, None, 4,
                 id="1-hidden-first"),
    pytest.param(SkipsText, 2, Cause.NO_CONTEXT, r"a context \(encoder_hidden_states\) that every block reads",
                 None, None, 0, id="2-text-skipped"),
    pytest.param(TextTransformer, 3, Cause.EXTRA_CONTEXT, r"also reads encoder_hidden_states float32\[2, 5, 16\]",
                 r"encoder_hidden_states", "self.context_embedder(encoder_hidden_states)", 0, id="3-text-read"),
    pytest.param(Halving, 3, Cause.STREAM_COUNT, r"to block 3 .* found: no output of block 2 has .* inputs; "
                 r"hidden_states changes from float32\[2, 6, 16\] to float32\[2, 3, 16\] in block 2",
                 r"\w+", "super().forward(hidden_states[:, ::2], temb)", 2, id="3-tokens-halved"),
    pytest.param(Emitting, 3, Cause.EXTRA_EMITTED, rf"only hidden_states; found: the last block also returns {EMITTED}",
                 r"encoder_hidden_states_\d+", "self.to_encoder(hidden_states)", 3, id="3-text-emitted"),
    pytest.param(EmitsForNobody, 4, Cause.NO_EMITTED, r"encoder_hidden_states as an output .* found: only the streams",
                 None, None, 3, id="4-nobody-reads"),
    pytest.param(EmittingEncoderFirst, 4, Cause.RETURN_ORDER, r"found: `return encoder_hidden_states, hidden_states`",
                 None, None, 4, id="4-encoder-first"),
    pytest.param(EmitsForNobody, 5, Cause.NO_EMITTED, r"encoder_hidden_states as an output .* found: only the streams",
                 None, None, 3, id="5-nobody-reads"),
    pytest.param(Emitting, 5, Cause.RETURN_ORDER, SWAPPED + r" in EmitBlock\.forward", None, None, 4,
                 id="5-hidden-first"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "number", "cause", "reason", "node", "line", "progress"), NEAR_MISMATCHES)
def test_a_mismatch_says_why_and_where(model, number, cause, reason, node, line, progress):
    mismatch = mismatch_with(blocks_of(model()), BUILT_IN[number])
    assert mismatch.cause is cause
    assert re.search(reason, mismatch.reason)
    assert (mismatch.template, mismatch.progress, mismatch.total) == (BUILT_IN[number], progress, synthetic.DEPTH)
    if node is None:
        assert mismatch.node is None
        assert not mismatch.where or source_at(mismatch.where).strip().startswith("return ")
    else:
        assert re.fullmatch(node, mismatch.node or "nothing named")
        assert line in source_at(mismatch.where)
        assert str(mismatch.where) in str(mismatch) and f"`{mismatch.node}`" in str(mismatch)


def test_without_a_match_the_mismatches_of_all_templates_start_with_the_nearest():
    found = mismatches(blocks_of(DropsText()))
    assert [mismatch.template.number for mismatch in found] == [0, 1, 2, 3, 4, 5]
    assert [mismatch.progress for mismatch in found] == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("model", "number", "stream", "lost_at"),
    [
        pytest.param(DropsText, 0, ENCODER, 2, id="text-dropped"),
        pytest.param(DropsTokens, 0, HIDDEN, 2, id="tokens-dropped"),
        pytest.param(Halving, 3, HIDDEN, 3, id="tokens-halved"),
        pytest.param(DropsText, 3, None, None, id="one-stream-too-many"),
    ],
)
def test_a_mismatch_of_the_number_of_streams_names_the_lost_stream_and_its_boundary(model, number, stream, lost_at):
    mismatch = mismatch_with(blocks_of(model()), BUILT_IN[number])
    assert (mismatch.stream, mismatch.lost_at) == (stream, lost_at)


def test_a_plan_that_fails_at_matching_gives_every_mismatch():
    found = plan(Halving().eval())
    assert isinstance(found, tuple) and len(found) == len(BUILT_IN)
    assert found[0].cause is Cause.STREAM_COUNT and found[0].progress == 2


# User-defined templates.


class AnonymousBlock(synthetic.DualBlock):
    def forward(self, x: Tensor, c: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.cat([self.norm(x, temb), self.norm_context(c, temb)], dim=1)
        joint = self.attn(joint, joint)
        x = x + joint[:, : x.shape[1]]
        c = c + joint[:, x.shape[1] :]
        return x, c


class Anonymous(TextTransformer):
    """Two streams with uninformative names, both computed from both inputs and used at the end."""

    def __init__(self) -> None:
        super().__init__(AnonymousBlock)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        x = image + text.mean(dim=1, keepdim=True)
        c = text + image.mean(dim=1, keepdim=True)
        for block in self.blocks:
            x, c = block(x, c, temb)
        return self.unembed(x + c.mean(dim=1, keepdim=True), temb)


def test_streams_with_uninformative_names_are_a_mismatch():
    mismatch = mismatch_with(blocks_of(Anonymous()), BUILT_IN[0])
    assert (mismatch.cause, mismatch.stream) == (Cause.STREAM_NAME, HIDDEN)
    assert mismatch.found.startswith("the streams c, x;") and "BlockTemplate(streams=" in mismatch.cure
    assert mismatch.progress == synthetic.DEPTH - 1


class VideoAndAudio(Anonymous):
    """Returns one output for each stream, that of `first` first."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = first

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        temb = self.embed_time(timestep)
        x, c = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        for block in self.blocks:
            x, c = block(x, c, temb)
        outputs = [self.unembed(stream, temb)[0] for stream in ((x, c) if self.first == "x" else (c, x))]
        return outputs[0], outputs[1]


@pytest.mark.parametrize("first", ["x", "c"])
def test_the_first_of_several_outputs_identifies_the_hidden_stream(first):
    assert blocks_of(VideoAndAudio(first)).labels[HIDDEN] == first


@pytest.mark.parametrize("order", [(HIDDEN, ENCODER), (ENCODER, HIDDEN)], ids=["x-c", "c-x"])
@pytest.mark.parametrize("hidden", ["x", "c"])
def test_a_template_names_the_streams_of_a_model(hidden, order):
    names = {HIDDEN: hidden, ENCODER: "c" if hidden == "x" else "x"}
    custom = register_pattern(BlockTemplate(MINE, (HIDDEN, ENCODER), order, streams=names))
    blocks = blocks_of(Anonymous())
    if [names[role] for role in order] == ["x", "c"]:
        assert match_list(blocks, custom).label == "template 'mine'"
        region = plan(Anonymous().eval()).regions[0]
        entered = {pair.role: pair.before.name for pair in region.live_outs}
        assert {role: name.partition("_")[0] for role, name in entered.items()} == names
        assert region.probed_since.name == hidden
    else:
        mismatch = mismatch_with(blocks, custom)
        assert mismatch.cause is Cause.RETURN_ORDER and "`return x, c`" in mismatch.found


def test_a_template_whose_stream_names_the_model_lacks_is_a_mismatch():
    custom = BlockTemplate(MINE, (HIDDEN,), (HIDDEN,), streams={HIDDEN: "latents"})
    mismatch = mismatch_with(blocks_of(Transformer()), custom)
    assert mismatch.cause is Cause.STREAM_NAME
    assert mismatch.expected == "a stream with the name 'latents', which the template declares as hidden_states"
    assert mismatch.found == "streams with the names hidden_states"


def test_a_registered_template_is_tried_before_the_built_in_ones():
    register_pattern(BlockTemplate("older", (HIDDEN,), (HIDDEN,)))
    register_pattern(BlockTemplate(MINE, (HIDDEN,), (HIDDEN,)))
    assert [template.name for template in templates()[:3]] == [MINE, "older", "dual-stream"]
    assert matched(Transformer()).label == "template 'mine'"
    unregister_pattern(MINE)
    torch._dynamo.reset()
    assert matched(Transformer()).label == "template 'older'"


def test_a_template_of_the_same_name_is_replaced():
    register_pattern(BlockTemplate(MINE, (HIDDEN,), (HIDDEN,)))
    newer = register_pattern(BlockTemplate(MINE, (HIDDEN, ENCODER), (HIDDEN,)))
    assert [template for template in templates() if template.number is None] == [newer]


@pytest.mark.parametrize(
    ("restriction", "reason"),
    [
        pytest.param({"block_class": SelfBlock}, None, id="class"),
        pytest.param({"block_class": "SelfBlock"}, None, id="class-name"),
        pytest.param({"module_path": "bl*"}, None, id="path"),
        pytest.param({"block_class": nn.Module}, r"of class Module; found: blocks of class SelfBlock", id="base-class"),
        pytest.param({"block_class": "OtherBlock"}, r"of class OtherBlock; found", id="other-class-name"),
        pytest.param({"module_path": "*single*"}, r"list at '\*single\*'; found: a list at 'blocks'", id="other-path"),
    ],
)
def test_a_restricted_template_fits_only_where_its_restriction_allows(restriction, reason):
    register_pattern(BlockTemplate(MINE, (HIDDEN,), (HIDDEN,), **restriction))
    blocks = blocks_of(Transformer())
    if reason is None:
        assert match_list(blocks, templates()[0]).template is templates()[0]
    else:
        mismatch = mismatch_with(blocks, templates()[0])
        assert mismatch.cause is Cause.RESTRICTED and mismatch.progress == 0
        assert re.search(reason, mismatch.reason)
        assert match_any(blocks).template is BUILT_IN[3]


@pytest.mark.parametrize("cached", ["residual", "value"])
def test_a_reused_step_adds_the_residual_or_uses_the_value_as_the_template_says(cached):
    register_pattern(BlockTemplate(MINE, (HIDDEN,), (HIDDEN,), cached={HIDDEN: cached}))
    model = Transformer().eval()
    first, second = (make_inputs(model, seed, time) for seed, time in ((1, 0.9), (2, 0.8)))
    streams: list[list[Tensor]] = []  # Per call: the eager outputs of the first and the last block.
    for inputs in (first, second):
        temb, stream = model.embed_time(inputs["timestep"]), [model.x_embedder(inputs["hidden_states"])]
        for block in model.blocks:
            stream.append(block(stream[-1], temb))
        streams.append([stream[1], stream[-1]])
    (entered, left), (enters, _) = streams
    expected = left if cached == "value" else enters + (left - entered)
    config = cachedit_fx.CacheConfig(
        Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1.0, inner_backend="eager"
    )
    module = torch.compile(model, backend=cachedit_fx.Backend(config), fullgraph=True)
    module(**first)
    reused = module(**second)[0]
    assert every_session(module)[0].decisions == ["warmup", "threshold-one"]
    torch.testing.assert_close(reused, model.unembed(expected, temb)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"takes": (ENCODER,)}, r"'mine' must take and return 'hidden_states'.*takes=\['encoder_hidden_states'\]"),
        ({"returns": (ENCODER,)}, r"must take and return 'hidden_states'.*returns=\['encoder_hidden_states'\]"),
        ({"streams": {ENCODER: "c"}}, r"streams must name .*, which are \['hidden_states'\], got \['encoder_hidden"),
        ({"cached": {"audio": "value"}}, r"cached must name roles .*, which are \['hidden_states'\], got \['audio'\]"),
        ({"cached": {HIDDEN: "delta"}}, r"cached\['hidden_states'\] must be one of .*residual.*value.* got 'delta'"),
    ],
    ids=["takes", "returns", "streams", "cached-role", "cached-kind"],
)
def test_a_malformed_template_raises_an_error_that_names_the_field(fields, message):
    with pytest.raises(ConfigError, match=message):
        BlockTemplate(**{"name": MINE, "takes": (HIDDEN,), "returns": (HIDDEN,), **fields})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param("dual-stream", r"takes a BlockTemplate, got 'dual-stream'", id="no-template"),
        pytest.param(BUILT_IN[3], r"number must be None in a template to register .*, got 3 in pattern 3", id="number"),
    ],
)
def test_only_templates_without_a_number_can_be_registered(given, message):
    with pytest.raises(ConfigError, match=message):
        register_pattern(given)
    assert templates() == BUILT_IN
