"""The class `Services` has the objects that all routes of one application use, such as the engine and the tokenizer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, TypeVar, Unpack, cast

import anyio
import anyio.to_thread
from fastapi import Depends, Request
from starlette.types import Scope

from jamba_server.engine.errors import ModelNotFound, RequestRejected
from jamba_server.engine.process.client import Engine
from jamba_server.engine.types import Request as EngineRequest
from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.batches.store import BatchStore
from jamba_server.server.http.deadlines import TimeLimit
from jamba_server.server.http.files.store import FileStore
from jamba_server.server.http.generation import Generation, GenerationSpec
from jamba_server.server.http.grammar_queue import GrammarQueue, ReplyGrammar
from jamba_server.server.http.lifecycle import Lifecycle, StartupQueue
from jamba_server.server.http.limits.edge import Edge
from jamba_server.server.http.limits.turns import Turns, client_of
from jamba_server.server.http.limits.waiting import Admission, WaitingTokens
from jamba_server.server.http.metrics import Metrics
from jamba_server.server.http.page.files import ChatPage
from jamba_server.server.http.prefill.tier import TierFolder
from jamba_server.server.http.store.responses import ResponseStore
from jamba_server.server.http.streams.registry import KeptStreams
from jamba_server.server.http.tracing.setup import Tracing
from jamba_server.server.text.bad_words import bad_word_tokens
from jamba_server.server.text.chat_template import ChatTemplate, RenderedChat, RenderedText, RenderOptions
from jamba_server.server.text.grammars.types import OutputFormat, ReasoningGrammar, ToolGrammar
from jamba_server.server.text.rendering.process import NUM_PROCESSES
from jamba_server.server.text.reply_style import ReplyStyle
from jamba_server.server.text.template_messages import text_bytes
from jamba_server.server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jamba_server.server.http.prefill.hand_overs import HandOvers

T = TypeVar("T")

# Number of threads that tokenise and do similar work; more threads would take CPU cores from the engine.
TEXT_THREADS = 4

# Longest time in seconds that a request waits for one of the processes that render chat templates.
RENDER_WAIT_SECONDS = 10.0


def _draw_seed() -> int:
    return secrets.randbits(63)


def _render_turns(size: int) -> Turns:
    return Turns(size, seconds=RENDER_WAIT_SECONDS, what="the rendering of its chat template")


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    config: ServerConfig
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    defaults: GenerationDefaults
    metrics: Metrics
    demo: bool
    version: str
    grammars: GrammarQueue
    reply_style: ReplyStyle
    longest_token: int  # number of bytes in the longest token of the vocabulary
    startup: StartupQueue
    responses: ResponseStore
    files: FileStore
    batches: BatchStore
    streams: KeptStreams
    page: ChatPage | None  # the chat page at /, unless --no-ui
    edge: Edge
    tracing: Tracing | None
    tier: TierFolder
    hand_overs: HandOvers | None  # with --role decode
    # A segment of an imported session is in memory as a whole, so there is one at a time.
    segment_turns: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    draw_seed: Callable[[], int] = _draw_seed
    created: int = field(default_factory=lambda: int(time.time()))
    threads: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(TEXT_THREADS))
    render_turns: Turns = field(default_factory=lambda: _render_turns(NUM_PROCESSES))
    # Templates that requests have sent may take one process less than there are, because they may take long. So the
    # model's own template always finds a process.
    sent_template_turns: Turns = field(default_factory=lambda: _render_turns(NUM_PROCESSES - 1))

    def model(self, requested: str | None) -> str:
        """Returns the requested model name, or the server's first model name if the request names no model.

        Raises ModelNotFound if the requested name is none of the server's model names.
        """
        served = self.config.served_model_name
        if requested is None:
            return served[0]
        if requested not in served:
            raise ModelNotFound(requested, served=served)
        return requested

    def generation(self, spec: GenerationSpec) -> Generation:
        admission = self.admission(spec.requests(), spec.time_limit)
        return Generation(spec, self.engine, self.tokenizer, self.metrics, admission)

    def admission(self, requests: Sequence[EngineRequest], time_limit: TimeLimit | None) -> Admission:
        """Returns the context manager that checks the limits for one HTTP request, which has these engine requests.

        Lines of batches wait without a limit, do not delay others, and do not count against the limits of their key.
        """
        if requests[0].is_background:
            return Admission(requests, WaitingTokens(0), None)
        return Admission(requests, self.edge.waiting, self.edge.keys.account(requests[0].tenant), time_limit)

    def check_size(self, text: str, *, param: str) -> None:
        """Raises RequestRejected if a text has too many bytes for the context length.

        A text has too many bytes if it would exceed the context length even if each of its tokens were as long as the
        longest token of the vocabulary. Without this check, tokenising a text of several megabytes would take
        seconds. The argument `param` is the name of the request's field that has the text; the error names this field.
        """
        self.check_bytes(len(text.encode()), param=param)

    def check_bytes(self, size: int, *, param: str) -> None:
        """Makes the same check as `check_size`, for texts that have `size` bytes together."""
        limit = self.engine.info.max_model_len
        if size > limit * self.longest_token:
            raise RequestRejected(
                f"This model's maximum context length is {limit} tokens; the prompt has {size} bytes, and no token has "
                f"more than {self.longest_token} bytes. Shorten the prompt.",
                param=param,
                code="context_length_exceeded",
            )

    async def bad_words(self, words: list[str] | None) -> tuple[tuple[int, ...], ...]:
        """Returns the sequences of token ids that spell the texts in a request's field `bad_words`."""
        return await self.in_thread(lambda: bad_word_tokens(words, self.tokenizer)) if words else ()

    def begins_with_bos(self, text: str) -> bool:
        """Returns whether a prompt begins with the text of the begin-of-text token. Some evaluation tools send
        prompts of this form."""
        bos = self.tokenizer.named_tokens.get("bos_token")
        return bos is not None and text.startswith(bos)

    async def encode_prompt(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the token ids of a completion's prompt.

        If the prompt begins with the text of the begin-of-text token, this text becomes one begin-of-text token, and no
        second begin-of-text token is added. The model was not trained on texts with two begin-of-text tokens, and its
        output for such texts is useless.
        """
        if not self.begins_with_bos(text):
            return await self.encode(text, add_special_tokens=add_special_tokens)
        bos = self.tokenizer.named_tokens["bos_token"]
        rest = await self.encode(text.removeprefix(bos), add_special_tokens=False)
        return [self.tokenizer.special_tokens[bos], *rest]

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return await self.in_thread(lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    async def render(
        self,
        messages: Sequence[Mapping[str, object]],
        scope: Scope,
        *,
        template: str | None = None,
        **options: Unpack[RenderOptions],
    ) -> RenderedChat:
        """Returns the prompt that the chat template makes from messages, which are dictionaries as templates read
        them. `scope` is the request's ASGI scope. `template` is a template that replaces the model's own.

        Raises RequestRejected for what the template refuses, and for a text that is too long. Raises Overloaded if no
        process can render the template in time.
        """
        own = self.chat_template
        if own is None:
            raise RequestRejected(
                "This model has no chat template. Use /v1/completions, or start the server with --chat-template.",
                param="messages",
            )
        self.check_bytes(text_bytes([*messages, options.get("tools"), options.get("documents")]), param="messages")

        def work() -> tuple[ChatTemplate, RenderedText]:
            used = own if template is None else own.with_source(template)
            return used, used.render_text(messages, **options)

        turns = self.render_turns if template is None else self.sent_template_turns
        used, text = await turns.run(client_of(scope), work)
        return await self.in_thread(lambda: used.encode(text))

    async def grammar(
        self,
        scope: Scope,
        format: OutputFormat | None = None,
        tools: ToolGrammar | None = None,
        reasoning: ReasoningGrammar | None = None,
        *,
        leading_space: bool = False,
    ) -> ReplyGrammar:
        """Returns the grammar that a reply must follow; its text is "" if every reply is allowed. `scope` is the
        request's ASGI scope. The method `GrammarBuilder.build` describes the other arguments. Raises RequestRejected,
        and Overloaded if the grammar cannot be checked in time."""
        if format is None and tools is None:
            return ReplyGrammar("", {})
        return await self.grammars.build(
            client_of(scope), self.threads, format, tools, reasoning, leading_space=leading_space
        )

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Calls the function `work` in a thread. In the event loop, a long call would block all other requests."""
        return await anyio.to_thread.run_sync(work, limiter=self.threads)


async def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesOf = Annotated[Services, Depends(_services)]
