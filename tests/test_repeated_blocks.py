"""Blocks that are like an earlier one repeat its trace: the same graph, guards and outputs. No difference is missed."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, fx, nn

import cachedit_fx
from cachedit_fx.frontend import capture_strategies, trace_internals
from cachedit_fx.frontend.repeated_blocks import RepeatedBlocks, blocks_of, traced_once
from tests import tiny
from tests.tiny_pipelines import PIPELINES

WIDTH = 8


class Processor:
    """Not a module, like the attention processors of diffusers."""

    def __init__(self) -> None:
        self.scale = 2

    def __call__(self, attention: Attention, x: Tensor) -> Tensor:
        q, k, v = attention.project(x).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v) * self.scale


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


class Block(nn.Module):
    """Returns one of its inputs as it is. Each block has an attribute that its forward does not read."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.eps = number, 1e-3
        self.attention, self.shift = Attention(), nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("table", torch.ones(WIDTH))

    def forward(self, x: Tensor, text: Tensor, emb: Tensor, options: Any = None) -> tuple[Tensor, Tensor]:
        shift, gate = self.shift(emb).unsqueeze(1).chunk(2, dim=-1)
        joint = torch.cat([text, self.norm(x) + shift], dim=1)
        x = x + gate * self.attention(joint * self.table)[:, text.shape[1] :] + self.eps
        return text, x


class Model(nn.Module):
    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.embed = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block(i) for i in range(count))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        emb = self.embed(timestep[:, None])
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, emb=emb)
        return hidden_states


