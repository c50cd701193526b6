"""Small transformers with random code: `write` turns a `Spec` into code, and `build` turns the code into a model.

A model's forward is a list of lines without branches or loops, so that plain Python can run them one by one (see
`tests.line_reference`). Every line has an effect: every block adds about as much to its streams as it receives.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_blocks import block_source, parameters
from tests.random_specs import END, IMAGE_HOLDERS, WIDTH, Blocks, Spec

TIMES = (0.9, 0.8, 0.7)


@dataclass(frozen=True)
class Line:
    """A statement of a model's forward.

    Attributes:
        block: Path of the block that it calls, as in `blocks.1`; empty for others.
        streams: Names of the streams that the block takes and returns.
        without_block: Code that computes the results that depend on no stream without calling the block.
        is_joined: Whether the streams are joined into one after this line.
    """

    code: str
    block: str = ""
    streams: tuple[str, ...] = ()
    without_block: str = ""
    is_joined: bool = False


@dataclass
class Code:
    """A model's code and its modules: name -> (features in, features out), block list -> sources of its blocks."""

    spec: Spec
    lines: list[Line] = field(default_factory=list)
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)

    @property
    def source(self) -> str:
        body = "".join(f"        {line.code}\n" for line in self.lines)
        return f"class Transformer(nn.Module):\n    def forward(self, {', '.join(self.spec.inputs)}):\n{body}"


def write(spec: Spec) -> Code:
    """The code of a model."""
    writer = _Writer(spec)
    writer.embed()
    for blocks in spec.lists:
        writer.run(blocks, is_last=blocks is spec.lists[-1])
    writer.finish()
    return writer.code


