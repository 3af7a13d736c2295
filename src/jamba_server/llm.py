"""LLM: runs a model for scripts and tests, without a server. The engine is in the caller's process, or in processes of
its own if several ones divide the model (`tensor_parallel_size`, `pipeline_parallel_size`). The class tokenises
prompts, applies chat templates and cuts replies at stop strings with the server's own code."""

from __future__ import annotations

import difflib
import logging
import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jamba_server.engine.checkpoint import TOKENIZER_FILE, open_checkpoint
from jamba_server.engine.core import EngineCore
from jamba_server.engine.errors import ConfigError, EngineFailed, RequestRejected
from jamba_server.engine.process.blocking import BlockingEngine
from jamba_server.engine.read_ahead import reading_early
from jamba_server.engine.start.build import build_engine
from jamba_server.engine.start.rank_options import num_ranks
from jamba_server.engine.types import (
    EngineInfo,
    FinishReason,
    Pooling,
    Request,
    RequestKind,
    SamplingParams,
    TokenLogprob,
    TokenUpdate,
)
from jamba_server.engine.validation import validate_kind, validate_prompt
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.cli.settings import LOCAL
from jamba_server.server.config import ServerConfig
from jamba_server.server.config_sources import cast_settings
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.choice import Choice, TextOptions
from jamba_server.server.http.errors import describe
from jamba_server.server.http.generation import GenerationSpec
from jamba_server.server.http.sampling import admit_prompt
from jamba_server.server.http.schemas.chat import Messages
from jamba_server.server.http.vectors.arithmetic import Numbers, probabilities, unit_vector
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SETTINGS = frozenset({*LOCAL, "max_num_seqs", "seed"})
# The largest number of tokens of a reply in a call of `generate` without max_tokens. The server has the same default
# for completions. In a call of `chat` without max_tokens, only the context length limits a reply.
DEFAULT_MAX_TOKENS = 16

Message = Mapping[str, object]
# One or several prompts, each a text or a list of token ids.
Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
_MESSAGES: TypeAdapter[Any] = TypeAdapter(Messages)


@dataclass(slots=True)
class Completion:
    """One reply to a prompt. The field `index` is the position of this reply (0 to n-1) among the n replies to the same
    prompt. The field `text` is empty for a model without tokenizer.json. The fields `logprobs` and `prompt_logprobs`
    are empty unless the caller asks for log-probabilities. The field `stop_reason` is the stop string, or the token of
    `stop_token_ids`, that ended the reply."""

    prompt: list[int]
    index: int
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list["TokenLogprob | None"])
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached: int = 0
    text: str = ""


