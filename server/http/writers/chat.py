"""The class `ChatWriter` builds the replies of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jamba_server.server.http.choice import ChoiceDelta, TokenScore
from jamba_server.server.http.schemas.base import Usage
from jamba_server.server.http.schemas.chat import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    ReplyMessage,
    TokenLogprob,
    TopLogprob,
)
from jamba_server.server.http.writers.writer import ChunkWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatWriter(ChunkWriter[ChunkChoice]):
    """Builds one `chat.completion` object for a whole reply, and one `chat.completion.chunk` object for each event of a
    stream."""

    def reply(self, choices: list[ChoiceDelta]) -> ChatCompletion:
        return ChatCompletion(
            id=self.generation.spec.id,
            created=self.created,
            model=self.model,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=ReplyMessage(content=choice.text),
                    logprobs=self._logprobs(choice.scores),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                )
                for choice in choices
            ],
            usage=self.generation.usage,
        )

    def begin(self) -> Iterable[bytes]:
        """Yields one event for each choice, with the role "assistant" and no text.

        These events tell the client that the engine has accepted the request.
        """
        for index in range(self.generation.num_choices):
            yield self._event(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))

    def write(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """Yields an event with the delta's text and log-probabilities, and an event with the delta's finish reason.

        The first event is left out if the delta has no text and no log-probabilities. The second event is left out if
        the delta has no finish reason.
        """
        if delta.text or delta.scores:
            content = Delta(content=delta.text)
            yield self._event(ChunkChoice(index=delta.index, delta=content, logprobs=self._logprobs(delta.scores)))
        if delta.finish_reason:
            yield self._event(
                ChunkChoice(
                    index=delta.index, delta=Delta(), finish_reason=delta.finish_reason, stop_reason=delta.stop_reason
                )
            )

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
        id_ = self.generation.spec.id
        return ChatCompletionChunk(id=id_, created=self.created, model=self.model, choices=choices, usage=usage)

    def _logprobs(self, scores: Iterable[TokenScore]) -> ChatLogprobs | None:
        if not self.with_logprobs:
            return None
        return ChatLogprobs(content=[self._token_logprob(score) for score in scores])

    def _token_logprob(self, score: TokenScore) -> TokenLogprob:
        assert score.logprob is not None, "only an echoed prompt has a token without a log-probability"
        return TokenLogprob(
            token=self.tokenizer.token_text(score.token_id),
            logprob=score.logprob,
            bytes=list(self.tokenizer.token_bytes(score.token_id)),
            top_logprobs=[
                TopLogprob(
                    token=self.tokenizer.token_text(token_id),
                    logprob=logprob,
                    bytes=list(self.tokenizer.token_bytes(token_id)),
                )
                for token_id, logprob in score.top
            ],
        )