class Capture:
    """What Dynamo captures of a model, with or without repeated traces."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], *, repeated: bool, **kwargs: Any) -> None:
        torch._dynamo.reset()
        self.graphs: list[fx.GraphModule] = []
        self.compiled = torch.compile(model, backend=self._backend, fullgraph=True, **kwargs)
        with torch.no_grad(), traced_once(model if repeated else None) as blocks:
            self.output = self.compiled(*args)
        self.traced, self.repeated = blocks.num_traced, blocks.num_repeated

    def _backend(self, gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward

    @property
    def nodes(self) -> list[Any]:
        (gm,) = self.graphs
        return [_describe(node) for node in gm.graph.nodes]


def _describe(node: fx.Node) -> Any:
    example = node.meta.get("example_value")
    size = (example.shape, example.stride(), example.dtype) if isinstance(example, Tensor) else None
    metas = [node.meta.get(key) for key in ("nn_module_stack", "source_fn_stack", "stack_trace")]
    return (node.name, node.op, node.target, str(node.args), str(node.kwargs), str(metas), str(size))


def _inputs(batch: int = 2, tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, tokens, WIDTH), torch.randn(batch, 3, WIDTH), torch.rand(batch)


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> list[set[tuple[str, str]]]:
    """The guards of each capture, as the names of the guarded objects and the kinds of the guards."""
    found: list[set[tuple[str, str]]] = []
    original = torch._dynamo.guards.CheckFunctionManager.__init__

    def init(self: Any, code: Any, output: Any, *args: Any, **kwargs: Any) -> None:
        # The dictionary of builtins has a number, which counts the captures of the process.
        names = {(str(one.name).partition("'__builtins")[0], one.create_fn_name()) for one in output.guards}
        found.append(names)
        original(self, code, output, *args, **kwargs)

    monkeypatch.setattr(torch._dynamo.guards.CheckFunctionManager, "__init__", init)
    return found


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_graph_and_the_guards_are_those_of_dynamo(dynamic: bool, guards: list[set[tuple[str, str]]]):
    model, args = tiny.frozen(Model()), _inputs()
    for one in args[:2] if dynamic else ():
        torch._dynamo.mark_dynamic(one, 1)
    plain, once = Capture(model, args, repeated=False), Capture(model, args, repeated=True)
    # The input of the first block is an input of the model, that of the others is not.
    assert (once.traced, once.repeated) == (2, 3)
    assert once.nodes == plain.nodes
    assert guards[1] == guards[0]
    assert torch.equal(once.output, plain.output)


def test_numbers_that_are_inputs_are_those_of_each_block(guards: list[set[tuple[str, str]]]):
    """With `dynamic=True`, Dynamo lifts the numbers of the blocks as tensors."""
    model, args = tiny.frozen(Model()), _inputs()
    plain, once = (Capture(model, args, repeated=repeated, dynamic=True) for repeated in (False, True))
    assert (once.traced, once.repeated) == (2, 3)
    numbers = [node for node in once.graphs[0].graph.nodes if node.target == "item"]
    assert len(numbers) >= 5 and once.nodes == plain.nodes
    assert guards[1] == guards[0]
    assert torch.equal(once.output, plain.output)


def test_blocks_with_other_numbers_compute_with_theirs():
    """Dynamo specializes on the number of a layer norm; it does not specialize on one that is added."""
    model, args = tiny.frozen(Model()), _inputs()
    model.blocks[2].eps, model.blocks[3].norm.eps = 1.0, 1.0
    plain, once = (Capture(model, args, repeated=repeated, dynamic=True) for repeated in (False, True))
    assert (once.traced, once.repeated) == (3, 2) and once.nodes == plain.nodes
    assert torch.equal(once.output, plain.output)
    model.blocks[4].eps = 2.0
    with torch.no_grad():
        assert torch.equal(once.compiled(*args), model(*args))
    assert len(once.graphs) == 1


def test_example_values_share_memory_where_those_of_dynamo_do():
    model, args = tiny.frozen(Model()), _inputs()

    def views(capture: Capture) -> list[list[int]]:
        storages: dict[int, list[int]] = {}
        for i, node in enumerate(capture.graphs[0].graph.nodes):
            example = node.meta.get("example_value")
            if isinstance(example, Tensor):
                storages.setdefault(example.untyped_storage()._cdata, []).append(i)
        return [*storages.values()]

    assert views(Capture(model, args, repeated=True)) == views(Capture(model, args, repeated=False))


CHANGES: dict[str, Callable[[Block], object]] = {
    "a number": lambda block: setattr(block, "eps", 1e-2),
    "the number of a layer": lambda block: setattr(block.norm, "eps", 1.0),
    "a number of a processor": lambda block: setattr(block.attention.processor, "scale", 3),
    "a processor": lambda block: setattr(block.attention, "processor", type("Other", (Processor,), {})()),
    "a layer": lambda block: setattr(block, "norm", nn.RMSNorm(WIDTH)),
    "a layer without weights": lambda block: setattr(block, "norm", nn.LayerNorm(WIDTH, elementwise_affine=False)),
    "a forward": lambda block: setattr(block.norm, "forward", lambda x: x),
    "a hook": lambda block: block.attention.register_forward_hook(lambda _, args, out: out * 2),
    "the type of a weight": lambda block: setattr(block, "table", torch.ones(WIDTH, dtype=torch.int64)),
    "the shape of a weight": lambda block: setattr(block, "table", torch.ones(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_differs_is_traced(change: str):
    model, args = tiny.frozen(Model()), _inputs()
    CHANGES[change](model.blocks[3])
    with torch.no_grad():
        expected = model(*args)
    # Of the others only block 4 is affected, and only if what block 3 returns is of another kind.
    capture = Capture(model, args, repeated=True)
    assert capture.traced >= 3 and torch.equal(capture.output, expected)


@pytest.mark.parametrize("change", sorted({*CHANGES} - {"a hook"}))  # Dynamo does not guard on hooks by default.
def test_a_change_of_a_repeated_block_is_noticed(change: str):
    model, args = tiny.frozen(Model()), _inputs()
    capture = Capture(model, args, repeated=True)
    assert capture.repeated
    CHANGES[change](model.blocks[3])
    with torch.no_grad():
        found, expected = capture.compiled(*args), model(*args)
    assert len(capture.graphs) == 2 and torch.equal(found, expected)


def test_blocks_that_share_a_weight_are_traced():
    model, args = tiny.frozen(Model()), _inputs()
    model.blocks[3].shift = model.blocks[2].shift
    plain, once = Capture(model, args, repeated=False), Capture(model, args, repeated=True)
    assert once.nodes == plain.nodes and (once.traced, once.repeated) == (3, 2)
    model.blocks[3].shift = copy.deepcopy(model.blocks[2].shift)
    with torch.no_grad():
        model.blocks[3].shift.bias.add_(1)
        assert torch.equal(once.compiled(*args), model(*args))


def test_one_processor_for_all_blocks_is_no_difference():
    model, args = tiny.frozen(Model()), _inputs()
    for block in model.blocks:
        block.attention.processor = model.blocks[0].attention.processor
    plain, once = Capture(model, args, repeated=False), Capture(model, args, repeated=True)
    assert once.nodes == plain.nodes and (once.traced, once.repeated) == (2, 3)
    model.blocks[0].attention.processor.scale = 5
    with torch.no_grad():
        assert torch.equal(once.compiled(*args), model(*args))
    model.blocks[3].attention.processor = Processor()
    with torch.no_grad():
        assert torch.equal(once.compiled(*args), model(*args))
    assert len(once.graphs) == 3


class Configured(Model):
    """Its blocks read a dictionary whose order of keys Dynamo checks, as the modules of diffusers do."""

    class Block(Block):
        def __init__(self, number: int) -> None:
            super().__init__(number)
            self.settings = FrozenDict(scale=2.0, name="block")

        def forward(self, x: Tensor, text: Tensor, emb: Tensor, options: Any = None) -> tuple[Tensor, Tensor]:
            return super().forward(x, text, emb * self.settings.scale)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Configured.Block(i) for i in range(4))


def test_blocks_with_a_configuration_of_diffusers_are_repeated():
    model, args = tiny.frozen(Configured()), _inputs()
    plain, once = Capture(model, args, repeated=False), Capture(model, args, repeated=True)
    assert once.nodes == plain.nodes and (once.traced, once.repeated) == (2, 2)
    model.blocks[3].settings = FrozenDict(name="block", scale=2.0)  # Another order.
    other = Capture(model, args, repeated=True)
    assert other.nodes == plain.nodes and (other.traced, other.repeated) == (3, 1)


class Counting(Model):
    """Its blocks change an object that was there before."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        emb = self.embed(timestep[:, None])
        for block in self.blocks:
            block.eps = block.eps + 1
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, emb=emb)
        return hidden_states


