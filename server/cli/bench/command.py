"""Implements the command `jamba bench URL` and its options."""

import asyncio
import inspect
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import httpx
import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.bench import report
from jamba_server.server.cli.bench.client import Client, Failure, Reply
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now
from jamba_server.server.cli.bench.decisions import DecisionClient, Decisions, computed_tokens, note
from jamba_server.server.cli.bench.discovery import BenchError, Target, discover, discover_tokens
from jamba_server.server.cli.bench.runner import ClosedLoop, Load, Poisson, Replay, Runner, schedule
from jamba_server.server.cli.bench.sessions import Session, TokenRange
from jamba_server.server.cli.bench.workloads import (
    Agents,
    MultiTurn,
    Random,
    SharedPrefix,
    Trace,
    Workload,
    leave_out_long,
)
from jamba_server.server.cli.decode_limit import Served

WORKLOADS: dict[str, type[Random] | type[Trace] | type[Decisions]] = {
    "random": Random,
    "shared-prefix": SharedPrefix,
    "multi-turn": MultiTurn,
    "agents": Agents,
    "trace": Trace,
    "decisions": Decisions,
}


Number = TypeVar("Number", int, float)


def _option(help: str) -> Any:
    return typer.Option(help=help)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The options of `jamba bench`. An option that the user has not given is None.

    An option that the chosen workload or load does not use is refused.
    """

    workload: Annotated[str, _option(f"Kind of requests to send: {', '.join(WORKLOADS)}.")] = "random"
    concurrency: Annotated[
        str | None,
        _option(
            "Closed loop: number of clients that send at the same time. Each number of the list is measured. "
            "[default: 1,8,32]"
        ),
    ] = None
    request_rate: Annotated[
        str | None,
        _option(
            "Open loop: requests per second that arrive at random (Poisson) times, for example 0.5,2. Each number "
            "of the list is measured."
        ),
    ] = None
    num_prompts: Annotated[
        int | None,
        _option(
            "Sessions to send in each measurement. A trace is read from its first row. [default: 4 per client, at "
            "least 16; 64 in open loop]"
        ),
    ] = None
    num_warmups: Annotated[
        int | None,
        _option(
            "Sessions to send before each measurement, which are not counted. [default: 1 per client; 1 in open loop]"
        ),
    ] = None
    max_seconds: Annotated[float, _option("Seconds after which a measurement ends.")] = 300.0
    input_len: Annotated[
        int | None,
        _option(
            "Tokens in each prompt; with multi-turn and decisions, words in each message; with agents, words in each "
            "task. [default: 256]"
        ),
    ] = None
    output_len: Annotated[int | None, _option("Tokens in each reply. [default: 64]")] = None
    range_ratio: Annotated[
        float | None,
        _option("Share by which lengths vary at random: 0.2 draws from 80% to 120% of the length. [default: 0]"),
    ] = None
    prefix_len: Annotated[
        int | None,
        _option("For shared-prefix: tokens in each prefix; for agents, words in the system prompt. [default: 512]"),
    ] = None
    num_prefixes: Annotated[
        int | None, _option("For shared-prefix: number of prefixes, which are used in turn. [default: 4]")
    ] = None
    turns: Annotated[
        int | None,
        _option("For multi-turn: messages of each user; for agents: requests of each agent. [default: 4; agents: 8]"),
    ] = None
    questions: Annotated[int | None, _option("For decisions: questions about each input. [default: 16]")] = None
    tools: Annotated[int | None, _option("For agents: number of tools that each request describes. [default: 8]")] = (
        None
    )
    result_len: Annotated[int | None, _option("For agents: words in the result of each tool call. [default: 128]")] = (
        None
    )
    trace: Annotated[
        str | None,
        _option(
            "For trace: CSV file, plain or compressed to .xz, with the columns seconds,input_tokens,output_tokens."
        ),
    ] = None
    time_scale: Annotated[
        float | None,
        _option("For trace: factor by which the arrival times are multiplied; 0.5 sends twice as fast. [default: 1]"),
    ] = None
    sharing: Annotated[
        str | None,
        _option(
            "For trace: none for independent prompts; chats for a model of conversations, drawn from the seed, because "
            "a trace has no text. [default: none]"
        ),
    ] = None
    vocab_size: Annotated[
        int | None, _option("Draw prompts from the token ids below this number. [default: ask the server's /tokenize]")
    ] = None
    temperature: Annotated[float, _option("Sampling temperature from 0 to 2; 0 is greedy.")] = 0.0
    seed: Annotated[
        int,
        _option(
            "Seed for prompts, lengths and arrival times. A second run with the same seed sends the same prompts, "
            "which the server may then have cached."
        ),
    ] = 0
    model: Annotated[str | None, _option("Name of the served model. [default: the first that the server lists]")] = None
    api_key: Annotated[
        str | None, typer.Option(help="Key that is sent to the server as bearer token.", envvar="JAMBA_API_KEY")
    ] = None
    checkpoint: Annotated[
        Path | None,
        _option(
            "The model's folder. If it is given, the report shows the limit that memory bandwidth sets for decode "
            "beside the measured speed."
        ),
    ] = None
    bandwidth: Annotated[
        str | None,
        _option("With --checkpoint: memory bandwidth of the server's device in bytes per second, such as 3.35TB."),
    ] = None
    quantization: Annotated[
        str | None, _option("With --checkpoint: the weight format with which the server was started.")
    ] = None
    quantize_mamba: Annotated[
        bool | None, _option("With --checkpoint: whether the server was started with --quantize-mamba.")
    ] = None
    goodput: Annotated[
        list[str] | None,
        _option(
            "Latency limit in milliseconds that a request must meet to count as goodput: ttft:500, tpot:50 or "
            "e2el:5000. Can be repeated."
        ),
    ] = None
    output: Annotated[Path | None, _option("File to which the report is written as JSON.")] = None

    def make_workload(self) -> Workload:
        if (kind := WORKLOADS.get(self.workload)) is None:
            raise ConfigError(f"--workload {self.workload!r} must be one of: {', '.join(WORKLOADS)}.")
        names = {name for each in WORKLOADS.values() for name in each.__struct_fields__}
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if unused := given.keys() - set(kind.__struct_fields__):
            raise ConfigError(f"{_flags(unused)} means nothing for --workload {self.workload}.")
        if (issubclass(kind, MultiTurn) or kind is Decisions) and self.vocab_size is not None:
            raise ConfigError(f"--vocab-size means nothing for --workload {self.workload}, whose prompts are text.")
        if kind is Trace and self.trace is None:
            raise ConfigError("--workload trace needs --trace FILE.")
        return kind(**given)

    def make_loads(self) -> list[Load]:
        if self.concurrency is not None and self.request_rate is not None:
            raise ConfigError("--concurrency (closed loop) and --request-rate (open loop) exclude each other.")
        if self.workload == "trace" and self.concurrency is None and self.request_rate is None:
            return [Replay()]
        if self.time_scale is not None:
            raise ConfigError("--time-scale means nothing with --concurrency or --request-rate.")
        if self.request_rate is not None:
            return [Poisson(rate) for rate in _numbers("--request-rate", self.request_rate, float)]
        return [ClosedLoop(number) for number in _numbers("--concurrency", self.concurrency or "1,8,32", int)]

    def served(self) -> Served | None:
        """Returns the model that the server serves, read from --checkpoint, or None if --checkpoint is not given."""
        if self.checkpoint is not None:
            return Served.find(
                self.checkpoint,
                bandwidth=self.bandwidth,
                quantization=self.quantization,
                quantize_mamba=bool(self.quantize_mamba),
            )
        names = ("bandwidth", "quantization", "quantize_mamba")
        if unused := [name for name in names if getattr(self, name) is not None]:
            raise ConfigError(f"{_flags(unused)} means nothing without --checkpoint.")
        return None

    def check(self) -> None:
        for name, minimum in (("num_prompts", 1), ("num_warmups", 0), ("vocab_size", 1), ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < minimum:
                raise ConfigError(f"{_flags([name])} {value} must be at least {minimum}.")
        if not 0 < self.max_seconds < float("inf"):
            raise ConfigError(f"--max-seconds {self.max_seconds:g} must be more than 0 and finite.")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"--temperature {self.temperature:g} must be from 0 to 2.")


class Bench:
    """Measures latencies and throughput of one server under each load that the options name. A load is, for example, 8
    clients."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        options: BenchOptions,
        *,
        now: Callable[[], float] = time.perf_counter,
        progress: Progress | None = None,
    ) -> None:
        options.check()
        self.options = options
        self.workload = options.make_workload()
        self.loads = options.make_loads()
        self._slo = report.parse_slo(options.goodput or ())
        self._http = http
        self._now = now
        self._progress = progress or Progress(disable=True)

    async def run(self) -> report.Report:
        """Measures latencies and throughput under each load, in the order of the loads. Stops after a load under which
        no request was completed."""
        target = await discover(self._http, self.options.model)
        tokens = await self.token_range(target.model)
        client = Client(self._http, target.model, temperature=self.options.temperature, now=self._now)
        if isinstance(self.workload, Decisions):
            client = DecisionClient(self._http, target.model, now=self._now)
        levels: list[report.Level] = []
        for index in range(len(self.loads)):
            levels.append(await self._measure(client, tokens, target, index))
            if not levels[-1].completed:
                break
        return report.Report(_conditions(self.options, self.workload, self._http.base_url, target), levels)

    async def token_range(self, model: str) -> TokenRange:
        if isinstance(self.workload, MultiTurn | Decisions):
            return TokenRange(0, 0)  # the prompts are made of words, so no range of token ids is needed
        if self.options.vocab_size is not None:
            return TokenRange(0, self.options.vocab_size - 1)
        return await discover_tokens(self._http, model)

    def sessions(self, tokens: TokenRange, index: int) -> list[Session]:
        """Draws the sessions to send under the load `self.loads[index]`.

        Every load has its own prompts. If two loads had the same prompts, the server would find the prompts of the
        second load in its prefix cache.
        """
        load = self.loads[index]
        count = self.options.num_prompts
        if count is None:
            count = max(16, 4 * load.concurrency) if isinstance(load, ClosedLoop) else 64
        rng = np.random.default_rng([self.options.seed, index, 0])
        return schedule(load, self.workload.sessions(rng, count, tokens), rng)

    async def _measure(
        self, client: Client | DecisionClient, tokens: TokenRange, target: Target, index: int
    ) -> report.Level:
        load = self.loads[index]
        drawn = self.sessions(tokens, index)
        sessions = leave_out_long(drawn, target.max_model_len)
        if not sessions:
            raise BenchError(f"Every prompt with its reply exceeds the server's context of {target.max_model_len}.")
        await self._warm_up(client, tokens, target, index)
        planned = sum(len(session.turns) for session in sessions)
        task = self._progress.add_task(str(load), total=planned)
        runner = Runner(client, on_end=lambda: self._progress.advance(task))
        before = await computed_tokens(self._http) if isinstance(self.workload, Decisions) else None
        cpu_start = time.process_time()
        await runner.run(load, sessions, max_seconds=self.options.max_seconds)
        cpu_seconds = time.process_time() - cpu_start
        plan = report.Plan(load, planned, len(drawn) - len(sessions))
        level = report.summarize(plan, runner.records, slo=self._slo, cpu_seconds=cpu_seconds)
        if before is None or (after := await computed_tokens(self._http)) is None:
            return level
        return msgspec.structs.replace(level, computed_tokens=after - before)

    async def _warm_up(self, client: Client | DecisionClient, tokens: TokenRange, target: Target, index: int) -> None:
        load = self.loads[index]
        concurrency = load.concurrency if isinstance(load, ClosedLoop) else 1
        count = concurrency if self.options.num_warmups is None else self.options.num_warmups
        if not count:
            return
        sessions = self.workload.sessions(np.random.default_rng([self.options.seed, index, 1]), count, tokens)
        sessions = leave_out_long(sessions, target.max_model_len)
        runner = Runner(client)
        await runner.run(ClosedLoop(concurrency), sessions, max_seconds=self.options.max_seconds)
        failures = [record for record in runner.records if isinstance(record, Failure)]
        if failures and not any(isinstance(record, Reply) for record in runner.records):
            raise BenchError(f"Every warm-up request failed, the first with {failures[0].kind}: {failures[0].message}")


