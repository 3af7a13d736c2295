"""Serves one model on several machines of a Ray cluster.

    pip install 'jamba-server[ray]'
    python -m deploy.ray_ranks --nodes 2 --gpus 8 -- /models/model --tensor-parallel-size 8 --pipeline-parallel-size 2

What follows `--` are arguments of `jamba serve`. The program reserves a placement group with a bundle for each node,
and starts an actor in each bundle. An actor runs `jamba serve` as a child process with `--nnodes`, `--node-rank` and
`--master-addr`, and this starts the node's ranks. If an actor or its server ends, the program starts another one in the
same bundle, which joins again. If node 0 ends, everything ends.
"""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.util import get_node_ip_address, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from jamba_server.engine.process.connection import end_with_parent

logger = logging.getLogger(__name__)

BUNDLES_SECONDS = 600.0  # the cluster must have room for all bundles within this time
DRAIN_SECONDS = 50.0  # as long as `jamba serve` takes at most from SIGTERM to its end, with its default options
CALL_SECONDS = 60.0  # an actor that does not answer within this time counts as lost
POLL_SECONDS = 1.0


class Node:
    """Runs `jamba serve` on a machine of the cluster. The server ends with this actor."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def address(self) -> str:
        return get_node_ip_address()

    def start(self, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jamba_server", "serve", *arguments],
            preexec_fn=end_with_parent,  # the server must not outlive an actor that is killed
        )

    def status(self) -> int | None:
        """Returns the exit status of the server, or None while it runs."""
        assert self._process is not None, "`start` was called"
        return self._process.poll()

    def stop(self) -> int:
        """Lets the server finish what runs, and returns its exit status."""
        assert self._process is not None, "`start` was called"
        self._process.terminate()
        try:
            return self._process.wait(DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class Cluster:
    """The nodes of one server. `arguments` are those of `jamba serve`. `bundle` has the resources of a node, such as
    {"CPU": 8, "GPU": 8}. The `strategy` STRICT_SPREAD puts each node on a machine of its own."""

    def __init__(
        self, arguments: Sequence[str], nodes: int, bundle: dict[str, float], strategy: str = "STRICT_SPREAD"
    ) -> None:
        self._arguments, self._count, self._bundle = arguments, nodes, bundle
        self._group = placement_group([bundle] * nodes, strategy=strategy)
        self._nodes: list[Any] = []

    def start(self) -> None:
        """Starts all nodes. Raises GetTimeoutError if the cluster has no room for them."""
        ray.get(self._group.ready(), timeout=BUNDLES_SECONDS)
        self._nodes = [self._actor(node) for node in range(self._count)]
        self._address = ray.get(self._nodes[0].address.remote(), timeout=CALL_SECONDS)
        for node in range(self._count):
            self._serve(node)

    def check(self) -> int | None:
        """Starts nodes again whose actor or server has ended. Returns the exit status of node 0 if that has ended."""
        for node in range(self._count):
            try:
                status = ray.get(self._nodes[node].status.remote(), timeout=CALL_SECONDS)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                status = 1
            if status is None:
                continue
            if node == 0:
                return status
            logger.warning("node %d has ended with status %d; it is started again", node, status)
            ray.kill(self._nodes[node])
            self._nodes[node] = self._actor(node)
            self._serve(node)
        return None

    def stop(self) -> list[int]:
        """Ends node 0, and with it all others. Returns the exit statuses of the nodes that still ran."""
        statuses: list[int] = []
        for node in self._nodes:
            try:
                statuses.append(ray.get(node.stop.remote(), timeout=DRAIN_SECONDS + CALL_SECONDS))
            except ray.exceptions.RayError:
                continue  # the actor is gone, and its server with it
            ray.kill(node)
        remove_placement_group(self._group)
        return statuses

    def _actor(self, node: int) -> Any:
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=node)
        return ray.remote(Node).options(
            num_cpus=self._bundle.get("CPU", 0), num_gpus=self._bundle.get("GPU", 0), scheduling_strategy=place
        ).remote()  # fmt: skip

    def _serve(self, node: int) -> None:
        own = ["--nnodes", str(self._count), "--node-rank", str(node), "--master-addr", self._address]
        ray.get(self._nodes[node].start.remote([*self._arguments, *own]), timeout=CALL_SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(description="Serves one model on several machines of a Ray cluster.")
    parser.add_argument("--nodes", type=int, default=2, help="number of machines")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs that Ray reserves on each")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs that Ray reserves on each")
    parser.add_argument(
        "--strategy",
        choices=("STRICT_SPREAD", "SPREAD", "PACK", "STRICT_PACK"),
        default="STRICT_SPREAD",
        help="where Ray puts the nodes; by default each on a machine of its own",
    )
    parser.add_argument("arguments", nargs="*", help="arguments of `jamba serve`, after --")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    ray.init()
    bundle = {"CPU": options.cpus, "GPU": options.gpus}
    cluster = Cluster(options.arguments, options.nodes, bundle, options.strategy)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cluster.start()
        while (status := cluster.check()) is None:
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        status = 0
    finally:
        cluster.stop()
    return status


if __name__ == "__main__":
    sys.exit(main())