class Numbered(Model):
    """Every block receives another number, and half of them run in another context."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        emb = self.embed(timestep[:, None])
        for i, block in enumerate(self.blocks):
            with torch.autocast("cpu", torch.bfloat16, enabled=i > 2):
                encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, emb=emb, options=i)
        return hidden_states


class Collecting(Model):
    """A block appends to a list that it receives."""

    class Block(Block):
        def forward(self, x: Tensor, text: Tensor, emb: Tensor, options: Any = None) -> tuple[Tensor, Tensor]:
            options.append(x.sum() * len(options))
            return super().forward(x, text, emb)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Collecting.Block(i) for i in range(5))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        emb, seen = self.embed(timestep[:, None]), []
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, emb, seen)
        return hidden_states + sum(seen)


@pytest.mark.parametrize("cls", [Counting, Numbered, Collecting])
def test_blocks_whose_trace_depends_on_more_are_traced(cls: type[Model]):
    model, args = tiny.frozen(cls()), _inputs()
    with torch.no_grad():
        expected = copy.deepcopy(model)(*args)
    once = Capture(model, args, repeated=True)
    assert (once.traced, once.repeated) == (5, 0)
    assert torch.equal(once.output, expected)


def test_gradients_are_not_repeated():
    model, args = Model(), _inputs()
    with traced_once(model) as blocks:
        torch.compile(model, backend="eager", fullgraph=True)(*args).sum().backward()
    assert blocks.num_traced and not blocks.num_repeated
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_another_thread_and_another_model_are_traced_as_usual():
    model, other, args = tiny.frozen(Model()), tiny.frozen(Model()), _inputs()
    torch._dynamo.reset()
    with torch.no_grad(), traced_once(model) as blocks:
        torch.compile(other, backend="eager", fullgraph=True)(*args)
    assert (blocks.num_traced, blocks.num_repeated) == (0, 0)


def test_dynamo_and_the_model_are_left_as_they_were():
    from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable as Variable

    before = Variable.call_function
    model = tiny.frozen(Model())
    Capture(model, _inputs(), repeated=False)  # `torch.compile` adds an attribute itself.
    keys = [*map(vars, model.modules())]
    names = [set(one) for one in keys]
    with traced_once(model), traced_once(model):
        assert Variable.call_function is not before
    assert Variable.call_function is before
    with pytest.raises(ZeroDivisionError), traced_once(model):
        raise ZeroDivisionError
    assert Variable.call_function is before
    Capture(model, _inputs(), repeated=True)
    assert [set(one) for one in keys] == names


@pytest.mark.parametrize("name", ["value_at", "add_node", "tensor", "guards", "changes", "add_input"])
def test_a_version_of_torch_that_lacks_a_name_traces_every_block(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def missing(*_: Any) -> Any:
        raise AttributeError(name)

    model, args = tiny.frozen(Model()), _inputs()
    plain = Capture(model, args, repeated=False)
    monkeypatch.setattr(trace_internals.ModuleCall, name, missing)
    caplog.set_level(logging.DEBUG, "cachedit_fx.frontend")
    once = Capture(model, args, repeated=True)
    assert (once.traced, once.repeated) == (5, 0) and torch.equal(once.output, plain.output)
    operations = [node[2:5] for node in once.nodes if node[1] != "placeholder"]
    assert len(operations) == len([node for node in plain.nodes if node[1] != "placeholder"])
    assert name in caplog.text


def test_lists_of_blocks_are_found():
    model = Model(3)
    model.head = nn.ModuleList([Block(0)])
    model.ff = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert blocks_of(model) == {*map(id, model.blocks)}


@contextlib.contextmanager
def _every_block_traced(_: Any) -> Iterator[RepeatedBlocks]:
    yield RepeatedBlocks(None)


@pytest.mark.parametrize("num_blocks", [3, 8])
def test_enable_cache_decides_the_same_with_fewer_traced_blocks(num_blocks: int, monkeypatch: pytest.MonkeyPatch):
    prompt, latents = tiny.prompt(), tiny.latents()
    found = {}
    for repeats in (True, False):
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            if not repeats:
                patch.setattr(capture_strategies, "traced_once", _every_block_traced)
            model = tiny.build(num_blocks=num_blocks)
            cachedit_fx.enable_cache(model, **tiny.fields(inner_backend="eager"))
            with torch.no_grad():
                outputs = tiny.generate(model, prompt, latents)
            (stats,) = cachedit_fx.summary(model, logging=False)
            found[repeats] = outputs, stats.cached_steps, model._compiled_call_impl
    (outputs, steps, enabled), (expected, expected_steps, _) = found[True], found[False]
    assert enabled.compiled.num_blocks_traced == 1
    assert enabled.compiled.num_blocks_repeated == num_blocks - 1
    assert not enabled.fast_dispatch.reason  # Its guards and inputs are found as usual.
    assert steps == expected_steps and steps
    tiny.assert_bitwise(outputs, expected)


@pytest.mark.parametrize(("name", "num_traced", "num_repeated"), [("flux", 3, 5), ("qwen_image", 1, 3), ("wan", 1, 3)])
def test_the_blocks_of_a_pipeline_are_repeated(name: str, num_traced: int, num_repeated: int):
    """A pipeline passes `attention_kwargs`, which a decorator of the forward takes out of its `**kwargs`."""
    entry = PIPELINES[name]
    pipe = entry.build()
    cachedit_fx.enable_cache(pipe, inner_backend="eager")
    with torch.no_grad():
        entry.run(pipe, num_steps=2)
    compiled = pipe.transformer._compiled_call_impl.compiled
    assert (compiled.num_blocks_traced, compiled.num_blocks_repeated) == (num_traced, num_repeated)