def run_bench(url: str, options: BenchOptions, progress: Progress | None = None) -> report.Report:
    """Measures latencies and throughput of the server at `url` under every load. Returns after the measurements.

    Raises ConfigError if an option is wrong and BenchError if the server cannot be measured.
    """

    async def run() -> report.Report:
        async with open_http(url, options.api_key) as http:
            return await Bench(http, options, progress=progress).run()

    return asyncio.run(run())


def open_http(url: str, api_key: str | None) -> httpx.AsyncClient:
    """Opens an HTTP client without a limit on connections and without a read timeout.

    The load determines the number of connections, and --max-seconds bounds the time.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise ConfigError(f"URL {url!r} must begin with http:// or https://.")
    return httpx.AsyncClient(
        base_url=base,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(10.0, read=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


def bench(**flags: Any) -> None:
    """Measure a server: TTFT, ITL, TPOT, throughput and goodput under load."""
    url = cast(str, flags.pop("url"))
    options = BenchOptions(**flags)
    if options.output and not os.access(options.output.parent, os.W_OK):
        raise ConfigError(f"--output {options.output}: {options.output.parent} is not a folder to write in.")
    served = options.served()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        result = run_bench(url, options, progress)
    console = Console()
    console.print(report.table(result.levels))
    computed = map(note, result.levels) if options.workload == "decisions" else ()
    for line in [*report.notes(result.levels), *computed, *(served.describe(result.levels) if served else ())]:
        console.print(line, markup=False, highlight=False)
    if options.output:
        options.output.write_bytes(report.to_json(result))
    if not result.levels[-1].completed:
        raise BenchError(f"No request was completed with {result.levels[-1].load}.")


def _command_signature() -> inspect.Signature:
    """Returns a command signature whose parameters are the URL and the fields of BenchOptions.

    typer reads the parameters of a command from its signature, so the options are declared only once.
    """
    url = inspect.Parameter(
        "url",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        annotation=Annotated[
            str, typer.Argument(metavar="URL", help="Address of the server, such as http://127.0.0.1:8000.")
        ],
    )
    return inspect.Signature([url, *inspect.signature(BenchOptions).parameters.values()])


cast(Any, bench).__signature__ = _command_signature()


def _conditions(options: BenchOptions, workload: Workload, url: httpx.URL, target: Target) -> dict[str, Any]:
    arguments = {name: value for name, value in asdict(options).items() if value is not None and name != "api_key"}
    arguments |= {name: str(path) for name in ("output", "checkpoint") if (path := getattr(options, name))}
    return {
        "date": utc_now(),
        "url": str(url),
        "client_machine": msgspec.to_builtins(describe_machine()),
        "client_versions": describe_versions(("httpx", "numpy")),
        "server_version": target.version,
        "server_models": target.models,
        "workload": msgspec.to_builtins(workload),
        "arguments": arguments,
    }


def _numbers(flag: str, text: str, kind: type[Number]) -> list[Number]:
    """Parses a list such as `1,8,32`. Raises ConfigError unless all numbers are more than 0."""
    try:
        values = [kind(item) for item in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < float("inf") for value in values):
        raise ConfigError(f"{flag} {text!r} must be numbers above 0, separated by commas.")
    return values


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
