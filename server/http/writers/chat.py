"""The class `ChatWriter` builds the replies of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jamba_server.server.http.choice import ChoiceDelta, TokenScore
from jamba_server.server.http.schemas.base import Usage
from jamba_server.server.http.schemas.chat_replies import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    FunctionDelta,
    FunctionReply,
    ReplyMessage,
    TokenLogprob,
    ToolCallDelta,
    ToolCallReply,
    TopLogprob,
)
from jamba_server.server.http.writers.writer import ChunkWriter, event
from jamba_server.server.text.parts import Part, Reasoning, Text, ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatWriter(ChunkWriter[ChunkChoice]):
    """Builds one `chat.completion` object for a whole reply, and one `chat.completion.chunk` object for each event of a
    stream. If `with_reasoning` is false, the model's thoughts are left out."""

    with_reasoning: bool = True

    def reply(self, choices: list[ChoiceDelta]) -> ChatCompletion:
        return ChatCompletion(
            id=self.generation.spec.id,
            created=self.created,
            model=self.model,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=self._message(choice),
                    logprobs=self._logprobs(choice.scores),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    token_ids=self._token_ids(choice),
                )
                for choice in choices
            ],
            usage=self.generation.usage,
            prompt_logprobs=self._prompt_logprobs(choices[0].prompt_scores),
            prompt_token_ids=self._prompt_token_ids(0),
            timings=self._timings,
            jamba_cache=self.generation.cache,
        )

    def begin(self) -> Iterable[bytes]:
        """Yields one event for each choice, with the role "assistant" and no text.

        These events tell the client that the engine has accepted the request.
        """
        for index in range(self.generation.num_choices):
            first = ChunkChoice(index=index, delta=Delta(role="assistant", content=""))
            chunk = self._chunk([first], self.generation.usage if self.with_usage_so_far else None)
            prompt_token_ids = self._prompt_token_ids(0) if index == 0 else None
            yield event(chunk.model_copy(update={"prompt_token_ids": prompt_token_ids}), exclude=self._excluded)

    def write(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """Yields the events of a delta: one or two for each part, and one with the finish reason.

        The first of these events has the delta's log-probabilities and token ids. If the delta has them but no parts,
        an event with empty content is sent.
        """
        messages = [message for part in delta.parts for message in self._deltas(part)]
        if not messages and (delta.scores or (self.with_token_ids and delta.token_ids)):
            messages = [Delta(content="")]
        logprobs, token_ids = self._logprobs(delta.scores), self._token_ids(delta)
        for message in messages:
            yield self._event(ChunkChoice(index=delta.index, delta=message, logprobs=logprobs, token_ids=token_ids))
            logprobs = token_ids = None
        if delta.finish_reason:
            yield self._event(
                ChunkChoice(
                    index=delta.index, delta=Delta(), finish_reason=delta.finish_reason, stop_reason=delta.stop_reason
                )
            )

    def _message(self, choice: ChoiceDelta) -> ReplyMessage:
        calls = [
            ToolCallReply(id=part.id, function=FunctionReply(name=part.name, arguments=part.arguments))
            for part in choice.parts
            if isinstance(part, ToolCall)
        ]
        message = ReplyMessage(role="assistant", content=choice.text or (None if calls else ""), refusal=None)
        thoughts = "".join(part.text for part in choice.parts if isinstance(part, Reasoning))
        if thoughts and self.with_reasoning:
            message["reasoning"] = message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = calls
        return message

    def _deltas(self, part: Part) -> Iterable[Delta]:
        """Yields the deltas of one part. The first delta of a tool call has its id and its name, and no arguments, as
        OpenAI's API sends it."""
        match part:
            case Text(text):
                yield Delta(content=text)
            case Reasoning(text):
                if self.with_reasoning:
                    yield Delta(reasoning=text, reasoning_content=text)
            case ToolCall(index, id_, name, arguments):
                if id_:
                    function = FunctionDelta(name=name, arguments="")
                    yield Delta(tool_calls=[ToolCallDelta(index=index, id=id_, type="function", function=function)])
                if arguments:
                    function = FunctionDelta(arguments=arguments)
                    yield Delta(tool_calls=[ToolCallDelta(index=index, function=function)])

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
