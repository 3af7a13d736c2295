"""Turns chat messages into a prompt with the Jinja template that comes with the checkpoint."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from jamba_server.engine import checkpoint
from jamba_server.engine.errors import CheckpointError, ConfigError, RequestRejected
from jamba_server.engine.files import read_text
from jamba_server.server.text.grammars.types import ToolStyle
from jamba_server.server.text.message_places import (
    Messages,
    boundary_counts,
    common_length,
    mark,
    next_turn,
    place_of,
)
from jamba_server.server.text.rendering.renderer import MAX_ERROR_CHARS, Renderer, RendererStopped, Rendering
from jamba_server.server.text.special_text import MARK, MAX_PLACES, SpecialText, place_mark, restore, take_places
from jamba_server.server.text.template_messages import REASONING_FIELDS, Message, template_message
from jamba_server.server.text.tokenizer import Tokenizer
from jamba_server.server.text.tokenizer_config import read_tokenizer_config
from jamba_server.server.text.tool_calls import TOOL_TAGS

# Maximum number of characters of a template. The longest published templates have 30 thousand characters.
_MAX_TEMPLATE_CHARS = 1 << 20
MAX_SAVE_AFTER = 4  # maximum number of messages after which a request may ask for a saved state, as in Anthropic's API
MAX_LOCATED = 140  # number of messages whose beginning is looked for; this takes at most five renderings
_OWN_VARIABLES = frozenset({"messages", "add_generation_prompt"})
_API_FIELDS = frozenset({"tools", "documents"})
_ASSISTANT = "<|assistant|>"
_THINK, _END_OF_THINK = "<think>", "</think>"
# Number of the mark that is put at the end of the last message if the reply must continue that message.
_CUT = MAX_PLACES - 1


class RenderOptions(TypedDict, total=False):
    """How a conversation is rendered. Every option may be left out.

    `tools` are objects of the form {"type": "function", "function": {...}}. `documents` are texts that the template
    puts into the prompt. `kwargs` are further variables of the template (a client's chat_template_kwargs).
    `add_generation_prompt` ends the prompt with the beginning of an assistant's message; its default is true. With
    `continue_final_message` the prompt instead ends with the content of the last message, or with its reasoning if it
    has no content, so the reply continues that text. The `reasoning_effort` "none" makes the model answer without
    reasoning first: the prompt ends with empty reasoning, whose end tag is already there. Other efforts are passed to
    the template if it has a variable `reasoning_effort`. `save_after` are indices of at most MAX_SAVE_AFTER messages
    after which the model's state should be saved. With `with_message_starts`, the result has the positions at which
    messages begin.
    """

    tools: Sequence[Any]
    documents: Sequence[Any]
    kwargs: Mapping[str, object]
    add_generation_prompt: bool
    continue_final_message: bool
    reasoning_effort: str | None
    save_after: Sequence[int]
    with_message_starts: bool


@dataclass(frozen=True, slots=True)
class RenderedText:
    """The text that a chat template made, before it is encoded.

    The text still contains the marks that the class `SpecialText` has inserted into the client's text. `boundaries` are
    the offsets of message boundaries in the text, in characters. `message_starts` are the offsets at which the messages
    begin, in their order, or nothing if they were not asked for. `opens_reasoning` has the same meaning as in
    `RenderedChat`.
    """

    marked: str
    boundaries: list[int]
    opens_reasoning: bool
    message_starts: list[int] = field(default_factory=list[int])


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The prompt that a chat template makes from messages, as text and as token ids.

    `save_positions` are offsets into `prompt_ids` at message boundaries. Later requests are likely to begin with the
    same tokens up to such an offset, so a saved state is useful there. `strip_leading_space` is true if the reply will
    begin with a space that belongs to the template. `message_starts` are the offsets into `prompt_ids` at which the
    messages begin, if they were asked for. `opens_reasoning` is true if the prompt has a tag <think> without
    its end tag, so that the reply begins with reasoning.
    """

    text: str
    prompt_ids: list[int]
    save_positions: tuple[int, ...]
    strip_leading_space: bool
    opens_reasoning: bool
    message_starts: tuple[int, ...] = ()


class ChatTemplate:
    """A chat template with its tokenizer. It is immutable, so several threads may share it.

    `variables` are the names that the template reads. The template would ignore any other name in `kwargs`, so `render`
    refuses other names.
    """

    def __init__(self, template: str, tokenizer: Tokenizer, renderer: Renderer | None = None) -> None:
        """Compiles the template. If `renderer` is None, the template is rendered in this process. Raises
        CheckpointError if the template does not compile."""
        self.source = template
        self._renderer = renderer or _local_renderer()
        if len(template) > _MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"The chat template has {len(template):,} characters; at most {_MAX_TEMPLATE_CHARS:,} are expected."
            )
        try:
            compiled = self._renderer.compile(template)
        except RendererStopped as stop:
            raise CheckpointError(f"The chat template does not compile: it {stop}.") from stop
        if compiled.error:
            raise CheckpointError(f"The chat template does not compile: {compiled.error}.")
        self.variables = compiled.variables
        self._tokenizer = tokenizer
        self._special_text = SpecialText(tokenizer.special_tokens)
        # The token ids that the tokenizer adds before every text: the token id of BOS, or none.
        self._bos = tokenizer.encode("")

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer: Tokenizer, override: Path | None = None, renderer: Renderer | None = None
    ) -> ChatTemplate | None:
        """Reads the chat template. The argument `override` wins over chat_template.jinja, and chat_template.jinja over
        tokenizer_config.json.

        Returns None if the checkpoint has no template. Raises ConfigError if a file cannot be read and CheckpointError
        if the template does not compile.
        """
        if override is not None:
            if (text := read_text(override)) is None:
                raise ConfigError(f"The chat template {override} cannot be read: there is no such file.")
            return cls(text, tokenizer, renderer)
        if (text := checkpoint.read_text(checkpoint.open_checkpoint(folder), "chat_template.jinja")) is not None:
            return cls(text, tokenizer, renderer)
        template = read_tokenizer_config(folder).chat_template
        if isinstance(template, list):
            by_name = {named.name: named.template for named in template}
            if "default" not in by_name:
                raise CheckpointError(
                    f"{folder / 'tokenizer_config.json'} has the chat templates {', '.join(by_name) or '(none)'}, but "
                    'none named "default"; pass one as a file with --chat-template.'
                )
            template = by_name["default"]
        return cls(template, tokenizer, renderer) if template is not None else None

    def with_source(self, template: str) -> ChatTemplate:
        """Returns a `ChatTemplate` with the same tokenizer and another template text, which a request has sent. Raises
        RequestRejected if that template does not compile."""
        try:
            return ChatTemplate(template, self._tokenizer, self._renderer)
        except CheckpointError as error:
            raise RequestRejected(str(error), param="chat_template") from error

    @property
    def tool_format(self) -> ToolStyle | None:
        """Returns the style in which the template writes tool calls, or None if the template does not show tools to the
        model.

        If the template has the tags of both styles, the style whose tags are single tokens of the vocabulary is chosen.
        """
        if "tools" not in self.variables:
            return None
        written = [style for style, tags in TOOL_TAGS.items() if tags.start in self.source]
        in_vocabulary = [style for style in written if all(tag in self._tokenizer.tags for tag in TOOL_TAGS[style])]
        return next(iter(in_vocabulary or written), None)

    def render(self, messages: Sequence[Message], **options: Unpack[RenderOptions]) -> RenderedChat:
        """Renders the messages of a conversation with the template and returns the prompt.

        Special tokens in messages and options become ordinary text. The prompt begins with exactly one BOS, also if
        both the template and the post-processor add one. Raises RequestRejected with the template's own message.
        """
        return self.encode(self.render_text(messages, **options))

    def render_text(self, messages: Sequence[Message], **options: Unpack[RenderOptions]) -> RenderedText:
        """Renders the messages without encoding the text. Raises RequestRejected with the template's own message."""
        try:
            safe = cast(Messages, [self._special_text.protect(template_message(message)) for message in messages])
            return self._render_text(safe, options)
        except RendererStopped as stop:
            raise RequestRejected(f"The chat template {stop}.", param="messages") from stop
        except UnicodeEncodeError as error:
            raise RequestRejected("The text holds half of a surrogate pair.", param="messages") from error
        except RecursionError as error:
            raise RequestRejected("The messages or the tools are nested too deeply.", param="messages") from error

    def _render_text(self, messages: Messages, options: RenderOptions) -> RenderedText:
        variables, closes_reasoning = self._variables(options)
        final_text = None
        if options.get("continue_final_message"):
            variables["add_generation_prompt"] = False
            messages, final_text = _with_cut(messages)
        counts = boundary_counts(messages, _checked_indices(options.get("save_after", ()), len(messages)))
        by_count = {count: place for count in counts if (place := place_of(count, messages)) is not None}
        # The end of the client's text is marked as well, because the method `_opens_reasoning` needs its offset.
        end = None if final_text is not None else place_of(len(messages), messages)
        places = list(dict.fromkeys([*by_count.values(), *([end] if end else [])]))
        marked = mark(messages, places)
        plain, with_marks, later = self._run(variables, (messages, marked, next_turn(marked)))
        if plain.error:
            raise RequestRejected(f"The chat template refuses these messages: {plain.error}", param="messages")
        text, _ = _finish(plain.text, final_text)
        offsets = _offsets(with_marks, later, final_text, text)
        found = {count: offsets[n] for count, place in by_count.items() if (n := places.index(place)) in offsets}
        boundaries = [*found.values(), *self._prefix_lengths(text, messages, variables, set(counts) - found.keys())]
        starts = self._message_starts(text, messages, variables, found) if options.get("with_message_starts") else []
        client_end = offsets.get(places.index(end), 0) if end else 0
        opens_reasoning = self._opens_reasoning(text, client_end)
        if opens_reasoning and closes_reasoning:
            # Chat templates write reasoning as "<think>\n...\n</think>\n\n". The added text has the same line feeds.
            text += "\n" * (1 + text.endswith(_THINK)) + _END_OF_THINK + "\n\n"
        return RenderedText(text, boundaries, opens_reasoning and not closes_reasoning, starts)

    def _run(self, variables: Mapping[str, object], conversations: Sequence[Messages]) -> list[Rendering]:
        """Renders several conversations with the chat template. All of them get the same variables."""
        return self._renderer.render(self.source, [{**variables, "messages": turns} for turns in conversations])

    def _message_starts(
        self, text: str, messages: Messages, variables: Mapping[str, object], boundaries: Mapping[int, int]
    ) -> list[int]:
        """Returns the offset in the prompt `text` at which each message begins. A message whose beginning no mark can
        show gets the offset of the message before it. The last MAX_LOCATED messages are looked for. `boundaries` has
        the offsets that are known already, by the number of messages before them."""
        first = max(1, len(messages) - MAX_LOCATED)
        places = {i: place for i in range(first, len(messages)) if (place := place_of(i, messages)) is not None}
        numbers = list(places)
        batches = [numbers[i : i + _CUT] for i in range(0, len(numbers), _CUT)]
        rendered = self._run(variables, [mark(messages, [places[i] for i in batch]) for batch in batches])
        found: dict[int, int] = {}
        for batch, result in zip(batches, rendered, strict=True):
            unmarked, offsets = take_places(result.text)
            if not result.error and text.startswith(unmarked[: len(text)]):
                first_offsets = dict(reversed(offsets))
                found |= {i: first_offsets[n] for n, i in enumerate(batch) if n in first_offsets}
        found |= boundaries
        starts = [0]
        for i in range(1, len(messages)):
            starts.append(max(starts[-1], _before_spaces(text, found[i]) if i in found else 0))
        return starts

    def _prefix_lengths(
        self, text: str, messages: Messages, variables: Mapping[str, object], counts: AbstractSet[int]
    ) -> list[int]:
        """Finds message boundaries where no mark could be inserted. A boundary is given by the number of messages
        before it, in `counts`. Returns the boundaries as offsets in the prompt `text`.

        To find a boundary, the messages before it are rendered alone. If the prompt begins with that text, the boundary
        is at its end; otherwise it is left out.
        """
        if not counts:
            return []
        alone = {**variables, "add_generation_prompt": False}
        prefixes = self._run(alone, [messages[:count] for count in counts])
        return [len(found.text) for found in prefixes if not found.error and text.startswith(found.text)]

    def _opens_reasoning(self, text: str, client_end: int) -> bool:
        """Returns whether the text that the template has added after the last message has a tag <think> without its end
        tag. The last message ends at the offset `client_end`, or before the template's last special token if that comes
        later."""
        tail = ""
        for place, part in reversed(list(enumerate(self._special_text.split(text)))):
            if place % 2 and part not in (_THINK, _END_OF_THINK):
                break
            tail = part + tail
        tail = text[max(client_end, len(text) - len(tail)) :]
        return tail.rfind(_THINK) > tail.rfind(_END_OF_THINK)

    def _variables(self, options: RenderOptions) -> tuple[dict[str, object], bool]:
        """Returns the variables of the template except the messages. Also returns whether reasoning that the prompt
        begins must be ended in the prompt.

        `tools` and `documents` are always defined, because templates for the library transformers read them without
        checking that they are defined.
        """
        kwargs = dict(options.get("kwargs") or {})
        for name in _API_FIELDS:
            if value := options.get(name):
                if kwargs.get(name):
                    why = f"`{name}` is sent both in chat_template_kwargs and as a field; send one of them."
                    raise RequestRejected(why, param="chat_template_kwargs")
                kwargs[name] = value
        closes_reasoning = self._set_reasoning(kwargs, options.get("reasoning_effort"))
        self._check_names(kwargs)
        variables = {
            **self._tokenizer.named_tokens,
            "tools": None,
            "documents": None,
            **{name: self._special_text.protect(value) for name, value in kwargs.items()},
            "add_generation_prompt": options.get("add_generation_prompt", True),
        }
        return variables, closes_reasoning

    def _set_reasoning(self, kwargs: dict[str, object], effort: str | None) -> bool:
        """Translates the reasoning effort to variables of the template. Returns whether reasoning that the prompt
        begins must be ended in the prompt.

        Clients may set the variable `enable_thinking` for every template that begins the reasoning, even if the
        template does not read this variable.
        """
        enabled = kwargs.get("enable_thinking")
        if effort == "none" and enabled is True:
            why = 'reasoning_effort is "none", but chat_template_kwargs has enable_thinking: true; send one of them.'
            raise RequestRejected(why, param="reasoning_effort")
        closes = effort == "none" or enabled is False
        if "enable_thinking" in self.variables:
            if effort == "none":
                kwargs["enable_thinking"] = False
        elif enabled is False or (enabled is True and _THINK in self.source):
            del kwargs["enable_thinking"]
        if effort not in (None, "none") and "reasoning_effort" in self.variables:
            kwargs.setdefault("reasoning_effort", effort)
        return closes

    def _check_names(self, kwargs: Mapping[str, object]) -> None:
        for name in kwargs:
            param = name if name in _API_FIELDS else "chat_template_kwargs"
            if name in _OWN_VARIABLES or name in self._tokenizer.named_tokens:
                raise RequestRejected(f"`{name}` cannot be set by chat_template_kwargs.", param=param)
            if name not in self.variables:
                raise RequestRejected(
                    f"This model's chat template has no variable `{name[:MAX_ERROR_CHARS]}`.", param=param
                )

    def encode(self, rendered: RenderedText) -> RenderedChat:
        """Converts a rendered prompt to token ids."""
        prompt_ids, offsets = self._encode(rendered.marked, rendered.boundaries)
        if prompt_ids[: len(self._bos)] != self._bos:
            prompt_ids = self._bos + prompt_ids
            offsets = [offset + len(self._bos) for offset in offsets]
        starts = self._encode(rendered.marked, rendered.message_starts)[1] if rendered.message_starts else []
        return RenderedChat(
            text=restore(rendered.marked),
            prompt_ids=prompt_ids,
            save_positions=tuple(sorted({offset for offset in offsets if 0 < offset < len(prompt_ids)})),
            strip_leading_space=prompt_ids[-1:] == [self._tokenizer.special_tokens.get(_ASSISTANT)],
            opens_reasoning=rendered.opens_reasoning,
            message_starts=tuple(starts),
        )

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


