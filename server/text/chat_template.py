"""Turns chat messages into a prompt with the Jinja template that comes with the checkpoint."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from jamba_server.engine.errors import CheckpointError, ConfigError, RequestRejected
from jamba_server.engine.files import read_text
from jamba_server.server.text.special_text import SpecialText, restore
from jamba_server.server.text.template_environment import MAX_OUTPUT_CHARS, create_environment, undeclared_variables
from jamba_server.server.text.tokenizer import Tokenizer
from jamba_server.server.text.tokenizer_config import read_tokenizer_config

Message = Mapping[str, object]

# The exceptions that a template can raise if the messages have a form for which the template was not written.
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
# Maximum number of characters of a template. The longest published templates have 30 thousand characters.
_MAX_TEMPLATE_CHARS = 1 << 20
_OWN_VARIABLES = frozenset({"messages", "add_generation_prompt"})
_API_FIELDS = frozenset({"tools", "documents"})
_ASSISTANT = "<|assistant|>"


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The prompt that a chat template makes from messages, as text and as token ids.

    `save_positions` are offsets into `prompt_ids` at message boundaries. Later requests are likely to share the tokens
    before such an offset, so a saved state is useful there.
    `strip_leading_space` is true if the reply will begin with a space that belongs to the template.
    """

    text: str
    prompt_ids: list[int]
    save_positions: tuple[int, ...]
    strip_leading_space: bool


class ChatTemplate:
    """A compiled chat template with its tokenizer. It is immutable, so several threads may share it.

    `variables` are the names that the template reads. The template would ignore any other name in `kwargs`, so `render`
    refuses other names.
    """

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        self.source = template
        environment = create_environment()
        if len(template) > _MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"The chat template has {len(template):,} characters; at most {_MAX_TEMPLATE_CHARS:,} are expected."
            )
        try:
            self._template = environment.from_string(template)
            self.variables = undeclared_variables(environment, template)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"The chat template does not compile: line {error.lineno}: {error.message}."
            ) from error
        # Jinja compiles a template to Python; Python's compiler raises these errors if the template is too complex
        except (MemoryError, OverflowError, RecursionError, SyntaxError, ValueError) as error:
            reason = " ".join(str(error).split())[:_MAX_ERROR_CHARS] or "it is too complex"
            raise CheckpointError(f"The chat template does not compile: {reason}.") from error
        self._tokenizer = tokenizer
        self._special_text = SpecialText(tokenizer.special_tokens)
        # The token ids that the tokenizer adds before every text: the token id of BOS, or none.
        self._bos = tokenizer.encode("")

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer, override: Path | None = None) -> ChatTemplate | None:
        """Reads the chat template. The argument `override` wins over chat_template.jinja, and chat_template.jinja over
        tokenizer_config.json.

        Returns None if the checkpoint has no template. Raises ConfigError if a file cannot be read and CheckpointError
        if the template does not compile.
        """
        path = override or folder / "chat_template.jinja"
        if (text := read_text(path)) is not None:
            return cls(text, tokenizer)
        if override:
            raise ConfigError(f"The chat template {path} cannot be read: there is no such file.")
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
        """Renders the messages of a conversation with the template and returns the prompt.

        `kwargs` are further variables of the template (tools, documents, a client's chat_template_kwargs). Special
        tokens in messages and kwargs become ordinary text. The prompt begins with exactly one BOS, also if both the
        template and the post-processor add one. Raises RequestRejected with the template's own message.
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
        """Returns the text that the template makes. It still contains the marks that `SpecialText.protect` inserted.

        `tools` and `documents` are always defined because templates for the library transformers read them unchecked.
        """
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
        """Returns at most two boundaries in `rendered`, as offsets in characters: the end of the system message and the
        start of the last user message.

        To find a boundary, the messages before it are rendered alone. If `rendered` begins with that text, the
        boundary is at its end; otherwise the boundary is left out. Some templates put the documents before the last
        user message; their boundary is found by rendering without the documents.
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
                except _RENDERING_ERRORS:  # a template can raise an error if the later messages are missing
                    continue
                if rendered.startswith(prefix):
                    boundaries.append(len(prefix))
                    break
        return boundaries

    def _encode(self, rendered: str, boundaries: Sequence[int]) -> tuple[list[int], list[int]]:
        """Returns the token ids of `rendered`. Also returns, for each offset in `boundaries`, the number of tokens that
        end at or before that offset."""
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
