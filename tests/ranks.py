"""What two processes that share a sequence do, for `tests/test_ranks.py`.

    python -m tests.ranks FOLDER NAME...

This starts two processes that communicate over gloo, runs the functions `check_NAME` in both of them, and writes what
they return to FOLDER. The processes are forked from one that has imported everything. A collective that waits for
longer than `TIMEOUT` raises an error, and ends the run.
"""

from __future__ import annotations

import datetime
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn

import cachedit_fx

TIMEOUT = datetime.timedelta(seconds=20)
WIDTH, TOKENS = 8, 12
FIELDS = dict(inner_backend="eager", residual_diff_threshold=0.5, max_warmup_steps=2, max_continuous_cached_steps=-1)


class Block(nn.Module):
    """A block whose tokens are mixed with those of all ranks."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.group, self.inner, self.scale = group, nn.Linear(WIDTH, WIDTH), 1.0

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        tokens = hidden_states
        if self.group is not None:
            tokens = functional.all_gather_tensor(hidden_states.contiguous(), 1, self.group)
        mixed = tokens.mean(1, keepdim=True)
        return hidden_states + torch.tanh(self.inner(hidden_states + mixed) * temb) * self.scale


class Model(nn.Module):
    """A transformer whose ranks each hold a part of the sequence; the whole one without a group."""

    def __init__(self, group: dist.ProcessGroup | None, num_blocks: int = 4) -> None:
        super().__init__()
        self.group, self.rank = group, dist.get_rank(group) if group is not None else 0
        self.num_parts = dist.get_world_size(group) if group is not None else 1
        self.time, self.embed = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(group) for _ in range(num_blocks))

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        hidden_states = self.embed(hidden_states).chunk(self.num_parts, 1)[self.rank]
        temb = torch.sin(self.time(timestep.reshape(-1, 1)))[:, None] + encoder_hidden_states.mean(1, keepdim=True)
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        if self.group is not None:
            hidden_states = functional.all_gather_tensor(hidden_states.contiguous(), 1, self.group)
        return hidden_states


def model(group: dist.ProcessGroup | None) -> Model:
    torch.manual_seed(0)
    return Model(group).eval().requires_grad_(False)


def calls(num_steps: int = 8, seed: int = 1) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The calls of a generation. The second half of the sequence, which rank 1 holds, changes ten times as much."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randn(1, 3, WIDTH, generator=generator)
    first = torch.randn(1, TOKENS, WIDTH, generator=generator)
    change = torch.randn(1, TOKENS, WIDTH, generator=generator) * 0.02
    change[:, TOKENS // 2 :] *= 10
    return [(first + step * change, torch.tensor([1.0 - step / 20]), prompt) for step in range(num_steps)]


def run(compiled: Callable[..., Tensor], given: list[tuple[Tensor, ...]], before: Callable[[int], None] = bool) -> Any:
    """The outputs of the calls; `before` is called with the number of each."""
    outputs = []
    for step, arguments in enumerate(given):
        before(step)
        outputs.append(compiled(*arguments).clone())
    return outputs


def decisions(module: nn.Module) -> list[str]:
    """The reasons of all sessions of a module, in order."""
    return [reason for stats in cachedit_fx.summary(module, logging=False) for reason in stats.decisions]


def observed(module: nn.Module, outputs: list[Tensor], plain: list[Tensor]) -> dict[str, Any]:
    """The decisions, the diffs of the last session, and the numbers of the calls that equal the plain model's."""
    stats = cachedit_fx.summary(module, logging=False)
    return dict(
        reasons=decisions(module),
        diffs=stats[-1].residual_diffs if stats else {},
        equal=[i for i, (one, other) in enumerate(zip(outputs, plain, strict=True)) if torch.equal(one, other)],
    )


def enabled(threshold: float = 0.5, **fields: Any) -> Model:
    module = model(dist.group.WORLD)
    cachedit_fx.enable_cache(module, **{**FIELDS, "residual_diff_threshold": threshold, **fields})
    return module


def with_change(change: Callable[[nn.Module, int], None], on_rank: int = 1, **fields: Any) -> dict[str, Any]:
    """A generation during which `change` is called on one rank before every step."""
    module, plain = enabled(**fields), run(model(dist.group.WORLD), calls())

    def before(step: int) -> None:
        if dist.get_rank() == on_rank:
            change(module, step)

    return observed(module, run(module, calls(), before), plain)