def _local_renderer() -> Renderer:
    # This import loads Jinja, which the HTTP process does not need.
    from jamba_server.server.text.rendering.local import LocalRenderer

    return LocalRenderer()


def _checked_indices(save_after: Sequence[int], num_messages: int) -> Sequence[int]:
    if len(save_after) > MAX_SAVE_AFTER:
        why = f"A state can be saved after at most {MAX_SAVE_AFTER} messages; this request names {len(save_after)}."
        raise RequestRejected(why, param="messages")
    assert all(0 <= index < num_messages for index in save_after), "the route takes the indices from the messages"
    return save_after


def _with_cut(messages: Messages) -> tuple[Messages, str]:
    """Prepares messages for a reply that continues the last message. Returns the messages with the mark _CUT at the end
    of the text that the reply continues, and that text. The text is the last message's content, or its reasoning if it
    has no content.

    A space is added after the mark. If the space is missing in the rendered prompt, the template strips white space at
    the end of messages.
    """
    last = messages[-1]
    if last.get("tool_calls"):
        raise RequestRejected("The last message has tool calls, so it cannot be continued.", param="messages")
    names = ["content"]
    if last["content"] == "" and (names_of_reasoning := [name for name in REASONING_FIELDS if last.get(name)]):
        names = names_of_reasoning
    text = last[names[0]]
    if not isinstance(text, str):
        raise RequestRejected("The last message is no text, so it cannot be continued.", param="messages")
    continued = last | {name: f"{text}{place_mark(_CUT)} " for name in names}
    return [*messages[:-1], continued], text


