"""Draws docs/assets/graph-before.svg, graph-after.svg and steps.svg.

    python docs/site/figures.py

The numbers in the pictures are those of the captured and of the cached graph of a small FLUX transformer, and those of
a generation of the trained digits model of examples/digits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

import cachedit_fx
from cachedit_fx.inspect import CacheStats, Explanation
from cachedit_fx.inspect.explanation.units import flops, size
from cachedit_fx.inspect.pages.svg import points, tag, text

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "docs" / "assets"
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1b2330 }
.small { font-size: 12px; fill: #4a5568 }
.code { font-family: ui-monospace, monospace; font-size: 12px }
.name { font-weight: 600 }
.box { fill: #eef1f6; stroke: #8894a8 }
.block { fill: #d6e4f7; stroke: #3d6fb0 }
.runs { fill: #dcefe0; stroke: #3c8550 }
.choice { fill: #fff3cf; stroke: #a87b00 }
.reuse { fill: #fbe0cc; stroke: #b45a10 }
.line { stroke: #4a5568; stroke-width: 1.5; fill: none }
.dashed { stroke-dasharray: 5 4 }
.axis { stroke: #8894a8; fill: none }
.computed { fill: #3d6fb0 }
.reused { fill: #fff; stroke: #b45a10; stroke-width: 2.5 }
"""
CONFIG = dict(
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    in_channels=4,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    guidance_embeds=False,
    axes_dims_rope=[4, 4, 8],
)
THRESHOLD, NUM_STEPS = 0.2, 28


def explained() -> Explanation:
    """The explanation of the small transformer, with the default configuration."""
    model = FluxTransformer2DModel(**CONFIG).eval()
    image = dict(hidden_states=torch.randn(1, 16, 4), img_ids=torch.zeros(16, 3), timestep=torch.tensor([1.0]))
    prompt = dict(encoder_hidden_states=torch.randn(1, 7, 32), txt_ids=torch.zeros(7, 3))
    with torch.no_grad():
        return cachedit_fx.explain(model, pooled_projections=torch.randn(1, 32), return_dict=False, **image, **prompt)