def check_apart() -> dict[str, Any]:
    """A threshold between the diffs of the two ranks; and the whole model in one process."""
    whole = model(None)
    cachedit_fx.enable_cache(whole, **FIELDS)
    run(whole, calls())
    diffs = cachedit_fx.summary(whole, logging=False)[-1].residual_diffs
    local = model(None)
    halves = [(x.chunk(2, 1)[dist.get_rank()], *others) for x, *others in calls()]
    cachedit_fx.enable_cache(local, **FIELDS)
    run(local, halves)
    threshold = diffs[2]
    module, plain = enabled(threshold * 1.01), run(model(dist.group.WORLD), calls())
    outputs = run(module, calls())
    cachedit_fx.enable_cache(whole, **{**FIELDS, "residual_diff_threshold": threshold * 1.01})
    alone = run(whole, calls())
    return observed(module, outputs, plain) | dict(
        alone=decisions(whole)[-len(alone) :],
        error=max(float((a - b).abs().max()) for a, b in zip(outputs, alone, strict=True)),
        threshold=threshold,
        local=cachedit_fx.summary(local, logging=False)[-1].residual_diffs[2],
    )


def check_new_session() -> dict[str, Any]:
    def forget(module: nn.Module, step: int) -> None:
        if step == 4:
            cachedit_fx.reset()

    return with_change(forget)


def check_bound() -> dict[str, Any]:
    return with_change(lambda module, step: None, max_state_bytes=1 if dist.get_rank() else None)


def check_weights() -> dict[str, Any]:
    def write(module: Any, step: int) -> None:
        if step == 4:
            module.blocks[2].inner.weight.mul_(1.0)

    return with_change(write)


def check_replaced() -> dict[str, Any]:
    def replace(module: Any, step: int) -> None:
        if step == 4:
            module.blocks[2] = model(dist.group.WORLD).blocks[2]

    return with_change(replace)


def check_number() -> dict[str, Any]:
    """A guard on a number in a block of the region fails. Only a computed step checks it, unless all are checked."""

    def write(module: Any, step: int) -> None:
        if step == 5:
            module.blocks[2].scale = 1  # An int.

    return with_change(write, max_continuous_cached_steps=2)


def check_prompt() -> dict[str, Any]:
    """The prompt is written in place on one rank, which does not change the version of an inference tensor."""
    with torch.inference_mode():
        module, plain, given = enabled(), model(dist.group.WORLD), calls()

        def before(step: int) -> None:
            if step == 4 and dist.get_rank():
                given[0][2].add_(1e-4)

        equal = []
        for step, arguments in enumerate(given):
            before(step)
            equal += [step] * torch.equal(module(*arguments), plain(*arguments))
    return dict(equal=equal, reasons=decisions(module))


def check_mask() -> dict[str, Any]:
    mask = [1, 1, 0, 0, 0, 0, 1, 0] if dist.get_rank() else None
    return with_change(lambda module, step: None, steps_computation_mask=mask)


def check_disabled() -> dict[str, Any]:
    def disable(module: nn.Module, step: int) -> None:
        if step == 4:
            cachedit_fx.disable_cache(module)

    found = with_change(disable)
    again = enabled()
    cachedit_fx.disable_cache(again)
    cachedit_fx.enable_cache(again, **FIELDS)
    run(again, calls(4))
    return found | dict(again=decisions(again)[-4:])


def check_shadow() -> dict[str, Any]:
    return with_change(lambda module, step: cachedit_fx.reset() if step == 4 else None, shadow=True)


class Alternating:
    """Computes every second step on rank 1, and reuses on rank 0. Raises an error at one step on rank 1, if asked."""

    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at = fails_at

    def decide(self, step: Any) -> bool:
        if dist.get_rank() and step.number == self.fails_at:
            raise ArithmeticError("the decider fails")
        return bool(dist.get_rank() and step.number % 2)


def check_decider() -> dict[str, Any]:
    found = with_change(lambda module, step: None, decider=Alternating())
    module, given = enabled(decider=Alternating(4)), calls()
    try:
        run(module, given)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found | dict(steps_before_the_error=len(decisions(module)))


