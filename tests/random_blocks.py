"""The code of the blocks of random models."""

from __future__ import annotations

from tests.random_specs import WIDTH, Blocks, Spec


def parameters(spec: Spec, blocks: Blocks) -> dict[str, str]:
    """Name of each parameter -> the argument: `stream_i`, or a local of the model's forward."""
    names = _locals(spec, blocks)
    takes = {name: f"stream_{i}" for i, name in enumerate(names)}
    if blocks.takes_reversed:
        takes = dict(reversed(takes.items()))
    reads = spec.reads(blocks)
    takes |= {"context" if "context" not in names else "memory": reads} if reads else {}
    return takes | ({"temb": "temb"} if spec.time or blocks.emits == "time" else {})


def _locals(spec: Spec, blocks: Blocks) -> tuple[str, ...]:
    """The names of the streams in the block's code."""
    streams = spec.streams(blocks)
    return ("a", "b", "d")[: len(streams)] if spec.inner else streams


def block_source(spec: Spec, blocks: Blocks, *, has_skip: bool) -> str:
    """The code of a block's class."""
    names, takes = _locals(spec, blocks), parameters(spec, blocks)
    modules = [f"to_{i}" for i in range(len(names))] + ["read", "gain", "to_emit"]
    body = [*_mixing(spec, blocks, names, takes)]
    if has_skip:
        body.insert(0, f"{names[0]} = self.merge(torch.cat([{names[0]}, skip], dim=-1))")
    results = [*names]
    if blocks.body == "branch":
        results = [f"gain * self.to_0({names[0]} + look).tanh()"]
    elif blocks.body == "expression":
        results = [f"{name} + gain * self.to_{i}({name} + look).tanh()" for i, name in enumerate(names)]
    else:
        body += _changes(blocks, names)
    if blocks.returns_reversed:
        results.reverse()
    if blocks.emits:
        made_of = names[0] if blocks.emits == "stream" else "temb"
        body.append(f"emitted = self.emit({made_of})")
        results.insert(0 if blocks.emits_first else len(results), "emitted")
    arguments = ", ".join(["self", *takes, *(["skip"] if has_skip else [])])
    lines = [f"self.{name} = nn.Linear({WIDTH}, {WIDTH})" for name in modules]
    lines += [f"self.merge = nn.Linear({2 * WIDTH}, {WIDTH})"] if has_skip else []
    return "\n".join(
        [
            f"class {blocks.path.title().replace('_', '')}Block(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in lines),
            "",
            "    def emit(self, given):",
            f"        made = self.to_emit(given).tanh(){'[:, None]' if blocks.emits == 'time' else ''}",
            "        return made",
            "",
            f"    def forward({arguments}):",
            *(f"        {line}" for line in body),
            f"        return {', '.join(results)}",
            "",
        ]
    )


def _mixing(spec: Spec, blocks: Blocks, names: tuple[str, ...], takes: dict[str, str]) -> list[str]:
    """Code that computes what streams get from each other and from the invariants: `look`, [B, 1, D], and `gain`."""
    sources = {"each": names, "image": names[1:] or names, "text": names[:1]}[blocks.looks]
    lines = [f"look = {' + '.join(f'{name}.mean(1, keepdim=True)' for name in sources)}"]
    for name in ("context", "memory"):
        if name in takes and not takes[name].startswith("stream_"):
            lines.append(f"look = look + self.read({name}).mean(1, keepdim=True)")
    lines.append("gain = 1 + self.gain(temb)[:, None].tanh()" if spec.time else "gain = 1.5")
    return lines


def _changes(blocks: Blocks, names: tuple[str, ...]) -> list[str]:
    if blocks.body == "concat":
        lengths = ", ".join(f"{name}.shape[1]" for name in names)
        changes = ", ".join(f"change_{i}" for i in range(len(names)))
        lines = [
            f"every = torch.cat([{', '.join(names)}], dim=1)",
            "every = gain * self.to_0(every + look).tanh()",
            f"{changes}, = torch.split(every, [{lengths}], dim=1)",
        ]
        return lines + [f"{name} = {name} + change_{i}" for i, name in enumerate(names)]
    # Only the streams that `looks` names depend on the others.
    change = {
        "add": "{0} = {0} + gain * self.to_{1}({0}{2}).tanh()",
        "in-place": "{0} += gain * self.to_{1}({0}{2}).tanh()",
        "post-norm": "{0} = F.layer_norm({0} + gain * self.to_{1}({0}{2}).tanh(), (8,))",
        "attention": "{0} = {0} + gain * self.to_{1}(({0} @ {0}.transpose(1, 2)).softmax(-1) @ {0}{2})",
    }[blocks.body]
    readers = {"each": names, "image": names[:1], "text": names[1:] or names}[blocks.looks]
    return [change.format(name, i, " + look" if name in readers else "") for i, name in enumerate(names)]
