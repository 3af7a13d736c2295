"""A model that a terminal command loads in its own process and uses without HTTP."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from jamba_server.engine.errors import ConfigError, EngineFailed
from jamba_server.engine.process.client import Engine, EngineClient
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.server.cli.terminal import LoadProgress
from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.generation import Prompt
from jamba_server.server.http.sampling import admit_prompt
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.detokenizer import Detokenizer
from jamba_server.server.text.grammars.builder import GrammarBuilder, grammar_builder
from jamba_server.server.text.grammars.types import OutputFormat, ReasoningGrammar
from jamba_server.server.text.parts import Part, Reasoning, Text, ToolCall
from jamba_server.server.text.reasoning import ReasoningFilter
from jamba_server.server.text.reply_style import find_reply_style
from jamba_server.server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The sampling flags of a command. If a flag is None, the model's default is used for that parameter."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The sampling parameters that the user has given as flags. The keys are the parameters' names."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def params(self, defaults: GenerationDefaults) -> SamplingParams:
        """Returns the sampling parameters of a request. For flags that are not given, `defaults` and a random seed are
        used."""
        settings: dict[str, Any] = {name: getattr(defaults, name) for name in defaults.__struct_fields__}
        settings = {"seed": secrets.randbits(63)} | settings | self.given
        return SamplingParams(**settings)


class LocalModel:
    """A loaded model with its tokenizer and chat template. The class method `open` loads the model."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None, defaults: GenerationDefaults
    ) -> None:
        self.engine, self.tokenizer, self.template, self.defaults = engine, tokenizer, template, defaults
        self._num_requests = 0
        self._grammars: GrammarBuilder | None = None  # made for the first reply that has to follow a schema

    @classmethod
    @asynccontextmanager
    async def open(cls, config: ServerConfig, folder: Path, console: Console) -> AsyncGenerator[LocalModel]:
        """Loads the model in `folder` for one sequence at a time, with the options of `config`. Raises ConfigError."""
        tokenizer = Tokenizer.from_folder(Path(config.tokenizer or folder))
        override = None if config.chat_template is None else Path(config.chat_template)
        template = ChatTemplate.from_folder(folder, tokenizer, override)
        defaults = GenerationDefaults.of(folder)
        client = await start_engine(replace(config, max_num_seqs=1), folder, console)
        model = cls(client, tokenizer, template, defaults)
        try:
            yield model
        finally:
            await client.close()
            model.close()

    def close(self) -> None:
        """Ends the processes that check grammars. The engine is closed by whoever has started it."""
        if self._grammars is not None:
            self._grammars.close()

    async def stream(
        self,
        token_ids: list[int],
        sampling: Sampling,
        *,
        save_positions: tuple[int, ...] = (),
        strip_leading_space: bool = False,
        grammar: str = "",
    ) -> AsyncGenerator[str]:
        """Yields the text with which the model continues the prompt `token_ids`, in pieces as the engine generates
        them.

        `save_positions` are the offsets in the prompt after which the recurrent state is saved. The text follows
        `grammar` unless it is "". Raises RequestRejected, EngineDead and EngineFailed.
        """
        params = msgspec.structs.replace(sampling.params(self.defaults), grammar=grammar)
        prompt = admit_prompt(token_ids, params, self.engine, param="prompt", save_positions=save_positions)
        detokenizer = Detokenizer(self.tokenizer, skip_special_tokens=True, strip_leading_space=strip_leading_space)
        async with self.engine.generate([self._request(prompt)]) as updates:
            async for update in updates:
                if update.finish_reason == "error":
                    raise EngineFailed(update.error or "The engine failed to run this request.")
                stop = update.stop_token_id is not None
                yield detokenizer.push(update.token_ids[:-1] if stop else update.token_ids)
        yield detokenizer.finish()

    def grammar(
        self, schema: dict[str, Any] | None, reasoning: ReasoningGrammar | None = None, *, leading_space: bool = False
    ) -> str:
        """Returns the grammar of a reply whose content follows the JSON schema, or "" without a schema. The method
        blocks while another process checks the schema. Raises RequestRejected if it cannot be enforced."""
        if schema is None:
            return ""
        if self._grammars is None:
            self._grammars = grammar_builder(self.tokenizer)
        form = OutputFormat(kind="json_schema", value=schema, param="--schema")
        return self._grammars.build(form, reasoning=reasoning, leading_space=leading_space)

    async def chat(
        self, messages: list[dict[str, str]], sampling: Sampling, *, schema: dict[str, Any] | None = None
    ) -> AsyncGenerator[str | Reasoning]:
        """Yields the assistant's next message in pieces as the engine generates them. The model's thoughts are pieces
        of the class `Reasoning`. The other pieces together follow the JSON schema, if there is one. Raises ConfigError
        if the model has no chat template, and every error that `stream` raises."""
        if self.template is None:
            raise ConfigError("This model has no chat template: give one with --chat-template, or use `jamba run`.")
        chat = self.template.render(messages)
        thinks = find_reply_style(self.template, self.tokenizer).reasoning
        reasoning = ReasoningGrammar(opened=chat.opens_reasoning) if thinks else None
        space = chat.strip_leading_space
        stream = self.stream(
            chat.prompt_ids,
            sampling,
            save_positions=chat.save_positions,
            strip_leading_space=space,
            grammar=await asyncio.to_thread(self.grammar, schema, reasoning, leading_space=space),
        )
        async with aclosing(stream) as pieces:
            if not thinks:
                async for piece in pieces:
                    yield piece
                return
            thoughts = ReasoningFilter(thinking=chat.opens_reasoning)
            async for piece in pieces:
                for part in thoughts.push(Text(piece)):
                    yield _piece(part)
            for part in thoughts.flush():
                yield _piece(part)

    def _request(self, prompt: Prompt) -> Request:
        self._num_requests += 1
        return Request(
            id=f"local-{self._num_requests}",
            prompt=prompt.token_ids,
            params=prompt.params,
            save_positions=prompt.save_positions,
        )


async def start_engine(config: ServerConfig, folder: Path, console: Console) -> EngineClient:
    """Loads the model in `folder` in a process of its own, which the caller must close, and shows the progress on
    `console`. Raises ConfigError."""
    with LoadProgress(console) as progress:
        client = EngineClient(
            config.engine(folder),
            engine_timeout=config.engine_timeout,
            load_timeout=config.load_timeout,
            on_progress=progress.update,
        )
        try:
            info = await client.start()
        except BaseException:
            await client.close()
            raise
    for warning in info.warnings:
        logger.warning("%s", warning)
    return client


def _piece(part: Part) -> str | Reasoning:
    assert not isinstance(part, ToolCall), "only the filter of tool calls makes such parts"
    return part if isinstance(part, Reasoning) else part.text
