"""Runs a node other than node 0: `jamba serve --nnodes N --node-rank R`, where R is not 0. It serves no HTTP."""

from __future__ import annotations

import asyncio

from jamba_server.engine.nodes.agent import Agent
from jamba_server.engine.nodes.options import NodeOptions
from jamba_server.engine.start.rank_options import check_ranks
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.config import ServerConfig


def run_node(config: ServerConfig, nodes: NodeOptions) -> None:
    """Runs this node's ranks until node 0 ends or this process gets SIGTERM or SIGINT. Raises ConfigError if this node
    cannot join, and EngineDead if the engine is gone for good."""
    engine = config.engine(find_checkpoint(config).folder)
    check_ranks(engine)
    asyncio.run(Agent(engine, nodes).run())
