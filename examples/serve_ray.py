"""Serves a diffusers pipeline with the cache on Ray Serve: several replicas, streaming, cancellation, metrics.

    python -m examples.serve_ray                     # starts Ray here, checks every image, measures, stops
    serve run examples.serve_ray:app replicas=4      # the same application on a cluster

Routes: `POST /generate` returns JSON, `POST /stream` sends an event after every step, `DELETE /requests/{id}` cancels.
docs/serving.md describes them, the metrics, and what to set for other models.
"""

# Without `from __future__ import annotations`: FastAPI reads the annotations of the routes.
import argparse
import asyncio
import base64
import dataclasses
import json
import logging
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import requests
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve import metrics
from ray.serve.exceptions import RequestCancelledError

from examples.replica import DIGITS, Event, Outcome, Replica, Request

api = FastAPI(title="cachedit_fx on Ray Serve")


@serve.deployment(max_ongoing_requests=1, health_check_period_s=10)
class Painter:
    """A replica, which serves one request at a time. Ray Serve queues the others for the next free replica."""

    def __init__(self, **options: Any) -> None:
        self.replica = Replica(**options)
        # Ray exports these with the prefix `ray_`, and adds labels for the deployment and the replica.
        self.requests = metrics.Counter("cachedit_requests_total", "Requests that ended.", tag_keys=("outcome",))
        self.calls = metrics.Counter("cachedit_calls_total", "Calls of the transformers.", tag_keys=("decision",))
        self.reasons = metrics.Counter("cachedit_decisions_total", "Decisions by reason.", tag_keys=("reason",))
        bounds = [0.05 * 2**i for i in range(12)]
        self.seconds = metrics.Histogram("cachedit_request_seconds", "Time of a request.", bounds, ("outcome",))
        self.replica.observe = self.observe

    def observe(self, ended: Outcome) -> None:
        self.requests.inc(tags={"outcome": ended.outcome})
        self.seconds.observe(ended.seconds, tags={"outcome": ended.outcome})
        for decision, number in ended.calls.items():
            if number:
                self.calls.inc(number, tags={"decision": decision})
        for reason, number in Counter(reason for entry in ended.decisions for reason in entry["decisions"]).items():
            self.reasons.inc(number, tags={"reason": reason})

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        async for event in self.replica.stream(request):
            if "outcome" in event:
                event |= {"replica": os.getpid(), "start_seconds": self.replica.start_seconds}
            yield event

    def check_health(self) -> None:  # Ray Serve calls this, and restarts a replica for which it raises an error.
        self.replica.check_health()


@serve.deployment(max_ongoing_requests=1000)
@serve.ingress(api)
class Api:
    """The HTTP routes. A client that disconnects cancels its request, as Ray Serve passes this on to the replica."""

    def __init__(self, painter: Any) -> None:
        self.painter = painter.options(stream=True)
        self.running: dict[str, Any] = {}

    async def events(self, request: Request) -> AsyncIterator[Event]:
        """The events of one request; the last one is the result."""
        request = dataclasses.replace(request, id=request.id or uuid.uuid4().hex)
        if request.id in self.running:
            raise HTTPException(409, f"a request with the id {request.id!r} is running")
        self.running[request.id] = response = self.painter.generate.remote(request)
        try:
            yield {"id": request.id}
            async for event in response:
                yield event
        except (RequestCancelledError, asyncio.CancelledError):
            if self.running.get(request.id) is response:  # The client has disconnected.
                raise
            yield {"id": request.id, "outcome": "cancelled"}
        except ValueError as error:
            raise HTTPException(422, str(getattr(error, "cause", error))) from None
        finally:
            if self.running.get(request.id) is response:
                del self.running[request.id]

    @api.post("/generate")
    async def generate(self, request: Request) -> Event:
        event: Event = {}
        async for last in self.events(request):
            event = last
        if event["outcome"] == "cancelled":
            raise HTTPException(409, "the request was cancelled")
        return event

    @api.post("/stream")
    async def stream(self, request: Request) -> StreamingResponse:
        events = self.events(request)
        first = [await anext(events), await anext(events)]  # A request that is refused gets its own status code.

        async def lines() -> AsyncIterator[str]:
            for event in first:
                yield f"data: {json.dumps(event)}\n\n"
            async for event in events:
                yield f"data: {json.dumps(event)}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    @api.delete("/requests/{id}")
    async def cancel(self, id: str) -> None:
        response = self.running.pop(id, None)
        if response is None:
            raise HTTPException(404, f"no request with the id {id!r} is running")
        response.cancel()


def app(options: dict[str, str]) -> serve.Application:
    """The application.

    Args:
        options: `replicas` and `gpus` (per replica), and arguments of `Replica`: `model`, `artifacts` (a path),
            `is_cached` ("true" or "false"), `inner_backend` and `threads`.
    """
    given: dict[str, Any] = {**options}
    replicas, gpus = int(given.pop("replicas", 2)), float(given.pop("gpus", 0))
    kinds = {"artifacts": Path, "threads": int, "is_cached": lambda text: text == "true"}
    given = {name: kinds.get(name, str)(value) for name, value in given.items()}
    painter = Painter.options(num_replicas=replicas, ray_actor_options={"num_cpus": 1, "num_gpus": gpus})
    return Api.options(ray_actor_options={"num_cpus": 0}).bind(painter.bind(**given))


