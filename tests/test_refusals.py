"""Graphs and calls that cannot be cached, and the reasons that are given for them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention import SDPBackend, sdpa_kernel

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.passes.analysis.writes import is_in_place
from cachedit_fx.passes.plan import Plan
from cachedit_fx.patterns import Cause
from cachedit_fx.patterns.blocks import HIDDEN
from cachedit_fx.patterns.nodes import value_of
from tests.messages import flat
from tests.synthetic import (
    BATCH,
    IMAGE,
    TEXT,
    WIDTH,
    DualBlock,
    SelfBlock,
    TextTransformer,
    Transformer,
    make_inputs,
    plan,
)
from tests.variants import Variant, planned, refused


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Writes(Variant):
    """Calls `write(stream, buffer created before the blocks, time embedding)` after the second block."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.write = write

    def loop(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        buffer = torch.zeros_like(hidden_states)
        for i, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, temb)
            if i == 1:
                self.write(hidden_states, buffer, temb)
        return hidden_states + buffer.mean()


@pytest.mark.parametrize(
    ("write", "found"),
    [
        pytest.param(lambda h, b, t: b.__setitem__(0, h[1]), r"setitem\(", id="item"),
        pytest.param(lambda h, b, t: operator.iadd(b[:1], h[:1]), r"iadd\(", id="augmented-view"),
        pytest.param(lambda h, b, t: b.view(-1).add_(h.flatten()), "add_", id="view"),
        pytest.param(lambda h, b, t: torch.add(h, 1, out=b), r"add\(.*out=", id="out"),
        pytest.param(lambda h, b, t: torch.ops.aten.add_.Tensor(b, h), r"add_", id="overload"),
        pytest.param(lambda h, b, t: F.silu(t, inplace=True), "silu", id="by-keyword"),
        pytest.param(lambda h, b, t: F.silu(t, True), "silu", id="by-position"),
    ],
)
def test_a_region_that_writes_into_an_earlier_tensor_is_refused(write, found):
    mismatch = refused(Writes(write))
    assert mismatch.cause is Cause.IN_PLACE
    assert "in place" in mismatch.expected and re.search(found, mismatch.found)
    assert mismatch.where == (__file__, write.__code__.co_firstlineno)


def test_a_region_may_write_into_its_own_tensors():
    (region,) = planned(Writes(lambda h, b, t: torch.zeros_like(h).clamp_(max=0))).regions
    assert "clamp_" in [node.target for node in region.nodes]


def _scatter(row: Tensor) -> Tensor:
    """Writes into a tensor of its own. Under `torch.vmap`, nothing shows which storage that tensor has."""
    mask = row.new_zeros(row.shape)
    mask[torch.arange(2)] = row.new_ones(())
    return mask[:, :1].contiguous()


def test_a_region_may_write_into_its_own_tensors_under_vmap():
    (region,) = planned(Writes(lambda h, b, t: torch.vmap(_scatter)(h))).regions
    assert operator.setitem in [node.target for node in region.nodes]


def test_an_fn_block_may_write_into_its_own_tensors_under_vmap():
    model = Transformer()
    model.blocks[0] = FirstWrites(lambda h, added: h + added * torch.vmap(_scatter)(added))
    (region,) = planned(model).regions
    assert operator.setitem in [node.target for node in region.nodes[0].graph.nodes]


def test_a_write_into_an_earlier_tensor_under_vmap_is_refused():
    assert refused(Writes(lambda h, b, t: torch.vmap(lambda row: row.mul_(2))(b))).cause is Cause.IN_PLACE


