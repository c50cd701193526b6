"""`examples/replica.py` serves every request as if it were alone, and `examples/serve_ray.py` does so on Ray Serve."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline
from PIL import Image
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.utils import fresh_cache

import cachedit_fx
from examples.digits.model import unpatchify
from examples.replica import DigitsModel, Event, Outcome, Replica, Request, encoded
from tests import tiny
from tests.idle import counts
from tests.tiny_pipelines import PIPELINES

ROOT = Path(__file__).parent.parent
SENT = [
    Request("seven", seed=1, steps=8),
    Request("the digit 3", height=10, seed=2, steps=9),
    Request("seven", width=12, seed=3, steps=10),
    Request("zero", seed=1, steps=8),
]
graphs = pytest.mark.shares_graphs("serving")


@functools.cache
def started() -> Replica:
    return Replica(inner_backend="eager", first=Request("zero", steps=6))


@pytest.fixture
def replica(fresh_state: None) -> Replica:
    """A replica of the digits model, which all tests share, as nothing of a request remains in it."""
    return started()


@pytest.fixture
def outcomes(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    found: list[Outcome] = []
    monkeypatch.setattr(replica, "observe", found.append)
    return found


async def events_of(replica: Replica, request: Request) -> list[Event]:
    return [event async for event in replica.stream(request)]


def alone(replica: Replica, request: Request) -> str:
    """The digest of the image that a request gives when nothing else has run."""
    cachedit_fx.reset()
    return replica.generate(request)["sha256"]


@graphs
def test_requests_at_the_same_time_give_the_images_that_they_give_alone(replica: Replica):
    expected = [alone(replica, request) for request in SENT]

    async def at_once() -> list[list[Event]]:
        return await asyncio.gather(*(events_of(replica, request) for request in SENT))

    found = asyncio.run(at_once())
    assert [events[-1]["sha256"] for events in found] == expected
    for request, events in zip(SENT, found, strict=True):
        assert [event["step"] for event in events[:-1]] == [*range(1, request.steps + 1)]
    assert len({*expected}) == len(SENT)


@graphs
def test_computed_steps_give_the_image_of_the_pipeline_itself(replica: Replica):
    request, model = Request("five", seed=4, steps=4), DigitsModel()  # 4 steps are warm-up.
    model.pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(request.seed)
    tokens = model.pipe(**model.arguments(request), num_inference_steps=4, generator=noise).images
    pixels = model.pixels(tokens, request)
    assert replica.generate(request)["sha256"] == encoded(pixels)["sha256"]
    assert (pixels == ((unpatchify(tokens)[0].clamp(-1, 1) + 1) / 2).numpy()).all()


@graphs
def test_the_result_holds_the_image_and_the_decisions_of_the_cache(replica: Replica, outcomes: list[Outcome]):
    result = replica.generate(Request("nine", width=12, steps=14, id="mine"))
    (entry,) = result["decisions"]
    assert (result["id"], result["outcome"], len(entry["decisions"])) == ("mine", "done", 14)
    reused = len(entry["cached_steps"])
    assert result["calls"] == {"computed": 14 - reused, "reused": reused, "uncached": 0} and reused > 0
    assert entry["decisions"].count("diff-below") == reused
    assert [(one.outcome, one.calls, one.decisions) for one in outcomes] == [("done", result["calls"], [entry])]
    assert Image.open(io.BytesIO(base64.b64decode(result["image"]))).size == (16 * 12, 16 * 8)


@graphs
def test_a_cancelled_generation_stops_at_its_next_step_and_the_next_request_is_right(
    replica: Replica, outcomes: list[Outcome]
):
    is_cancelled = threading.Event()

    def emit(event: Event) -> None:
        if event["step"] == 6:
            is_cancelled.set()

    result = replica._thread.submit(replica._generate, Request("seven", seed=9, steps=100), emit, is_cancelled).result()
    assert result["outcome"] == outcomes[0].outcome == "cancelled" and "image" not in result
    assert sum(result["calls"].values()) == 6
    again = replica.generate(SENT[0])["sha256"]  # The same prompt, in the same replica.
    assert again == alone(replica, SENT[0])
    replica.check_health()


@graphs
def test_a_client_that_leaves_cancels_its_request_also_while_it_waits(replica: Replica, outcomes: list[Outcome]):
    async def leave() -> str:
        running, waiting = replica.stream(Request("two", steps=1000)), replica.stream(Request("three", steps=1000))
        await anext(running)
        waits = asyncio.ensure_future(anext(waiting))
        await asyncio.sleep(0)  # It is in the queue now.
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        await running.aclose()
        return (await events_of(replica, SENT[0]))[-1]["sha256"]

    digest = asyncio.run(leave())
    first, second, third = outcomes
    assert first.outcome == second.outcome == "cancelled" and third.outcome == "done"
    assert 1 <= sum(first.calls.values()) < 1000 and sum(second.calls.values()) == 0
    assert digest == alone(replica, SENT[0])


@graphs
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a cat"), "must name one digit"),
        (Request("one or two"), "must name one digit"),
        (Request("one", height=7), "must be even, got 7 and 8"),
    ],
)
def test_a_request_that_the_model_cannot_serve_is_refused(replica, outcomes, request_, message):
    with pytest.raises(ValueError, match=message):
        asyncio.run(events_of(replica, request_))
    assert [one.outcome for one in outcomes] == ["refused"]
    replica.check_health()


@pytest.mark.parametrize("field", ["height", "width", "steps"])
def test_a_request_with_a_number_out_of_range_cannot_be_made(field: str):
    with pytest.raises(ValueError, match=rf"{field} must be from 1 to \d+, got 0"):
        Request("one", **{field: 0})


@graphs
def test_a_replica_is_unhealthy_after_a_failure_until_a_request_succeeds(replica, outcomes, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(replica._model, "pixels", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            replica.generate(SENT[0])
    assert [one.outcome for one in outcomes] == ["failed"]
    with pytest.raises(RuntimeError, match="the last generation failed"):
        replica.check_health()
    assert replica.generate(SENT[0])["sha256"] == alone(replica, SENT[0])
    replica.check_health()


@graphs
def test_a_replica_whose_generation_makes_no_step_is_unhealthy(replica: Replica, monkeypatch: pytest.MonkeyPatch):
    healthy: list[str] = []

    def check(_request: Request) -> Any:
        monkeypatch.setattr(replica, "stall_seconds", -1.0)
        try:
            replica.check_health()
        except RuntimeError as error:
            healthy.append(str(error))
        raise ValueError

    monkeypatch.setattr(replica._model, "arguments", check)
    with pytest.raises(ValueError):
        replica.generate(SENT[0])
    assert healthy == ["the running generation has made no step for more than -1.0 s"]
    replica.check_health()  # Nothing runs.


def test_a_pipeline_with_an_autoencoder_is_served(monkeypatch: pytest.MonkeyPatch):
    pipe = PIPELINES["flux"].build(2)
    blocks = dict(down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"])
    vae = AutoencoderKL(latent_channels=16, block_out_channels=[4], norm_num_groups=2, shift_factor=0.0, **blocks)

    class Prompted(FluxPipeline):
        def encode_prompt(self, prompt: str, **_others: Any) -> tuple[torch.Tensor, ...]:
            given = PIPELINES["flux"].inputs(len(prompt))
            return given["prompt_embeds"], given["pooled_prompt_embeds"], torch.zeros(7, 3)

    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    served = Prompted(scheduler=pipe.scheduler, transformer=pipe.transformer, vae=vae.eval(), **absent)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda name, **_: {"tiny": served}[name])
    request = Request("a cat", height=16, width=32, steps=6)
    replica = Replica("tiny", inner_backend="eager", first=request)
    result = replica.generate(request)
    assert result["calls"]["computed"] + result["calls"]["reused"] == 6
    assert Image.open(io.BytesIO(base64.b64decode(result["image"]))).mode == "RGB"
    assert result["sha256"] == replica.generate(request)["sha256"] != replica.generate(SENT[1])["sha256"]


class Layer(torch.nn.Linear):
    def forward(self, hidden_states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return hidden_states + scale * super().forward(hidden_states)


class Stack(torch.nn.Module):
    """Few kernels, which compile fast."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(8, 8) for _ in range(2))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, timestep[:, None, None])
        return hidden_states


