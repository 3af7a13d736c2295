"""The class `Choice` turns the tokens that the engine generates for one choice into text, log-probabilities and a
finish reason.

A choice is one of the alternative continuations of a prompt in OpenAI's API: an HTTP request has `n` choices for each
of its prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jamba_server.engine.types import Request, TokenLogprob, TokenUpdate
from jamba_server.server.http.schemas.base import FinishReason
from jamba_server.server.text.detokenizer import Detokenizer
from jamba_server.server.text.filters import Chain
from jamba_server.server.text.parts import Part, Text, ToolCall, join
from jamba_server.server.text.reasoning import THINK_TAGS, ReasoningFilter
from jamba_server.server.text.stop import StopStrings
from jamba_server.server.text.tokenizer import Tokenizer
from jamba_server.server.text.tool_calls import ToolCallFilter, ToolCallOptions

MIN_LOGPROB = -9999.0  # replies show lower log-probabilities as this one, as in vLLM; JSON lacks minus infinity


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token of a reply, or of a prompt that the reply repeats (`echo`), with the token's log-probability.

    The field `top` has the most likely tokens at the same position, as pairs of token id and log-probability. The field
    `offset` is the number of characters of the choice's text before this token. The field `logprob` is None only for
    the first token of a prompt, because the model predicts only the tokens after it.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDelta:
    """What is new in a choice since the choice's previous delta: parts of the reply, log-probabilities and finish
    reason. The field `parts` has the parts in the order in which the model wrote them.

    The field `token_ids` has the generated tokens. If the request asks for log-probabilities, `scores` has those of the
    generated tokens, and `prompt_scores` those of the prompt's tokens. If the text repeats the prompt (`echo`), the
    prompt's log-probabilities are also in `scores`. The field `index` is the number of the choice in the HTTP reply.
    The field `stop_reason` is the stop string, or the token id from the request's `stop_token_ids`, that ended the
    choice. It is None while the choice has not ended, and for choices that ended for another reason.
    """

    index: int
    parts: tuple[Part, ...] = ()
    token_ids: tuple[int, ...] = ()
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        """Returns the delta's ordinary text, without reasoning and tool calls."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """The options of a request that decide how the tokens of its choices become the parts of a reply.

    If `thinking` is None, the model's reasoning is not separated from the content. If `thinking` is true, the prompt
    already has the start tag of the reasoning, so the reply begins with reasoning. If `tool_calls` is None, tool calls
    are treated as ordinary text.
    """

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    strip_leading_space: bool = False
    echo: bool = False
    thinking: bool | None = None
    tool_calls: ToolCallOptions | None = None

    def tags(self) -> Iterator[str]:
        """Yields the tags of reasoning and tool calls, such as `<think>`, that the content filters look for."""
        if self.thinking is not None:
            yield from THINK_TAGS
        if self.tool_calls is not None:
            yield from self.tool_calls.tags


class Choice:
    """Turns the engine's updates for one choice into pieces of the reply, objects of the class `ChoiceDelta`.

    The argument `request` is the engine's request for this choice. The argument `index` is the number of the choice in
    the HTTP reply.
    """

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer, options: TextOptions) -> None:
        self.request, self.index = request, index
        self.num_tokens = self.num_reasoning_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._include_stop = options.include_stop
        self._bos_token_id = tokenizer.bos_token_id
        special = tokenizer.special_tokens
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            kept_tokens=frozenset(special[tag] for tag in options.tags() if tag in special),
            strip_leading_space=options.strip_leading_space,
        )
        self._stops = StopStrings(options.stops, include=options.include_stop)
        self._reasoning = None if options.thinking is None else ReasoningFilter(thinking=options.thinking)
        self._tool_calls = None if options.tool_calls is None else ToolCallFilter(options.tool_calls)
        self._filters = Chain([filter_ for filter_ in (self._reasoning, self._tool_calls) if filter_ is not None])
        self._to_echo = request.prompt if options.echo else []
        self._num_taken = 0  # number of the prompt's tokens that the method `_take_prompt` has processed
        # The following attributes have the data of the next delta. The parts do not include text that the filters still
        # hold back.
        self._parts: list[Part] = []
        self._token_ids: list[int] = []
        self._scores: list[TokenScore] = []
        self._prompt_scores: list[TokenScore] = []
        # number of characters of all decoded tokens, including characters that the filters hold back
        self._num_chars = 0

    def take(self, update: TokenUpdate) -> ChoiceDelta | None:
        """Adds the tokens of the argument `update` to the choice and returns the delta that can be sent now.

        Returns None if there is no part to send yet and the choice has not ended. In this case the tokens and their
        log-probabilities are sent with the next delta.
        """
        self._take_prompt(update)
        for i, token_id in enumerate(update.token_ids):
            ends = update.stop_token_id is not None and i == len(update.token_ids) - 1
            self._add(token_id, update.logprobs[i] if update.logprobs else None, silent=ends and not self._include_stop)
            if self.finish_reason:  # a stop string ended the choice, so the later tokens of the update are dropped
                break
        if update.finish_reason and not self.finish_reason:
            self._finish(update)
        if not self._parts and not self.finish_reason:
            return None
        delta = ChoiceDelta(
            index=self.index,
            parts=join(self._parts),
            token_ids=tuple(self._token_ids),
            scores=tuple(self._scores),
            prompt_scores=tuple(self._prompt_scores),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self._parts, self._token_ids, self._scores, self._prompt_scores = [], [], [], []
        return delta

    def _take_prompt(self, update: TokenUpdate) -> None:
        """Takes the log-probabilities of the prompt and, if the request has `echo`, adds the prompt's text.

        If the request asks for the log-probabilities of the prompt, the text of each prompt token is added when the
        token's log-probability arrives. Otherwise the prompt's whole text is added at the first update. The text
        of the prompt is not searched for stop strings.
        """
        with_scores = self.request.params.prompt_logprobs is not None
        end = self._num_taken + len(update.prompt_logprobs) if with_scores else len(self._to_echo)
        for position in range(self._num_taken, end):
            token_id = self.request.prompt[position]
            if with_scores:
                score = self._score(token_id, update.prompt_logprobs[position - self._num_taken])
                self._prompt_scores.append(score)
                if self._to_echo:
                    self._scores.append(score)
            # The begin-of-text token at the start is not part of the text.
            if self._to_echo and (position or token_id != self._bos_token_id):
                self._deliver([Text(self._decode(token_id))])
        self._num_taken = end

    def _add(self, token_id: int, logprob: TokenLogprob | None, *, silent: bool) -> None:
        self.num_tokens += 1
        self._token_ids.append(token_id)
        if logprob is not None:
            self._scores.append(self._score(token_id, logprob))
        text = "" if silent else self._decode(token_id)
        was_thinking = self._is_thinking
        if self.num_tokens <= self.request.params.min_tokens:
            self._filter([Text(text)])
        else:
            self._emit(text)
        self.num_reasoning_tokens += was_thinking or self._is_thinking

    @property
    def _is_thinking(self) -> bool:
        return self._reasoning is not None and self._reasoning.thinking

    def _finish(self, update: TokenUpdate) -> None:
        self._emit(self._detokenizer.finish())
        if self.finish_reason:
            return
        assert update.finish_reason != "error", "a failed request has no reply"
        self._filter(self._stops.flush())
        self._end(update.finish_reason)
        if update.stop_token_id in self.request.params.stop_token_ids:
            self.stop_reason = update.stop_token_id

    def _emit(self, text: str) -> None:
        """Passes generated text through all filters. If the text has a stop string, the choice ends there."""
        self._filter(self._stops.push(Text(text)))
        if self._stops.matched is not None:
            self._end("stop")
            self.stop_reason = self._stops.matched

    def _filter(self, parts: Iterable[Part]) -> None:
        """Passes parts through the filters that follow the search for stop strings."""
        for part in parts:
            self._deliver(self._filters.push(part))

    def _deliver(self, parts: Iterable[Part]) -> None:
        self._parts += [part for part in parts if isinstance(part, ToolCall) or part.text]

    def _end(self, reason: FinishReason | None) -> None:
        """Ends the choice. A reply that ended by itself and has complete tool calls has the finish reason
        "tool_calls"."""
        self._deliver(self._filters.flush())
        calls = self._tool_calls
        has_calls = calls is not None and calls.num_calls > 0 and not calls.is_cut_off
        self.finish_reason = "tool_calls" if reason == "stop" and has_calls else reason

    def _decode(self, token_id: int) -> str:
        text = self._detokenizer.push([token_id])
        self._num_chars += len(text)
        return text

    def _score(self, token_id: int, logprob: TokenLogprob | None) -> TokenScore:
        if logprob is None:
            return TokenScore(token_id, None, (), self._num_chars)
        top = tuple((id_, max(value, MIN_LOGPROB)) for id_, value in logprob.top)
        return TokenScore(token_id, max(logprob.logprob, MIN_LOGPROB), top, self._num_chars)


def merge(deltas: list[ChoiceDelta]) -> ChoiceDelta:
    """Joins all deltas of one choice, in the order of the list, into a single delta."""
    last = deltas[-1]
    return ChoiceDelta(
        index=last.index,
        parts=join(part for delta in deltas for part in delta.parts),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        scores=tuple(score for delta in deltas for score in delta.scores),
        prompt_scores=tuple(score for delta in deltas for score in delta.prompt_scores),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