class FirstWrites(SelfBlock):
    def __init__(self, write: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.write = write

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        hidden_states = self.write(hidden_states, self.attn(self.norm(hidden_states, temb), hidden_states))
        hidden_states = hidden_states + self.mlp(hidden_states)
        return hidden_states


def test_an_fn_block_that_overwrites_its_input_stream_is_refused():
    model = Transformer()
    # The stream before the block, from which the residual is computed, is lost.
    model.blocks[0] = FirstWrites(lambda h, added: h.addcmul_(added, added))
    assert refused(model).cause is Cause.IN_PLACE


class ReadsOldView(Variant):
    """A view of the stream is created before a write into the stream, and read at the end."""

    def loop(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        return hidden_states + rows.mean()


class OwnKernels(SelfBlock):
    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(hidden_states, temb)


def test_a_state_that_is_set_at_a_cut_is_refused():
    mismatch = refused(Transformer(OwnKernels))  # The state would not be restored if the region were skipped.
    assert mismatch.cause is Cause.STATE
    assert "begin and end in the same state" in mismatch.expected and "_sdpa_kernel" in mismatch.found


class OneContext(Variant):
    """A value that depends on no stream is computed in the context of the blocks, and used after it."""

    def loop(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for i, block in enumerate(self.blocks):
                hidden_states = block(hidden_states, temb)
                if i == 1:
                    scale = temb @ temb.mT
        return hidden_states + scale.mean()


def test_an_operation_that_a_context_affects_is_not_moved_out_of_it():
    mismatch = refused(OneContext())
    assert mismatch.cause is Cause.STATE
    assert "outside of contexts such as autocast" in mismatch.expected


ADDITIONS = [
    pytest.param(lambda h, added: operator.iadd(h, added), id="augmented"),
    pytest.param(lambda h, added: h.add_(added), id="add_"),
    pytest.param(lambda h, added: h.add_(added).mul_(0.5).sub_(0.1), id="in-a-row"),
]


@pytest.mark.parametrize("write", ADDITIONS)
def test_in_place_additions_that_nothing_else_observes_are_replaced(write):
    model = Transformer()
    model.blocks[0], model.blocks[2] = FirstWrites(write), FirstWrites(write)
    (region,) = planned(model).regions
    assert not any(map(is_in_place, region.nodes[0].graph.nodes))


@pytest.mark.parametrize("write", ADDITIONS)
def test_an_in_place_addition_that_an_earlier_view_observes_is_refused(write):
    model = ReadsOldView()
    model.blocks[0] = FirstWrites(write)
    assert refused(model).cause is Cause.IN_PLACE


@pytest.mark.parametrize("write", ADDITIONS)
def test_an_in_place_addition_to_an_input_is_preserved(write):
    class WritesIntoInput(Transformer):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
            return super().forward(write(hidden_states, timestep[:, None, None]), timestep)

    found = planned(WritesIntoInput())
    assert any(map(is_in_place, found.program.nodes))


class Fills(Variant):
    def loop(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        joint = torch.zeros_like(hidden_states)
        joint[:] = hidden_states
        for block in self.blocks:
            joint = block(joint, temb)
        return joint


def test_a_stream_may_be_filled_in_place_before_the_first_block():
    assert planned(Fills()).regions[0].probed_since.name == "joint"


class Reads(Variant):
    def loop(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, temb)
            if i == 1:
                size = hidden_states.abs().mean().item()
        return hidden_states / size


def test_a_number_that_is_read_from_the_stream_cannot_leave_the_region():
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        mismatch = refused(Reads())
    assert mismatch.cause is Cause.DYNAMIC
    assert "only tensors leave" in mismatch.expected and re.match(r"\w+, which is not a tensor", mismatch.found)


class Joined(TextTransformer):
    """Two streams in the first list, one joined stream in the second; only the image is used after the blocks."""

    block_class = DualBlock

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.joint_blocks = nn.ModuleList(SelfBlock() for _ in range(3))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        for block in self.blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, temb)
        hidden_states = self.join(encoder_hidden_states, hidden_states)
        for block in self.joint_blocks:
            hidden_states = block(hidden_states, temb)
        return self.unembed(hidden_states[:, TEXT:], temb)

    def join(self, *streams: Tensor) -> Tensor:
        return torch.cat(streams, dim=1)


def test_the_cut_is_after_the_slice_that_separates_joined_streams():
    found = planned(Joined())
    (region,) = found.regions
    assert region.name == "blocks[1:2]+joint_blocks"
    (pair,) = region.live_outs
    assert (pair.role, pair.after.target, pair.after is region.nodes[-1]) == (HIDDEN, operator.getitem, True)
    assert value_of(pair.before).shape == value_of(pair.after).shape == (BATCH, IMAGE, WIDTH)


def test_a_cut_between_blocks_of_joined_streams_pairs_them_with_the_streams_joined_at_the_first_cut():
    (region,) = planned(Joined(), Bn_compute_blocks=1).regions
    (pair,) = region.live_outs
    assert value_of(pair.before).shape == value_of(pair.after).shape == (BATCH, IMAGE + TEXT, WIDTH)
    assert pair.joins is not None
    assert {node.target for node, same_as in pair.joins.steps if same_as is None} == {torch.cat}


class JoinedByWeights(Joined):
    """As `Joined`, but the streams are joined by an operation that would have to run at every reused step."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def join(self, *streams: Tensor) -> Tensor:
        joint = torch.cat(streams, dim=1)
        return joint + self.mix(joint)


def test_streams_that_a_separate_layer_joins_are_not_paired():
    mismatch = refused(JoinedByWeights(), Bn_compute_blocks=1)
    assert mismatch.cause is Cause.UNPAIRED
    assert re.search(r"hidden_states_\d float32\[2, 6, 16\]", mismatch.expected)
    assert re.match(r"hidden_states_\d+ float32\[2, 11, 16\]", mismatch.found)


@pytest.mark.parametrize(("fn", "bn"), [(4, 0), (3, 1), (1, 8)])
def test_fn_and_bn_leave_at_least_one_block(fn, bn):
    mismatch = refused(Transformer(), Fn_compute_blocks=fn, Bn_compute_blocks=bn)
    assert mismatch.cause is Cause.TOO_FEW_BLOCKS
    assert mismatch.expected == "Fn_compute_blocks + Bn_compute_blocks < 4, the number of blocks of blocks"
    assert mismatch.found == f"{fn} + {bn}"


class NoBlocks(Transformer):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return self.unembed(self.x_embedder(hidden_states), timestep[:, None] * torch.ones(WIDTH))


@pytest.mark.parametrize(
    "model", [pytest.param(NoBlocks, id="no-list"), pytest.param(lambda: Transformer(depth=1), id="a-list-of-one")]
)
def test_a_model_without_a_loop_of_blocks_has_no_chain(model):
    mismatch = refused(model())
    assert (mismatch.cause, mismatch.template) == (Cause.NO_CHAIN, None)
    assert "a list of blocks that pass on a stream" in mismatch.expected
    assert "TORCH_LOGS=graph_breaks" in mismatch.cure


class TwoResolutions(nn.Module):
    """Convolves at one resolution and at half of it."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, stride, 1), nn.SiLU()) for _ in range(2))

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            sample = block(sample + timestep)
        return (sample,)


@pytest.mark.parametrize(("stride", "cause"), [(2, Cause.NO_TRANSFORMER), (1, None)])
def test_convolutions_at_several_resolutions_are_no_transformer(stride: int, cause: Cause | None):
    found = plan(TwoResolutions(stride).eval(), dict(sample=torch.randn(1, 4, 8, 8), timestep=torch.tensor(1.0)))
    causes = {one.cause for one in found} if isinstance(found, tuple) else set()
    assert causes == {cause} if cause is not None else Cause.NO_TRANSFORMER not in causes


def test_a_graph_that_needs_gradients_is_refused():
    with torch.enable_grad():
        mismatch = refused(Transformer())
        assert isinstance(plan(Transformer().requires_grad_(False)), Plan)
    assert mismatch.cause is Cause.GRADIENTS
    assert "under torch.no_grad()" in mismatch.cure


def test_an_empty_batch_is_refused():
    model = Transformer()
    inputs = {name: value[:0] for name, value in make_inputs(model).items()}
    found = plan(model.eval(), inputs)
    assert isinstance(found, tuple) and found[0].cause is Cause.EMPTY
    assert "of shape [0" in found[0].found


def test_a_module_in_training_mode_is_refused():
    config = CacheConfig(Fn_compute_blocks=1, inner_backend="eager", on_no_match="raise")
    model = Transformer().train()
    with pytest.raises(BackendCompilerFailed) as caught:  # The error of Dynamo, which wraps that of this package.
        torch.compile(model, backend=cachedit_fx.Backend(config))(**make_inputs(model))
    message = flat(str(caught.value))
    assert "NoMatchError" in message
    assert f"{Cause.TRAINING.value}: expected: a module in eval mode; found: training mode" in message
    assert "call .eval()" in message


def test_every_cause_has_a_test():
    names = ("test_refusals.py", "test_patterns.py", "test_reach_output.py", "test_probes.py")
    tests = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)
    assert [cause for cause in Cause if f"Cause.{cause.name}" not in tests] == []