def test_saved_graphs_are_loaded_instead_of_compiling(tmp_path: Path):
    file, model, noise = tmp_path / "artifacts", tiny.frozen(Stack()), torch.randn(1, 4, 8)
    mask = dict(steps_computation_mask=[1, 0, 1, 0], steps_computation_policy="static", Fn_compute_blocks=0)
    cachedit_fx.enable_cache(model, **mask, forecaster=None)

    def run() -> list[torch.Tensor]:
        torch._dynamo.reset()
        PyCodeCache.cache_clear(purge=True)
        counters.clear()
        with torch.no_grad():
            return [model(noise, torch.tensor([time])) for time in (1.0, 0.9, 0.8, 0.7)]

    # Otherwise, Inductor also compiles a test of the processor.
    with inductor.patch({"cpp.vec_isa_ok": True}), fresh_cache():
        expected = run()
        compiled = counters["inductor"]["fxgraph_cache_miss"]
        cachedit_fx.save_compiled(model, file)
    with inductor.patch({"cpp.vec_isa_ok": True}), fresh_cache():
        cachedit_fx.disable_cache(model)
        cachedit_fx.enable_cache(model, **mask, forecaster=None)
        assert cachedit_fx.load_compiled(model, file)
        kernels = {*Path(cache_dir()).rglob("*.so")}
        loaded = run()
        assert {*Path(cache_dir()).rglob("*.so")} == kernels
        found = counters["inductor"]
        assert (found["fxgraph_cache_miss"], found["fxgraph_cache_hit"]) == (0, compiled) and compiled > 0
        assert not counters["stats"]["unique_graphs"]  # Dynamo traced nothing.
    tiny.assert_bitwise(loaded, expected)
    assert counts(model).reused == 2


@pytest.mark.slow
def test_the_example_on_ray_serves_cancels_and_counts(tmp_path: Path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install -c constraints.txt '.[serve]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = ["--inner-backend", "eager", "--requests", "4", "--steps", "12", "--port", str(port)]
    command = [sys.executable, "-m", "examples.serve_ray", *small, "--out", str(tmp_path / "out")]
    environment = os.environ | {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}  # Ray writes a token there.
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("8 images equal those made alone, bit for bit") == 2
    assert "ray_cachedit_requests_total{cancelled} 2" in run.stdout
    assert re.search(r"ray_cachedit_calls_total\{reused\} [1-9]", run.stdout)
    assert len([*(tmp_path / "out").glob("*.png")]) == 4
