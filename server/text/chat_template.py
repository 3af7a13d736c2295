"""Chat messages to a prompt, through the checkpoint's own Jinja template."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from jamba_server.engine.errors import CheckpointError, ConfigError, RequestRejected
from jamba_server.server.text.special_text import SpecialText, restore
from jamba_server.server.text.template_environment import MAX_OUTPUT_CHARS, create_environment, undeclared_variables
from jamba_server.server.text.tokenizer import Tokenizer
from jamba_server.server.text.tokenizer_config import read_tokenizer_config

Message = Mapping[str, object]

# What the code of a template may raise over messages that it was not written for.
_RENDERING_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_MAX_ERROR_CHARS = 500
_OWN_VARIABLES = frozenset({"messages", "add_generation_prompt"})
_API_FIELDS = frozenset({"tools", "documents"})
_ASSISTANT = "<|assistant|>"


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A prompt, ready for the engine.

    `save_positions` are offsets into `prompt_ids` where a message boundary lies that later requests are likely to
    share.
    `strip_leading_space` says that the reply will begin with a space that belongs to the template.
    """

    text: str
    prompt_ids: list[int]
    save_positions: tuple[int, ...]
    strip_leading_space: bool


class ChatTemplate:
    """A compiled template with its tokenizer; immutable, so that a pool of threads may share it.

    `variables` are the names that the template reads: anything else in `kwargs` would be ignored, so it is refused.
    """

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        self.source = template
        environment = create_environment()
        try:
            self._template = environment.from_string(template)
            self.variables = undeclared_variables(environment, template)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"The chat template does not compile: line {error.lineno}: {error.message}."
            ) from error
        self._tokenizer = tokenizer
        self._special_text = SpecialText(tokenizer.special_tokens)
        # What the post-processor would put before the prompt: BOS or nothing.
        self._bos = tokenizer.encode("")

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer, override: Path | None = None) -> ChatTemplate | None:
        """The template of `override`, of chat_template.jinja or of tokenizer_config.json, the first that is there."""
        path = override or folder / "chat_template.jinja"
        if override or path.exists():
            try:
                return cls(path.read_text(encoding="utf-8"), tokenizer)
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"The chat template {path} cannot be read: {error}.") from error
        template = read_tokenizer_config(folder).chat_template
        if isinstance(template, list):
            by_name = {named.name: named.template for named in template}
            if "default" not in by_name:
                raise CheckpointError(
                    f"{folder / 'tokenizer_config.json'} has the chat templates {', '.join(by_name) or '(none)'}, but "
                    'none named "default"; pass one as a file with --chat-template.'
                )
            template = by_name["default"]
        return cls(template, tokenizer) if template is not None else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, object] | None = None,
    ) -> RenderedChat:
        """The prompt of a conversation.

        `kwargs` are further variables of the template (tools, documents, a client's chat_template_kwargs). Special
        tokens in messages and kwargs come out as ordinary text. BOS stands first exactly once, whether template or
        post-processor or both would put it there. Raises RequestRejected with the template's own message.
        """
        kwargs = kwargs or {}
        self._check_names(kwargs)
        try:
            safe_messages = [self._message(message) for message in messages]
            safe_kwargs = {name: self._special_text.protect(value) for name, value in kwargs.items()}
            rendered = self._render(safe_messages, add_generation_prompt, safe_kwargs)
        except _RENDERING_ERRORS as error:
            reason = restore(str(error))[:_MAX_ERROR_CHARS]
            raise RequestRejected(f"The chat template refuses these messages: {reason}", param="messages") from error
        boundaries = self._boundaries(rendered, safe_messages, safe_kwargs)
        prompt_ids, offsets = self._encode(rendered, boundaries)
        if prompt_ids[: len(self._bos)] != self._bos:
            prompt_ids = self._bos + prompt_ids
            offsets = [offset + len(self._bos) for offset in offsets]
        return RenderedChat(
            text=restore(rendered),
            prompt_ids=prompt_ids,
            save_positions=tuple(sorted({offset for offset in offsets if 0 < offset < len(prompt_ids)})),
            strip_leading_space=prompt_ids[-1:] == [self._tokenizer.special_tokens.get(_ASSISTANT)],
        )

    def _check_names(self, kwargs: Mapping[str, object]) -> None:
        for name in kwargs:
            param = name if name in _API_FIELDS else "chat_template_kwargs"
            if name in _OWN_VARIABLES or name in self._tokenizer.named_tokens:
                raise RequestRejected(f"`{name}` cannot be set by chat_template_kwargs.", param=param)
            if name not in self.variables:
                raise RequestRejected(
                    f"This model's chat template has no variable `{name[:_MAX_ERROR_CHARS]}`.", param=param
                )

    def _message(self, message: Message) -> dict[str, object]:
        content = message.get("content")
        protected = {key: self._special_text.protect(value) for key, value in message.items()}
        return protected | ({"content": ""} if content is None else {})

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, kwargs: Mapping[str, object]) -> str:
        """The text with marks. `tools` and `documents` are always defined, as transformers has it."""
        context = {
            **self._tokenizer.named_tokens,
            "tools": None,
            "documents": None,
            **kwargs,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(context):
            size += len(piece)
            if size > MAX_OUTPUT_CHARS:
                raise jinja2.TemplateRuntimeError(f"the prompt is longer than {MAX_OUTPUT_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)

    def _boundaries(self, rendered: str, messages: Sequence[Message], kwargs: Mapping[str, object]) -> list[int]:
        """Characters of `rendered` up to the end of the system block, and up to the last user message.

        A boundary is where the rendering of the messages before it ends, if that is how `rendered` begins. Templates
        that put documents before the last user message pass this test only without the documents.
        """
        roles = [message.get("role") for message in messages]
        counts = {int(roles[:1] == ["system"])}
        if "user" in roles:
            counts.add(len(roles) - 1 - roles[::-1].index("user"))
        tools_only = {name: value for name, value in kwargs.items() if name == "tools"}
        boundaries: list[int] = []
        for count in counts:
            for variables in (kwargs, tools_only) if kwargs != tools_only else (kwargs,):
                try:
                    prefix = self._render(messages[:count], False, variables)
                except _RENDERING_ERRORS:  # a template need not accept the beginning of a conversation
                    continue
                if rendered.startswith(prefix):
                    boundaries.append(len(prefix))
                    break
        return boundaries

    def _encode(self, rendered: str, boundaries: Sequence[int]) -> tuple[list[int], list[int]]:
        """Token ids of `rendered`, and for each boundary the number of tokens that end at or before it."""
        ids: list[int] = []
        offsets: list[int] = []
        start = 0
        for place, part in enumerate(self._special_text.split(rendered)):
            inside = [part[: boundary - start] for boundary in boundaries if start <= boundary < start + len(part)]
            start += len(part)
            if place % 2:
                offsets += [len(ids)] * len(inside)
                ids.append(self._tokenizer.special_tokens[part])
            elif part:
                part_ids, ends = self._tokenizer.encode_with_ends(restore(part))
                offsets += [len(ids) + bisect_right(ends, len(restore(head))) for head in inside]
                ids += part_ids
        return ids, offsets