class LLM:
    """A loaded model. Example: `LLM("folder", max_num_seqs=8).generate("Once upon a time", max_tokens=32)`.

    `model` is a folder or a hub id, which is downloaded. Without it the demonstration checkpoint is loaded. Keyword
    arguments are the options of `jamba serve` that concern the model (`SETTINGS`), with underscores. They raise the
    same errors as there: ConfigError, and CheckpointError for a model that cannot be loaded. JAMBA_* environment
    variables are not read. With several processes, `close` or a `with` block ends them.

    Keyword arguments of `generate` and `chat` are the fields of SamplingParams. As on the server, the defaults of
    absent ones come from the checkpoint's generation_config.json. If a `SamplingParams` is passed instead, absent
    fields have the defaults of that class. Without a seed every prompt gets a random one.
    """

    def __init__(self, model: str | Path | None = None, **settings: Any) -> None:
        config = model_config(model, settings)
        folder = find_checkpoint(config).folder
        self._tokenizer = self._template = None
        self._tokenizer_folder = Path(config.tokenizer or folder)
        with reading_early(folder, config.load_format):
            self._defaults = GenerationDefaults.of(folder)
            if config.chat_template or config.tokenizer or open_checkpoint(folder).has(TOKENIZER_FILE):
                self._tokenizer = Tokenizer.from_folder(self._tokenizer_folder)
                override = None if config.chat_template is None else Path(config.chat_template)
                self._template = ChatTemplate.from_folder(folder, self._tokenizer, override)
            options = config.engine(folder)
            self._engine = _InProcess(build_engine(options)) if num_ranks(options) == 1 else BlockingEngine(options)
        for warning in self.info.warnings:
            logger.warning("%s", warning)
        self._num_prompts = 0

    @property
    def info(self) -> EngineInfo:
        """The properties of the model and the sizes that were chosen."""
        return self._engine.info

    @property
    def core(self) -> EngineCore:
        """The engine in this process. Raises ConfigError if the engine has processes of its own."""
        if isinstance(self._engine, BlockingEngine):
            raise ConfigError("LLM: with several processes, the engine is not in this one; `info` has its properties.")
        return self._engine.core

    def close(self) -> None:
        """Ends the processes of the engine, if it has any. They end with this process, too."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Inputs,
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        stop: str | Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        progress: bool | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Returns `n` replies to each of one or several prompts (texts or lists of token ids). The replies to the first
        prompt come first. If a text contains the name of a special token, such as `<|pad|>`, the name is encoded as
        ordinary text. `progress` says whether to show a progress bar. If it is None, the bar is shown if there are
        several replies and stderr is a terminal. Raises RequestRejected."""
        sampled = self._sampling(params, sampling, max_tokens=DEFAULT_MAX_TOKENS)
        options = text_options(stop, include_stop_str_in_output, skip_special_tokens)
        specs = [
            self._spec(self._encode(prompt), sampled, n, options, param="prompt") for prompt in split_prompts(prompts)
        ]
        return self._run(specs, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        stop: str | Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        progress: bool | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Returns `n` replies to each of one or several conversations. The checkpoint's chat template turns
        conversations into prompts. The other arguments are those of the method `generate`. If neither `max_tokens` nor
        `params` is given, only the context length limits a reply."""
        template = self._chat_template()
        sampled = self._sampling(params, sampling, max_tokens=self.info.max_model_len)
        options = text_options(stop, include_stop_str_in_output, skip_special_tokens)
        specs: list[GenerationSpec] = []
        for turns in split_conversations(messages):
            chat = template.render(turns)
            ending = replace(options, strip_leading_space=chat.strip_leading_space)
            specs.append(self._spec(chat.prompt_ids, sampled, n, ending, saves=chat.save_positions, param="messages"))
        return self._run(specs, progress)

    def embed(self, inputs: Inputs, *, pooling: Pooling = "last", use_activation: bool = True) -> list[Numbers]:
        """Returns the last hidden state of each input (a text or a list of token ids), of its last token or the mean
        over all tokens: float32 arrays of length 1, or with `use_activation` false the hidden states as they are. The
        model was not trained for embeddings. Raises RequestRejected."""
        found = self._vectors(inputs, "embed", pooling)
        return [unit_vector(numbers) for numbers in found] if use_activation else found

    def classify(self, inputs: Inputs) -> list[list[float]]:
        """Returns the probabilities of the labels (`info.labels`) of each input (a text or a list of token ids).
        Raises RequestRejected, also if the model is not a classifier."""
        problem = self.info.problem_type
        return [probabilities(numbers, problem) for numbers in self._vectors(inputs, "classify", "last")]

    def _vectors(self, inputs: Inputs, kind: RequestKind, pooling: Pooling) -> list[Numbers]:
        info = self.info
        validate_kind(kind, info)
        requests: list[Request] = []
        for prompt in split_prompts(inputs):
            ids = self._encode(prompt)
            validate_prompt(ids, vocab_size=info.vocab_size, max_model_len=info.max_model_len, max_tokens=0)
            self._num_prompts += 1
            params = SamplingParams(max_tokens=0)
            requests.append(
                Request(id=f"llm-{self._num_prompts}", prompt=ids, params=params, kind=kind, pooling=pooling)
            )
        with closing(self._engine.run(requests)) as updates:
            found = {update.request_id: update.vector or b"" for update in updates}
        return [np.frombuffer(found[request.id], dtype="<f4") for request in requests]

    # Tokenizer and chat template --------------------------------------------------------------------------------

    def _text(self) -> Tokenizer:
        """Returns the tokenizer. Raises CheckpointError if the checkpoint has none."""
        return self._tokenizer or Tokenizer.from_folder(self._tokenizer_folder)

    def _encode(self, prompt: str | list[int]) -> list[int]:
        return self._text().encode(prompt) if isinstance(prompt, str) else prompt

    def _chat_template(self) -> ChatTemplate:
        self._text()
        if self._template is None:
            message = "This model has no chat template. Use `generate`, or pass a file: LLM(..., chat_template=FILE)."
            raise RequestRejected(message, param="messages")
        return self._template

    # Making requests and running them ---------------------------------------------------------------------------

    def _sampling(self, params: SamplingParams | None, given: Mapping[str, Any], *, max_tokens: int) -> SamplingParams:
        """Returns the sampling parameters for all prompts of a call. A keyword argument that is None counts as absent.
        Raises RequestRejected for an unknown name or a value of the wrong type."""
        if params is None:
            params = SamplingParams(max_tokens=max_tokens, **msgspec.structs.asdict(self._defaults))
        values = msgspec.structs.asdict(params) | {name: value for name, value in given.items() if value is not None}
        kinds = {field.name: field.type for field in msgspec.structs.fields(SamplingParams)}
        for name, value in values.items():
            if name not in kinds:
                near = difflib.get_close_matches(name, kinds, n=1) or [", ".join(kinds)]
                raise RequestRejected(f"{name} is not a sampling parameter; did you mean {near[0]}?", param=name)
            try:
                values[name] = msgspec.convert(value, kinds[name])
            except msgspec.ValidationError as error:
                raise RequestRejected(f"{name} is {value!r}. {error}.", param=name) from None
        # for callers, as in the HTTP API, a top_k of -1 means all tokens; for the engine a top_k of 0 means all tokens
        if values["top_k"] == -1:
            values["top_k"] = 0
        return SamplingParams(**values)

    def _spec(
        self,
        token_ids: list[int],
        params: SamplingParams,
        n: int,
        options: TextOptions,
        *,
        saves: tuple[int, ...] = (),
        param: str,
    ) -> GenerationSpec:
        """Returns the specification of `n` replies to one prompt. Raises RequestRejected for a prompt or parameters
        that the engine cannot accept."""
        if n < 1:
            raise RequestRejected(f"n is {n}; it must be at least 1.", param="n")
        if options.stops:
            self._text()  # raises if there is no tokenizer, because stop strings need one
        # each prompt gets a random seed of its own, so that equal prompts get different replies
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=secrets.randbits(63))
        prompt = admit_prompt(token_ids, params, self, param=param, save_positions=saves)
        self._num_prompts += 1
        return GenerationSpec(id=f"llm-{self._num_prompts}", prompts=(prompt,), n=n, text=options)

    def _run(self, specs: Sequence[GenerationSpec], progress: bool | None) -> list[Completion]:
        replies = [_Reply(request, self._tokenizer, spec.text) for spec in specs for request in spec.requests()]
        open_ = {reply.request.id: reply for reply in replies}
        # After an interrupt, the generator is closed, so that the next call does not run these requests.
        running = closing(self._engine.run([reply.request for reply in replies]))
        with progress_bar(len(replies), progress) as bar, running as updates:
            task = bar.add_task("generating", total=len(replies))
            for update in updates:
                reply = open_.get(update.request_id)
                if reply is not None and reply.take(update):
                    del open_[update.request_id]
                    # The engine does not know stop strings, so the engine would go on generating after a stop string.
                    # This call therefore aborts a request whose reply has reached a stop string.
                    if update.finish_reason is None:
                        self._engine.abort(update.request_id)
                    bar.advance(task)
        return [reply.completion for reply in replies]


class _InProcess:
    """An engine in this process, with the interface of `BlockingEngine`."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._open: set[str] = set()  # the ids of the requests that have not ended

    @property
    def info(self) -> EngineInfo:
        return self.core.info

    def run(self, requests: list[Request]) -> Generator[TokenUpdate]:
        self._open = {request.id for request in requests}
        self.core.inbox.submit(requests)
        try:
            while self._open or self.core.has_work:
                if not self.core.has_work:
                    # the engine has no work while the grammars of new requests are still being compiled
                    self.core.inbox.wait()
                for update in self.core.step().updates:
                    if update.finish_reason:
                        self._open.discard(update.request_id)
                    yield update
        finally:
            self.core.inbox.abort(sorted(self._open))

    def abort(self, request_id: str) -> None:
        self._open.discard(request_id)
        self.core.inbox.abort([request_id])

    def close(self) -> None:
        """Does nothing: the engine ends with the last reference to it."""


class _Reply:
    """A request, and the part of its reply (tokens and text) that has been generated until now."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, options: TextOptions) -> None:
        self.request = request
        self.completion = Completion(request.prompt, request.index)
        self._choice = None if tokenizer is None else Choice(request, request.index, tokenizer, options)

    def take(self, update: TokenUpdate) -> bool:
        """Adds the tokens of an update to the reply. Returns whether the reply is complete. Raises EngineFailed if the
        request failed."""
        if update.finish_reason == "error":
            raise EngineFailed(update.error or "The engine failed to run this request.")
        completion, choice = self.completion, self._choice
        completion.token_ids += update.token_ids
        completion.logprobs += update.logprobs
        completion.prompt_logprobs += update.prompt_logprobs
        completion.num_cached = completion.num_cached if update.num_cached is None else update.num_cached
        if choice is None:
            completion.finish_reason = update.finish_reason
        # Prompt log-probabilities are removed here, because the class `Choice` would add the prompt's text to the
        # reply.
        elif delta := choice.take(msgspec.structs.replace(update, prompt_logprobs=[])):
            completion.text += delta.text
            assert delta.finish_reason != "tool_calls", "tool calls are ordinary text here"
            completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
            # Tokens that the step generated after a stop string are dropped.
            del completion.token_ids[choice.num_tokens :], completion.logprobs[choice.num_tokens :]
        return completion.finish_reason is not None


def model_config(model: str | Path | None, settings: Mapping[str, object]) -> ServerConfig:
    """Returns the configuration for LLM's arguments. Raises ConfigError for a setting that is unknown, has a wrong
    value, or exists only for a server."""
    values = cast_settings(settings, "LLM")
    if foreign := sorted(values.keys() - SETTINGS):
        raise ConfigError(f"LLM: {foreign[0]!r} is an option of `jamba serve` only, because LLM starts no server.")
    # A `Path` object always names a folder. Only a string may be the id of a model on the hub.
    values["model"] = str(model.expanduser().absolute()) if isinstance(model, Path) else model
    config = ServerConfig(**values)
    config.check()
    return config


def text_options(stop: str | Sequence[str], include_stop: bool, skip_special_tokens: bool) -> TextOptions:
    """Returns the options for turning tokens into text. Raises RequestRejected for a stop string that is empty or not a
    text."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may pass other types
            raise RequestRejected(f"stop has {text!r}; it must be a text of at least one character.", param="stop")
    return TextOptions(stops=stops, include_stop=include_stop, skip_special_tokens=skip_special_tokens)


def split_prompts(prompts: str | Sequence[Any]) -> Iterator[str | list[int]]:
    """Yields each prompt. A single text or a single list of token ids is one prompt. Raises RequestRejected for a
    prompt that is neither a text nor a list of token ids."""
    alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    for place, prompt in enumerate([prompts] if alone else prompts):
        try:
            yield msgspec.convert(prompt, str | list[int])
        except msgspec.ValidationError as error:
            why = f"prompt {place} is neither a text nor a list of token ids. {error}."
            raise RequestRejected(why, param="prompt") from None


def split_conversations(messages: Sequence[Any]) -> Iterator[list[dict[str, object]]]:
    """Yields, for each conversation, its list of messages in the form that chat templates take. Raises RequestRejected
    for a message that is not valid, with the same error text as the server."""
    alone = not messages or isinstance(messages[0], Mapping)
    for conversation in [messages] if alone else messages:
        try:
            turns = _MESSAGES.validate_python(list(conversation))
        except ValidationError as error:
            found = [finding | {"loc": ("body", "messages", *finding["loc"])} for finding in error.errors()]
            problem = describe(RequestValidationError(found))
            raise RequestRejected(problem.message, param=problem.param, code=problem.code) from None
        yield [turn.to_template() for turn in turns]


def progress_bar(total: int, wanted: bool | None) -> Progress:
    """Returns a progress bar for `total` replies on stderr. If `wanted` is None, the bar is shown if there are several
    replies and stderr is a terminal."""
    console = Console(stderr=True)
    shown = wanted or (wanted is None and total > 1 and console.is_terminal)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=console, disable=not shown)
