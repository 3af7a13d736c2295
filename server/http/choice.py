"""`Choice` turns the tokens of one choice of a reply, as they arrive, into text, log-probabilities and a finish reason.

A request has `n` choices for each of its prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

from jamba_server.engine.types import Request, TokenLogprob, TokenUpdate
from jamba_server.server.http.schemas.base import FinishReason
from jamba_server.server.text.detokenizer import Detokenizer
from jamba_server.server.text.stop import StopStrings
from jamba_server.server.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # lowest log-probability sent, since JSON lacks minus infinity; as in vLLM


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token of a reply or an echoed prompt with its log-probability.

    `top` has the most likely tokens at the same position, as pairs of token id and log-probability. `offset` is the
    number of characters of the choice's text before this token. `logprob` is None only for a prompt's first token,
    which the model does not predict.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDelta:
    """The text, log-probabilities and finish reason that a choice has gained since its previous delta.

    `stop_reason` is the stop string, or the id from the request's `stop_token_ids`, that ended the choice.
    """

    index: int
    text: str = ""
    scores: tuple[TokenScore, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """The options of a request that decide how the tokens of its choices become text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    strip_leading_space: bool = False
    echo: bool = False


class Choice:
    """Turns the engine's updates for one `Request` into deltas, the pieces of a reply. `index` is the choice's number
    in the HTTP reply."""

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
        self._text = ""  # text for the next delta, without the characters held back as a possible stop string
        self._scores: list[TokenScore] = []
        # number of characters of all decoded tokens, including tokens held back as a possible stop string
        self._num_chars = 0

    def take(self, update: TokenUpdate) -> ChoiceDelta | None:
        """Adds the update and returns the delta that can be sent now, or None if there is no text to send yet.

        Log-probabilities are held back until there is text to send.
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
            text=self._text,
            scores=tuple(self._scores),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self._text, self._scores = "", []
        return delta

    def _echo(self, update: TokenUpdate) -> None:
        """Adds the text of the prompt, for requests with `echo`.

        The whole text is added at once, or in pieces as the prompt's log-probabilities arrive. Stop strings do not
        apply to the prompt.
        """
        with_scores = self.request.params.prompt_logprobs is not None
        end = self._num_echoed + len(update.prompt_logprobs) if with_scores else len(self._to_echo)
        for position in range(self._num_echoed, end):
            token_id = self._to_echo[position]
            if with_scores:
                self._score(token_id, update.prompt_logprobs[position - self._num_echoed])
            if position or token_id != self._bos_token_id:  # an echoed prompt leaves out the begin-of-text token
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
        text="".join(delta.text for delta in deltas),
        scores=tuple(score for delta in deltas for score in delta.scores),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