@contextmanager
def counted(counts: dict[str, int]) -> Iterator[None]:
    """Counts the collectives, and the tensors that the host reads."""
    original = Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        counts["reads"] += 1
        return original(tensor)

    counts["reads"] = 0
    Tensor.tolist = tolist
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            yield
    finally:
        Tensor.tolist = original
    events = {event.key: event.count for event in profiled.key_averages()}
    names = {key: key.partition("::")[2] for key in events if key.startswith("_c10d_functional::")}
    counts.update({name: events[key] for key, name in names.items() if name != "wait_tensor"})


def check_costs() -> dict[str, Any]:
    """The collectives and the reads of a call of the plain model, and of a computed and a reused step."""
    found: dict[str, Any] = {"plain": {}, "computed": {}, "reused": {}}
    module, given = enabled(max_continuous_cached_steps=1), calls(8)
    plain = torch.compile(model(dist.group.WORLD), backend="eager")
    run(module, given[:4])
    run(plain, given[:4])
    for name, called in (("plain", plain), ("reused", module), ("computed", module)):
        with counted(found[name]):
            called(*given[4 + (name == "computed")])
    return found | dict(reasons=decisions(module))


def check_data_parallel() -> dict[str, Any]:
    """Every rank has its own requests, and a model that communicates with nobody."""
    module, plain = model(None), model(None)
    given = calls(8 if dist.get_rank() else 6, seed=1 + dist.get_rank())
    cachedit_fx.enable_cache(module, **{**FIELDS, "residual_diff_threshold": 1.0 if dist.get_rank() else 0.001})
    counts: dict[str, int] = {}
    with counted(counts):
        outputs = run(module, given)
    return observed(module, outputs, run(plain, given)) | dict(counts=counts)


def check_tensor_parallel() -> dict[str, Any]:
    """Linear layers that are sharded as DTensors; a session is lost on one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(x)))

    mesh = init_device_mesh("cpu", (2,))

    def parallel() -> Model:
        module = model(None)
        for block in module.blocks:
            block.inner = Mlp()
            block.requires_grad_(False)
            parallelize_module(block.inner, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return module

    torch.manual_seed(0)
    plain = run(parallel(), calls())
    torch.manual_seed(0)
    module = parallel()
    cachedit_fx.enable_cache(module, **FIELDS)

    def before(step: int) -> None:
        if step == 4 and dist.get_rank():
            cachedit_fx.reset()

    return observed(module, run(module, calls(), before), plain)


def check_two_groups() -> dict[str, Any]:
    """The exchange over two groups, one after the other: the sums are those of all ranks, and any difference counts."""
    from cachedit_fx.passes.transforms.exchange import exchange

    rank, other = dist.get_rank(), dist.new_group([0, 1])
    groups = tuple((group.group_name, 2) for group in (dist.group.WORLD, other))
    parts = torch.tensor([1.0 + rank, 3.0]), torch.tensor([4.0, 2.0 + rank])

    def exchanged(state: float, asks: float = 0.0, time: float = 0.5, checksum: float = 7.0) -> list[float]:
        fingerprint, now = torch.tensor([asks, state, 1.0, 7.0]), [torch.tensor(time)]
        return exchange(fingerprint, now, [torch.tensor(checksum)], parts, groups).tolist()

    return dict(
        same=exchanged(5.0),
        state=exchanged(5.0 + rank),
        asks=exchanged(5.0, asks=float(rank)),
        time=exchanged(5.0, time=0.5 + rank),
        checksum=exchanged(5.0, checksum=7.0 + rank),
        changed=exchanged(5.0, checksum=8.0),
        no_number=exchanged(5.0, time=float("nan")),
    )


def check_sharded() -> dict[str, Any]:
    """FSDP2 around the whole model, and around every block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    plain = run(model(None), calls())

    def sharded(*, blocks: bool) -> Model:
        module = model(None)
        for block in module.blocks if blocks else ():
            fully_shard(block, mesh=mesh)
        return fully_shard(module, mesh=mesh)

    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger("cachedit_fx").addHandler(handler)
    found: dict[str, Any] = {}
    for name, blocks in (("whole", False), ("blocks", True)):
        torch._dynamo.reset()
        module = sharded(blocks=blocks)
        cachedit_fx.enable_cache(module, **FIELDS)
        found[name] = observed(module, run(module, calls()), plain)
    run(torch.compile(sharded(blocks=True), backend="cachedit", options=FIELDS), calls(1))
    logging.getLogger("cachedit_fx").removeHandler(handler)
    return found | dict(text=logged.getvalue())