def generation() -> CacheStats:
    """The statistics of a generation of the digits model."""
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    from model import PIPELINE_SIDE, build_pipeline, class_conditioning, load_transformer

    pipe = build_pipeline(load_transformer())
    cachedit_fx.enable_cache(pipe, inner_backend="eager", residual_diff_threshold=THRESHOLD, max_warmup_steps=4)
    tokens, pooled = class_conditioning(torch.tensor([7]))
    pipe(
        prompt_embeds=tokens,
        pooled_prompt_embeds=pooled,
        height=PIPELINE_SIDE,
        width=PIPELINE_SIDE,
        num_inference_steps=NUM_STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    (stats,) = cachedit_fx.summary(pipe, logging=False)
    return stats


def picture(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """A whole SVG file."""
    ground = tag("rect", width=width, height=height, rx=6, fill="#fff")
    attributes = dict(viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", aria_label=label)
    return tag("svg", tag("style", STYLE), ground, *parts, xmlns="http://www.w3.org/2000/svg", **attributes) + "\n"


def box(x: float, y: float, width: float, height: float, kind: str, *lines: tuple[str, str]) -> str:
    """A rectangle with centered lines of text, each with its class."""
    top = y + height / 2 - 9 * (len(lines) - 1) + 5
    written = (text(x + width / 2, top + 18 * i, line, style, "middle") for i, (line, style) in enumerate(lines))
    return tag("g", tag("rect", x=x, y=y, width=width, height=height, rx=6, class_=kind), *written)


def arrow(*through: tuple[float, float], kind: str = "") -> str:
    """A line through points, with a head at the last one."""
    (before_x, before_y), (x, y) = through[-2:]
    if x == before_x:
        down = 1 if y > before_y else -1
        head = points((x - 5, y - 8 * down), (x, y), (x + 5, y - 8 * down))
    else:
        right = 1 if x > before_x else -1
        head = points((x - 8 * right, y - 5), (x, y), (x - 8 * right, y + 5))
    line = tag("polyline", points=points(*through), class_=f"line {kind}".strip())
    return tag("g", line, tag("polygon", points=head, fill="#4a5568"))


def num_operations(found: Explanation, which: str) -> int:
    """The number of operations of a graph, without inputs and outputs."""
    return sum(node.op.startswith("call") for node in found.graph(which).graph.nodes)


def before(found: Explanation) -> str:
    """The captured graph: one line of blocks."""
    report = found.graphs[0]
    parts = [text(24, 32, f"Captured: one graph of {num_operations(found, 'before')} operations", "name")]
    x = 24.0
    parts.append(box(x, 60, 100, 60, "box", ("embeddings", ""), ("rotary table", "small")))
    x += 100
    for block in report.blocks:
        short = "double" if block.cls == "FluxTransformerBlock" else "single"
        parts.append(arrow((x, 90), (x + 24, 90)))
        lines = ((f"block {block.number}", "name"), (short, "small"), (flops(block.cost.flops), "small"))
        parts.append(box(x + 24, 60, 86, 60, "block", *lines))
        x += 110
    parts.append(arrow((x, 90), (x + 24, 90)))
    parts.append(box(x + 24, 60, 100, 60, "box", ("norm", ""), ("projection", "small")))
    return picture(int(x) + 148, 150, "The captured graph: embeddings, five blocks in a row, projection", parts)


def after(found: Explanation) -> str:
    """The cached graph: head, one conditional with two branches, tail."""
    report = found.graphs[0]
    region = report.regions[0]
    skipped = [block for block in report.blocks if block.region == 0]
    reuse_lines = (("reuse branch", "name"), ("hidden_states + cached residual", "code"), ("2 operations", "small"))
    assert num_operations(found, "reuse") == 2
    parts = [
        text(24, 32, f"Rewritten: a reused step saves {report.saved_flops:.0%} of the FLOPs", "name"),
        box(24, 130, 120, 84, "runs", ("head", "name"), ("embeddings", "small"), ("block 0", "")),
        text(84, 234, f"{num_operations(found, 'head')} operations", "small", "middle"),
        arrow((144, 172), (178, 172)),
        tag("polygon", points=points((178, 172), (258, 122), (338, 172), (258, 222)), class_="choice"),
        text(258, 168, "residual diff", "", "middle"),
        text(258, 186, f"< {region.threshold:g} ?", "", "middle"),
        text(258, 250, "probe: what block 0 added,", "small", "middle"),
        text(258, 266, "against the last computed step", "small", "middle"),
        arrow((258, 122), (258, 92), (372, 92)),
        text(266, 84, "yes", "small"),
        box(372, 62, 270, 64, "reuse", *reuse_lines),
        arrow((338, 172), (360, 172), (360, 240), (372, 240)),
        text(340, 164, "no", "small"),
        tag("rect", x=372, y=176, width=270, height=128, rx=6, class_="box"),
        text(507, 198, "compute branch", "name", "middle"),
        *(
            box(384 + 63 * i, 208, 57, 44, "block", ("block", "small"), (f"{block.number}", ""))
            for i, block in enumerate(skipped)
        ),
        text(507, 274, "cached residual = what blocks 1 to 4 added", "small", "middle"),
        text(507, 292, f"{num_operations(found, 'compute')} operations, {flops(region.cost.flops)}", "small", "middle"),
        arrow((642, 92), (716, 92), (716, 130)),
        arrow((642, 240), (716, 240), (716, 214)),
        box(662, 130, 120, 84, "runs", ("tail", "name"), ("norm, projection", "small")),
        text(24, 292, f"cached between two steps: {size(report.state_bytes)}", "small"),
    ]
    label = "The cached graph: the head decides between a compute branch and a reuse branch, the tail follows"
    return picture(806, 320, label, parts)


def steps(stats: CacheStats, threshold: float) -> str:
    """The residual diffs of a run, with what each step did."""
    left, right, top, bottom = 60.0, 780.0, 56.0, 240.0
    most = 1.15 * max(threshold, *stats.residual_diffs.values())

    def x_of(step: int) -> float:
        return left + 20 + (right - left - 40) * step / (stats.num_steps - 1)

    def y_of(diff: float) -> float:
        return bottom - (bottom - top) * diff / most

    def marks() -> Iterator[str]:
        for step in range(stats.num_steps):
            is_reused = step in stats.cached_steps
            diff = stats.residual_diffs.get(step)
            y = y_of(diff) if diff is not None else bottom - 8
            yield tag("circle", cx=x_of(step), cy=y, r=6, class_="reused" if is_reused else "computed")
            yield text(x_of(step), bottom + 20, step, "small", "middle")

    counts = f"{len(stats.cached_steps)} of {stats.num_steps} steps reused"
    line_y = y_of(threshold)
    parts = [
        text(24, 28, f"A generation of the digits model: {counts}", "name"),
        tag("line", x1=left, y1=bottom, x2=right, y2=bottom, class_="axis"),
        tag("line", x1=left, y1=top, x2=left, y2=bottom, class_="axis"),
        tag("line", x1=left, y1=line_y, x2=right, y2=line_y, class_="line dashed"),
        text(right, line_y - 8, f"threshold {threshold:g}", "small", "end"),
        text(left - 8, y_of(0) + 4, "0", "small", "end"),
        text(left - 8, line_y + 4, f"{threshold:g}", "small", "end"),
        text(left + 4, top - 8, "residual diff", "small"),
        text(right, bottom + 40, "step", "small", "end"),
        *marks(),
        tag("circle", cx=left + 8, cy=bottom + 36, r=6, class_="computed"),
        text(left + 22, bottom + 41, "computed", "small"),
        tag("circle", cx=left + 108, cy=bottom + 36, r=6, class_="reused"),
        text(left + 122, bottom + 41, "reused", "small"),
    ]
    return picture(806, 300, f"Residual diffs of a generation: {counts}", parts)


def main() -> None:
    """Writes the pictures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = explained()
    drawn = {"graph-before": before(found), "graph-after": after(found), "steps": steps(generation(), THRESHOLD)}
    for name, content in drawn.items():
        (ASSETS / f"{name}.svg").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