def _finish(rendered: str, final_text: str | None) -> tuple[str, dict[int, int]]:
    """Removes the marks from a rendered prompt. If the reply continues `final_text`, everything after the last mark
    _CUT is removed, too. Returns the prompt, and for the number of each mark the first offset at which the mark
    stood."""
    text, places = take_places(rendered)
    offsets = dict(reversed(places))
    if final_text is None:
        return text, offsets
    cut = max((offset for number, offset in places if number == _CUT), default=None)
    if cut is None or final_text.strip() not in text:
        why = "The last message cannot be continued, because the chat template does not show its text unchanged."
        raise RequestRejected(why, param="messages")
    return (text[:cut] if text[cut : cut + 1] == " " else text[:cut].rstrip()), offsets


def _offsets(marked: Rendering, later: Rendering, final_text: str | None, text: str) -> dict[int, int]:
    """Returns the offset of each message boundary in the prompt `text`, under the number of its mark. `marked` is the
    same prompt with the marks, and `later` is the marked prompt of the conversation's next turn. Boundaries after the
    first difference between these two prompts are moved to that difference, because later requests share only the text
    before it. A boundary is also moved before any spaces, because the tokenizer joins a space with the following word.

    If the marks have changed the rest of the prompt, for example because the template cuts long messages, the result is
    empty.
    """
    if marked.error or (final_text is not None and place_mark(_CUT) not in marked.text):
        return {}
    unmarked, offsets = _finish(marked.text, final_text)
    if unmarked != text:
        return {}
    limit = len(text)
    if not later.error:
        common = marked.text[: common_length(marked.text, later.text)].removesuffix(MARK)
        limit = min(limit, len(take_places(common)[0]))
    return {number: _before_spaces(text, min(offset, limit)) for number, offset in offsets.items()}


def _before_spaces(text: str, offset: int) -> int:
    while offset > 0 and text[offset - 1] == " ":
        offset -= 1
    return offset