class _Writer:
    """Writes a model's forward from its first line to its last."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.code = spec, Code(spec)
        self.is_joined = self.is_embedded = False
        self.number = 0  # The number of the next image block.
        self.emitted: list[str] = []
        self.gates: list[str] = []
        self.hints: list[str] = []

    @property
    def image(self) -> str:
        """The name of the stream that holds the image at this line."""
        return self.spec.joint if self.is_joined else self.spec.image

    def add(self, code: str, **fields: Any) -> None:
        self.code.lines.append(Line(code, is_joined=self.is_joined, **fields))

    def linear(self, name: str, width: int = WIDTH) -> str:
        self.code.linears[name] = (width, WIDTH)
        return f"self.{name}"

    def embed(self) -> None:
        spec = self.spec
        self.add(f"temb = {self.linear('time', 2)}(torch.stack([timestep.sin(), timestep.cos()], dim=-1))")
        self._cast("temb")
        if not spec.late:
            self.embed_image()
        for name, given in zip(spec.names[1:], ("encoder_hidden_states", "audio_states"), strict=False):
            self._start(name, given)
        if spec.context:
            self.add(f"context = {self.linear('embed_context')}(context_embeds)")
            self._cast("context")
        if "control" in spec.inputs:
            self._cast("control")
        if any(blocks.holds == "side" for blocks in spec.lists):
            if spec.side_of_image:
                self.embed_image()
            self.add(f"side = {self._in_dtype('embed_side')}(control){f' + {spec.image}' * spec.side_of_image}")

    def embed_image(self) -> None:
        if not self.is_embedded:
            self._start(self.spec.image, "hidden_states")
            self.is_embedded = True

    def _start(self, name: str, given: str) -> None:
        if not self.spec.raw:
            self.add(f"{name} = {self.linear(f'embed_{given}')}({given})")
        elif name != given:
            self.add(f"{name} = {given}")
        self._cast(name)

    def _cast(self, name: str) -> None:
        if self.spec.cast:
            self.add(f"{name} = {name}.to(torch.{self.spec.cast})")

    def _in_dtype(self, name: str, width: int = WIDTH) -> str:
        """A linear layer between the blocks, in their dtype."""
        return self.linear(f"in_{name}", width)

    def run(self, blocks: Blocks, *, is_last: bool) -> None:
        """Writes the calls of all blocks of a list, with the work between them."""
        if blocks.holds in IMAGE_HOLDERS:
            self.embed_image()
        if blocks.holds in ("all", "image") and self.hints and self.spec.hints == "before":
            self.add(f"{self.spec.image} = {self.spec.image} + {self.hints[-1]}")
            self.hints = []
        if blocks.holds == "joint" and not self.is_joined:
            self.is_joined = True
            self.add(f"{self.spec.joint} = torch.cat([{', '.join(self.spec.parts)}], dim=1)")
        first = self.number
        for _ in range(1 + (is_last and self.spec.again == "loop")):
            self.number = first
            for index in range(blocks.depth):
                self._block(blocks, index)

    def _block(self, blocks: Blocks, index: int) -> None:
        is_image = blocks.holds in IMAGE_HOLDERS
        skip = self._skips_into(self.number) if is_image else ""
        sources = self.code.lists.setdefault(blocks.path, [])
        if index == len(sources):
            sources.append(block_source(self.spec, blocks, has_skip=bool(skip)))
        for _ in range(1 + (is_image and self.number == 1 and self.spec.again == "twice")):
            self._call(blocks, index, skip)
        if blocks.holds == "side":
            self.add(f"hint_{index} = side")
            self.hints.append(f"hint_{index}")
        if is_image:
            self._work_behind(self.number)
            self.number += 1

    def _call(self, blocks: Blocks, index: int, skip: str) -> None:
        spec, streams, path = self.spec, self.spec.streams(blocks), f"self.{blocks.path}[{index}]"
        takes = parameters(spec, blocks)
        given = [streams[int(name[-1])] if name.startswith("stream_") else name for name in takes.values()]
        by_name = spec.keywords
        args = [f"{name}={arg}" if by_name else arg for name, arg in zip(takes, given, strict=True)]
        args += [f"skip={skip}"] if skip else []
        results = [*(reversed(streams) if blocks.returns_reversed else streams)]
        without_block = ""
        if blocks.emits:
            name = f"emitted_{len(self.emitted)}"
            self.emitted.append(name)
            results.insert(0 if blocks.emits_first else len(results), name)
            without_block = f"{name} = {path}.emit(temb)" if blocks.emits == "time" else ""
        call = f"{path}({', '.join(args)})"
        if blocks.body == "branch":
            call = f"{results[0]} + {call}"
        self.add(
            f"{', '.join(results)} = {call}",
            block=f"{blocks.path}.{index}",
            streams=streams,
            without_block=without_block,
        )

    def _skips_into(self, number: int) -> str:
        """Writes the skips that end before a block. Returns the skip that the block takes as an argument."""
        given = ""
        for skip in self.spec.skips:
            name = f"skip_{skip.source}{'_joint' * self.is_joined}"
            if skip.target != number or not any(line.code.startswith(f"{name} =") for line in self.code.lines):
                continue
            if skip.how == "argument" and number != END:
                given = name
            elif skip.how == "add":
                self.add(f"{self.image} = {self.image} + {name}")
            else:
                merge = self._in_dtype(f"merge_{skip.source}_{number}", 2 * WIDTH)
                self.add(f"{self.image} = {merge}(torch.cat([{self.image}, {name}], dim=-1))")
        return given

    def _work_behind(self, number: int) -> None:
        image, text = self.image, self.spec.text
        if any(skip.source == number for skip in self.spec.skips):
            self.add(f"skip_{number}{'_joint' * self.is_joined} = {image}")
        if self.hints and not self.is_joined:
            self.add(f"{image} = {image} + {self.hints.pop()}")
        for work in self.spec.works:
            if work.after != number:
                continue
            if work.kind == "control" and not self.is_joined:
                self.add(f"{image} = {image} + control")
            elif work.kind == "in-place" and not self.is_joined:
                self.add(f"{image} += control")
            elif work.kind == "time":
                self.add(f"{image} = {image} * (1 + 0.5 * {self._in_dtype(f'scale_{number}')}(temb)[:, None].tanh())")
            elif work.kind == "norm":
                self.add(f"{image} = F.layer_norm({image}, ({WIDTH},))")
            elif work.kind == "adapter":
                adapters = self.code.lists.setdefault("adapters", [])
                call = f"self.adapters[{len(adapters)}]({image})"
                self.add(f"{image} = {image} + {call}", block=f"adapters.{len(adapters)}", streams=(image,))
                adapters.append(ADAPTER)
            elif work.kind == "gate":
                self.gates.append(f"gate_{number}")
                self.add(f"gate_{number} = {self._in_dtype(f'to_gate_{number}')}(temb)[:, None].tanh()")
                self.add(f"{image} = {image} * (1 + 0.5 * gate_{number})")
            elif work.kind == "overwrite" and text and not self.is_joined:
                layers = f"text_layers.to({text}.dtype)" if self.spec.cast else "text_layers"
                layers = f"{self._in_dtype('embed_layers')}({layers})"
                self.add(f"{text} = torch.cat([{layers}, {text}[:, 2:]], dim=1)")

    def finish(self) -> None:
        spec, (length, text_length) = self.spec, self.spec.tokens[:2]
        self._skips_into(END)
        if spec.again == "after":
            self.add(f"{self.image} = {self.image} + self.{spec.image_lists[0].path}[0].to_0({self.image}).tanh()")
        has_text = spec.text is not None
        if self.is_joined:
            self._take_apart(length, text_length)
            has_text = spec.apart in ("both", "split")
        if spec.cast:
            for name in (spec.image, *((spec.text,) if has_text else ())):
                self.add(f"{name} = {name}.to(torch.float32)")
        self.add(f"output = {self.linear('proj_out')}({spec.image})")
        if has_text and (spec.uses_text or spec.returns == "text"):
            for name in spec.names[1:] if not self.is_joined else spec.names[1:2]:
                value = f"{name}.to(torch.float32)" if spec.cast else name
                self.add(f"output = output + {self.linear(f'proj_{name}')}({value}).mean(1, keepdim=True)")
        for name in self.gates:
            self.add(f"output = output + {name}.to(torch.float32)")
        extra = [spec.text] if spec.returns == "text" and has_text else []
        if spec.returns == "emitted":
            extra += self.emitted
        elif self.emitted:
            self.add(f"output = output + {self.emitted[-1]}.to(torch.float32).mean(1, keepdim=True)")
        self.add(f"return {', '.join(['output', *extra])},")

    def _take_apart(self, length: int, text_length: int) -> None:
        spec, joint = self.spec, self.spec.joint
        border = text_length if spec.text_first else length
        slices = [f"{joint}[:, :{border}]", f"{joint}[:, {border}:]"]
        if spec.apart == "image":
            self.add(f"{spec.image} = {slices[spec.text_first]}")
        elif spec.apart == "both":
            self.add(f"{', '.join(spec.parts)} = {', '.join(slices)}")
        elif spec.apart == "split":
            sizes = [text_length, length] if spec.text_first else [length, text_length]
            self.add(f"{', '.join(spec.parts)} = torch.split({joint}, {sizes}, dim=1)")
        elif joint != spec.image:
            self.add(f"{spec.image} = {joint}")


ADAPTER = f"""class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_0 = nn.Linear({WIDTH}, {WIDTH})

    def forward(self, tokens):
        return self.to_0(tokens - tokens.mean(1, keepdim=True)).tanh()