class Client:
    """Sends requests to the server, and compares the images with those that a replica makes alone."""

    def __init__(self, url: str, alone: Replica, sent: list[Request], out: Path) -> None:
        self.url, self.sent, self.out = url, sent, out
        self.alone = [alone.generate(request)["sha256"] for request in sent]

    def send(self, request: Request) -> Event:
        response = requests.post(f"{self.url}/generate", json=dataclasses.asdict(request), timeout=600)
        if not response.ok:
            raise SystemExit(f"{request}: {response.status_code} {response.text}")
        return response.json()

    def send_all(self) -> tuple[list[Event], float]:
        """Sends all requests at the same time. Returns the results, and the number of images per second.

        Raises:
            SystemExit: An image differs from the one that was made alone.
        """
        started = time.perf_counter()
        with ThreadPoolExecutor(len(self.sent)) as pool:
            results = [*pool.map(self.send, self.sent)]
        seconds = time.perf_counter() - started
        for request, result, alone in zip(self.sent, results, self.alone, strict=True):
            if result["sha256"] != alone:
                raise SystemExit(f"the image of {request} differs from the one that was made alone: {result}")
        return results, len(results) / seconds

    def cancel(self, *, by_request: bool) -> None:
        """Cancels a long request after its third step: by another request, or by closing the connection."""
        long = dataclasses.replace(self.sent[0], steps=1000, id="long")
        with requests.post(f"{self.url}/stream", json=dataclasses.asdict(long), stream=True, timeout=600) as response:
            events = (json.loads(line[6:]) for line in response.iter_lines(chunk_size=None) if line)
            next(event for event in events if event.get("step") == 3)
            if by_request:
                requests.delete(f"{self.url}/requests/long", timeout=60).raise_for_status()
                assert [*events][-1] == {"id": "long", "outcome": "cancelled"}

    def show(self, results: list[Event]) -> None:
        """Prints a line for every result, and writes the images."""
        print("prompt             size   seed  steps  reused  seconds  replica")
        for number, (request, result) in enumerate(zip(self.sent, results, strict=True)):
            size = f"{request.height}x{request.width}" if request.height else "-"
            print(
                f"{request.prompt:<17}  {size:<5}  {request.seed:>4}  {request.steps:>5}  "
                f"{result['calls']['reused']:>6}  {result['seconds']:>7.2f}  {result['replica']:>7}"
            )
            (self.out / f"{number}.png").write_bytes(base64.b64decode(result["image"]))


def print_metrics(**expected: int) -> None:
    """Prints what Ray exports for Prometheus, summed over the replicas, which report every few seconds.

    Args:
        expected: The numbers of requests by outcome.

    Raises:
        SystemExit: The metrics have not reached these numbers after a minute.
    """
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    for _ in range(60):
        totals: Counter[str] = Counter()
        for family in text_string_to_metric_families(requests.get(url, timeout=60).text):
            for sample in family.samples:
                label = "".join(sample.labels.get(name, "") for name in ("decision", "outcome", "reason"))
                if sample.name.startswith("ray_cachedit_") and "le" not in sample.labels:
                    totals[f"{sample.name}{{{label}}}"] += sample.value
        if all(totals[f"ray_cachedit_requests_total{{{name}}}"] == number for name, number in expected.items()):
            break
        time.sleep(1)
    else:
        raise SystemExit(f"expected {expected}, but the metrics are {dict(totals)}")
    print("\n".join(f"{name} {value:g}" for name, value in sorted(totals.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a pipeline of diffusers; by default, the digits model")
    parser.add_argument("--inner-backend", default="inductor", help="the torch.compile backend")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--requests", type=int, default=8, help="requests that are sent at the same time")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps of most requests")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("demo-output/serve"), help="folder for the images")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = {"model": arguments.model, "inner_backend": arguments.inner_backend}
    sent = [
        Request(
            f"the digit {DIGITS[i % 10]}",
            height=None if arguments.model else 8,
            width=None if arguments.model else (8, 8, 12)[i % 3],
            seed=i,
            steps=arguments.steps + 4 * (i % 2),
        )
        for i in range(arguments.requests)
    ]
    throughput: dict[bool, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/here"
        environment = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/replicas"}  # Nothing is compiled there yet.
        ray.init(
            num_cpus=arguments.replicas,
            include_dashboard=False,
            runtime_env={"env_vars": environment},
            log_to_driver=False,
            logging_level="warning",
        )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"port": arguments.port})
        for is_cached in (True, False):
            print(f"\n{'With' if is_cached else 'Without'} the cache")
            alone = Replica(**options, is_cached=is_cached)
            artifacts = Path(folder) / f"artifacts-{is_cached}"
            client = Client(f"http://127.0.0.1:{arguments.port}", alone, sent, arguments.out)
            size = alone.save(artifacts)  # After all sizes have been served: a forecaster is compiled for each.
            print(f"a replica that compiles starts in {alone.start_seconds:.1f} s; saved {size / 2**20:.1f} MiB")
            shared = {"replicas": str(arguments.replicas), "artifacts": str(artifacts)}
            serve.run(app({**options, **shared, "is_cached": str(is_cached).lower()}))
            results, _ = client.send_all()
            starts = {result["replica"]: result["start_seconds"] for result in results}
            print(f"replicas that load it start in {', '.join(f'{one:.1f} s' for one in starts.values())}")
            if is_cached:
                client.show(results)
                client.cancel(by_request=True)
                client.cancel(by_request=False)
                print("two requests cancelled at their third step")
            _, throughput[is_cached] = client.send_all()
            print(f"{2 * len(sent)} images equal those made alone, bit for bit")
            if is_cached:
                print_metrics(done=2 * len(sent), cancelled=2)
            serve.delete("default")
        serve.shutdown()
        ray.shutdown()
    print(f"\nimages per second: {throughput[True]:.2f} with the cache, {throughput[False]:.2f} without")


if __name__ == "__main__":
    main()