def recorded(tiny: Any) -> tuple[list[dict[str, Any]], Any]:
    """The arguments of the calls of a transformer in its pipeline, and the transformer."""
    given: list[dict[str, Any]] = []
    pipe = tiny.build(num_blocks=2)
    hook = pipe.transformer.register_forward_pre_hook(lambda _m, _a, kw: given.append(dict(kw)), with_kwargs=True)
    tiny.run(pipe, num_steps=4)
    hook.remove()
    return given, pipe.transformer


def check_pipelines() -> dict[str, Any]:
    """FLUX, Qwen-Image and Wan under the context parallelism of diffusers, and by the reference in one process."""
    from diffusers import ContextParallelConfig

    from tests import tiny_pipelines
    from tests.reference import ReferenceCache
    from tests.tiny_pipelines import PIPELINES

    # The sequences have to be divisible by the number of ranks. Two prompts of one length need one graph.
    tiny_pipelines._embeddings.__defaults__ = (8,)
    tiny_pipelines._padding_mask.__defaults__ = (8,)
    tiny_pipelines.NEGATIVE_TEXT = 8
    torch.accelerator.device_count = lambda: 2  # diffusers divides by it, and it is 0 on a CPU.
    fields = {**FIELDS, "max_continuous_cached_steps": 1, "forecaster": None}
    both = ("encoder_hidden_states", "hidden_states")
    streams = {"flux": both, "qwen_image": both, "wan": ("hidden_states",)}
    found = {}
    for name, names in streams.items():
        given, alone = recorded(PIPELINES[name])
        lists = [getattr(alone, path, ()) for path in ("blocks", "transformer_blocks", "single_transformer_blocks")]
        blocks = [(block, names) for one in lists for block in one]
        settings = {key: value for key, value in fields.items() if key != "inner_backend"}
        with ReferenceCache(alone, blocks, Fn_compute_blocks=1, **settings) as reference:
            for kw in given:
                reference(id(kw["encoder_hidden_states"]), **kw)
        records = reference.records
        branches = dict.fromkeys(record.guidance_branch for record in records)
        modules: list[Any] = [PIPELINES[name].build(num_blocks=2).transformer for _ in range(2)]
        for module in modules:
            module.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        cachedit_fx.enable_cache(modules[0], **fields)
        cached, plain = [[module(**{**kw, "return_dict": False})[0] for kw in given] for module in modules]
        found[name] = observed(modules[0], cached, plain) | dict(
            error=max(
                float((ours - record.output).abs().max() / record.output.abs().max())
                for ours, record in zip(cached, records, strict=True)
            ),
            alone=[record.reason for branch in branches for record in records if record.guidance_branch == branch],
            computed=[i for i, record in enumerate(records) if not record.reused],
        )
    return found


def check_end() -> dict[str, Any]:
    """Rank 1 raises an error between two steps, and its process ends. It has to be the last check."""
    module = enabled()
    start = time.monotonic()

    def before(step: int) -> None:
        if step == 3 and dist.get_rank():
            os._exit(1)
        nonlocal start
        start = time.monotonic()

    try:
        run(module, calls(), before)
    except Exception as error:
        return dict(error=f"{type(error).__name__}: {error}", seconds=time.monotonic() - start)
    return {}


def _rank(rank: int, folder: Path, names: list[str]) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=TIMEOUT)
    for name in names:
        start = time.process_time()
        torch._dynamo.reset()
        cachedit_fx.reset()
        with torch.no_grad():
            found = globals()[f"check_{name}"]()
        torch.save(found, folder / f"{name}.{rank}")
        if rank == 0:
            print(f"{name}: {time.process_time() - start:.1f} s", flush=True)
    os._exit(0)  # Without waiting for the other rank, which may have ended.


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if "pipelines" in names:
        import tests.tiny_pipelines  # noqa: F401  # Before the processes are forked.
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            _rank(rank, folder, names)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("exit codes", codes)


if __name__ == "__main__":
    main()