"""


def build(code: Code) -> nn.Module:
    """The model, always with the same weights; `inspect` can read the source of its `forward` and of its blocks'."""
    spec = code.spec
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _class_of(code.source, "Transformer")()
        for name, (wide, out) in code.linears.items():
            setattr(model, name, nn.Linear(wide, out))
        for path, sources in code.lists.items():
            classes = [_class_of(source, source.split("(")[0].removeprefix("class ")) for source in sources]
            setattr(model, path, nn.ModuleList(cls() for cls in classes))
    if spec.cast:
        dtype = getattr(torch, spec.cast)
        for path in (*code.lists, *(name for name in code.linears if name.startswith("in_"))):
            model.get_submodule(path).to(dtype)
    image = spec.image_lists[0].path
    blocks = model.get_submodule(image)
    if spec.again == "shared":
        blocks[-1].to_0.weight = blocks[0].to_0.weight
    elif spec.again == "same" and code.lists[image][-1] == code.lists[image][-2]:
        blocks[-1] = blocks[-2]
    return model.eval().requires_grad_(False)


_classes: dict[str, type[nn.Module]] = {}


def _class_of(source: str, name: str) -> type[nn.Module]:
    """The class that `source` defines, in a file that `inspect` can read."""
    if source not in _classes:
        file = f"random_model_{hashlib.sha1(source.encode()).hexdigest()[:12]}.py"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "__name__": __name__}
        exec(compile(source, file, "exec"), names)
        _classes[source] = names[name]
    return _classes[source]


def generation(spec: Spec) -> Iterator[dict[str, Tensor]]:
    """The arguments of three steps: latents, timestep and control are new at every step, the others are the same."""
    seeds = count(1)
    constant: dict[str, Tensor] = {}
    for time in TIMES:
        call = {}
        for name, shape in spec.inputs.items():
            if name == "timestep":
                call[name] = torch.full(shape, time)
            elif name in ("hidden_states", "control", "audio_states"):
                call[name] = _noise(shape, next(seeds))
            else:
                call[name] = constant.setdefault(name, _noise(shape, next(seeds)))
        yield call


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
