"""The class `Choice` turns the tokens that the engine generates for one choice into text, log-probabilities and a
finish reason.

A choice is one of the alternative continuations of a prompt in OpenAI's API: an HTTP request has `n` choices for each
of its prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

from jamba_server.engine.types import Request, TokenLogprob, TokenUpdate
from jamba_server.server.http.schemas.base import FinishReason
from jamba_server.server.text.detokenizer import Detokenizer
from jamba_server.server.text.parts import Part, Text, join
from jamba_server.server.text.stop import StopStrings
from jamba_server.server.text.tokenizer import Tokenizer

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

    The field `index` is the number of the choice in the HTTP reply. The field `stop_reason` is the stop string, or the
    token id from the request's `stop_token_ids`, that ended the choice. The field `stop_reason` is None while the
    choice has not ended, and for choices that ended for another reason.
    """

    index: int
    parts: tuple[Part, ...] = ()
    scores: tuple[TokenScore, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        """The delta's ordinary text, without reasoning and tool calls."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """The options of a request that decide how the tokens of its choices become text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    strip_leading_space: bool = False
    echo: bool = False


class Choice:
    """Turns the engine's updates for one choice into pieces of the reply, objects of the class `ChoiceDelta`.

    The argument `request` is the engine's request for this choice. The argument `index` is the number of the choice in
    the HTTP reply.
    """

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer, options: TextOptions) -> None:
        self.request, self.index = request, index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._include_stop = options.include_stop
        self._bos_token_id = tokenizer.bos_token_id
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            strip_leading_space=options.strip_leading_space,
        )
        self._stops = StopStrings(options.stops, include=options.include_stop)
        self._to_echo = request.prompt if options.echo else []
        self._num_echoed = 0
        self._text = ""  # text for the next delta, without characters that might be the start of a stop string
        self._scores: list[TokenScore] = []
        # number of characters of all decoded tokens, including characters that might be the start of a stop string
        self._num_chars = 0

    def take(self, update: TokenUpdate) -> ChoiceDelta | None:
        """Adds the tokens of the argument `update` to the choice and returns the delta that can be sent now.

        Returns None if there is no text to send yet and the choice has not ended. In this case the log-probabilities of
        the tokens are sent with the next delta.
        """
        self._echo(update)
        for i, token_id in enumerate(update.token_ids):
            ends = update.stop_token_id is not None and i == len(update.token_ids) - 1
            self._add(token_id, update.logprobs[i] if update.logprobs else None, silent=ends and not self._include_stop)
            if self.finish_reason:  # a stop string ended the choice, so the later tokens of the update are dropped
                break
        if update.finish_reason and not self.finish_reason:
            self._finish(update)
        if not self._text and not self.finish_reason:
            return None
        delta = ChoiceDelta(
            index=self.index,
            parts=(Text(self._text),) if self._text else (),
            scores=tuple(self._scores),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self._text, self._scores = "", []
        return delta

    def _echo(self, update: TokenUpdate) -> None:
        """Adds the text of the prompt to the choice's text if the request has `echo`.

        If the request asks for the log-probabilities of the prompt, the text of each prompt token is added when the
        token's log-probability arrives. Otherwise the prompt's whole text is added at the first update. The text
        of the prompt is not searched for stop strings.
        """
        with_scores = self.request.params.prompt_logprobs is not None
        end = self._num_echoed + len(update.prompt_logprobs) if with_scores else len(self._to_echo)
        for position in range(self._num_echoed, end):
            token_id = self._to_echo[position]
            if with_scores:
                self._score(token_id, update.prompt_logprobs[position - self._num_echoed])
            if position or token_id != self._bos_token_id:  # the echoed text lacks the begin-of-text token
                self._text += self._decode(token_id)
        self._num_echoed = end

    def _add(self, token_id: int, logprob: TokenLogprob | None, *, silent: bool) -> None:
        self.num_tokens += 1
        if logprob is not None:
            self._score(token_id, logprob)
        text = "" if silent else self._decode(token_id)
        if self.num_tokens <= self.request.params.min_tokens:
            self._text += text
        else:
            self._emit(text)

    def _finish(self, update: TokenUpdate) -> None:
        self._emit(self._detokenizer.finish())
        if self.finish_reason:
            return
        assert update.finish_reason != "error", "a failed request has no reply"
        self._text += self._stops.flush()
        self.finish_reason = update.finish_reason
        if update.stop_token_id in self.request.params.stop_token_ids:
            self.stop_reason = update.stop_token_id

    def _emit(self, text: str) -> None:
        ready, matched = self._stops.push(text)
        self._text += ready
        if matched is not None:
            self.finish_reason, self.stop_reason = "stop", matched

    def _decode(self, token_id: int) -> str:
        text = self._detokenizer.push([token_id])
        self._num_chars += len(text)
        return text

    def _score(self, token_id: int, logprob: TokenLogprob | None) -> None:
        if logprob is None:
            self._scores.append(TokenScore(token_id, None, (), self._num_chars))
            return
        top = tuple((id_, max(value, MIN_LOGPROB)) for id_, value in logprob.top)
        self._scores.append(TokenScore(token_id, max(logprob.logprob, MIN_LOGPROB), top, self._num_chars))


def merge(deltas: list[ChoiceDelta]) -> ChoiceDelta:
    """Joins all deltas of one choice, in the order of the list, into a single delta."""
    last = deltas[-1]
    return ChoiceDelta(
        index=last.index,
        parts=join(part for delta in deltas for part in delta.parts),
        scores=tuple(score for delta in deltas for score in delta.scores),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
