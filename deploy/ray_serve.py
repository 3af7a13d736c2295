"""Serves a model with Ray Serve: replicas of `jamba serve`, autoscaling, and routing by prefixes.

    pip install 'jamba-server[ray]'
    serve run deploy.ray_serve:build model=/models/model max_replicas=8

`Front` takes HTTP requests and hands them to a replica, which `PrefixRouter` chooses. A replica (`Replica`) runs
`jamba serve` as a child process on a port of the loopback interface, so that everything this server does about dying
engines, slow clients and shutdown is the same as without Ray. If a whole replica dies, its requests fail and the client
has to send them again.
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import StreamingResponse

from jamba_server.engine.process.connection import end_with_parent
from jamba_server.engine.replicas.known_prefixes import KnownPrefixes, prefix_keys
from jamba_server.engine.replicas.routing import MISSING_WEIGHT, TOKENS_PER_REPLY

START_SECONDS = 1800.0  # a replica that has not loaded the model after this time has failed to start
DRAIN_SECONDS = 50.0  # as long as `jamba serve` takes at most from SIGTERM to its end, with its default options
# A replica is added when more choices than this wait, or more run, on average.
WAITING_EACH, RUNNING_EACH = 4, 48
BYTES_PER_TOKEN = 4  # of the text of a request, about
# Headers that belong to one connection, and are not passed on.
HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length"})


def start_server(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    options = ["--host", "127.0.0.1", "--port", "0", "--metrics-public"]
    return subprocess.Popen(
        [sys.executable, "-m", "jamba_server", "serve", *arguments, *options],
        preexec_fn=end_with_parent,  # the server must not outlive a replica that is killed
    )


class Replica:
    """One `jamba serve`. `arguments` are those of its command line."""

    async def __init__(self, arguments: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        address = Path(self._folder.name) / "address"
        self._process = start_server([*arguments, "--address-file", str(address)])
        async with asyncio.timeout(START_SECONDS):
            while not address.exists():
                self._check_process()
                await asyncio.sleep(0.1)
            # A stream may be silent for as long as the client's request allows.
            self._http = httpx.AsyncClient(base_url=address.read_text().strip(), timeout=None)
            while not await self._is_ready():
                self._check_process()
                await asyncio.sleep(0.2)

    async def serve(
        self, method: str, url: str, headers: list[tuple[str, str]], body: bytes
    ) -> AsyncGenerator[tuple[int, list[tuple[str, str]]] | bytes]:
        """Passes a request on. Yields the status and the headers of the reply, and then its body in pieces as they
        come."""
        async with self._http.stream(method, url, headers=headers, content=body) as reply:
            yield reply.status_code, passed_on(reply.headers.multi_items())
            async for piece in reply.aiter_raw():
                yield piece

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises an error."""
        self._check_process()
        (await self._http.get("/live", timeout=10)).raise_for_status()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns how many choices wait, and how many run, each of which holds a state."""
        families = text_string_to_metric_families((await self._http.get("/metrics", timeout=10)).text)
        found = {sample.name: sample.value for family in families for sample in family.samples}
        return {"waiting": found["jamba_num_requests_waiting"], "running": found["jamba_num_requests_running"]}

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is None:
            return
        process.terminate()  # the server finishes what runs
        try:
            process.wait(DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._folder.cleanup()

    def _check_process(self) -> None:
        if (status := self._process.poll()) is not None:
            raise RuntimeError(f"jamba serve has ended with status {status}")

    async def _is_ready(self) -> bool:
        try:
            return (await self._http.get("/ready", timeout=10)).status_code == 200
        except httpx.TransportError:
            return False


class Front:
    """Takes HTTP requests. It reads the whole body, because the prefix of the prompt decides where the request goes."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(method_name="serve", stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        url = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = passed_on([(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw])
        pieces: Any = self._replicas.remote(request.method, url, headers, await request.body())
        status, found = await anext(aiter(pieces))
        reply = StreamingResponse(pieces, status)
        reply.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in found]
        return reply


class PrefixRouter(FIFOMixin, RequestRouter):
    """Sends a request to the replica that probably has most of its prompt cached, unless it has much more to do than
    another: the rule of `engine/replicas/routing.py`, on the text of the request instead of its tokens.

    Ray tells how many requests a replica has. It asks the next replica if the best one takes no more requests.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        del kwargs
        self._known: dict[ReplicaID, KnownPrefixes] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        text = prompt_text(pending_request)
        keys = prefix_keys(text, "")

        def cost(replica: RunningReplica) -> tuple[float, str]:
            known = self._known.get(replica.replica_id)
            missing = (len(text) - (known.longest(keys) if known else 0)) / BYTES_PER_TOKEN
            replies = self.replica_queue_len_cache.get(replica.replica_id) or 0
            return MISSING_WEIGHT * missing + TOKENS_PER_REPLY * replies, str(replica.replica_id)

        return [[replica] for replica in sorted(candidate_replicas, key=cost)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        del result
        self._known.setdefault(replica_id, KnownPrefixes()).add(prefix_keys(prompt_text(pending_request), ""))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._known.pop(replica_id, None)


def prompt_text(request: PendingRequest | None) -> list[int]:
    """Returns the bytes of what decides how the prompt of a request begins, or nothing for other requests."""
    if request is None or len(request.args) < 4:
        return []
    try:
        body = json.loads(request.args[3])
        found = [
            body[name] for name in ("tools", "instructions", "system", "messages", "input", "prompt") if name in body
        ]
    except (ValueError, TypeError):
        return []
    return list(json.dumps(found, ensure_ascii=False).encode())


def passed_on(headers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]


def wanted_replicas(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Returns how many replicas there should be: by the choices that wait, and by the states in use. One replica at a
    time is taken away, because its prefix cache is lost."""
    totals = {name: sum(values.values()) for name, values in (context.aggregated_metrics or {}).items()}
    waiting, running = totals.get("waiting", 0.0), totals.get("running", 0.0)
    wanted = math.ceil(max(waiting / WAITING_EACH, (running + waiting) / RUNNING_EACH))
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return min(most, max(least, wanted, context.target_num_replicas - 1)), {}


def build(args: dict[str, Any]) -> Application:
    """Returns the application. `args` may have `model`, `min_replicas`, `max_replicas`, `num_cpus` and `num_gpus` of a
    replica, and `options`, which are further options of `jamba serve` as one text."""
    known = {"model", "min_replicas", "max_replicas", "num_cpus", "num_gpus", "options"}
    if unknown := {*args} - known:
        raise ValueError(f"{sorted(unknown)} is not known; the arguments are {sorted(known)}.")
    arguments = [*([str(args["model"])] if "model" in args else []), *str(args.get("options", "")).split()]
    replica = serve.deployment(
        Replica,
        ray_actor_options={"num_cpus": float(args.get("num_cpus", 1)), "num_gpus": float(args.get("num_gpus", 0))},
        max_ongoing_requests=1024,  # the server has a queue of its own, with limits and turns
        graceful_shutdown_timeout_s=DRAIN_SECONDS + 10,
        health_check_period_s=5,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        autoscaling_config=AutoscalingConfig(
            min_replicas=int(args.get("min_replicas", 1)),
            initial_replicas=int(args.get("min_replicas", 1)),
            max_replicas=int(args.get("max_replicas", 1)),
            policy=AutoscalingPolicy(policy_function=wanted_replicas),
        ),
    )
    front = serve.deployment(Front, max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0})
    return front.bind(replica.bind(arguments))
