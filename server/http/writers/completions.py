"""The class `CompletionWriter` builds the replies of /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jamba_server.server.http.choice import ChoiceDelta, TokenScore
from jamba_server.server.http.schemas.base import Usage
from jamba_server.server.http.schemas.completions import Completion, CompletionChoice, CompletionLogprobs
from jamba_server.server.http.writers.writer import ChunkWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionWriter(ChunkWriter[CompletionChoice]):
    """Builds `text_completion` objects. A reply without `stream` is one such object, and so is each event of a
    stream."""

    def reply(self, choices: list[ChoiceDelta]) -> Completion:
        chunk = self._chunk([self._choice(choice, whole=True) for choice in choices], self.generation.usage)
        return chunk.model_copy(update={"timings": self._timings, "jamba_cache": self.generation.cache})

    def begin(self) -> Iterable[bytes]:
        """Yields, with `return_token_ids`, one event for each choice, which has the token ids of its prompt."""
        if self.with_token_ids:
            for index in range(self.generation.num_choices):
                yield self._event(self._choice(ChoiceDelta(index=index), whole=True))

    def write(self, delta: ChoiceDelta) -> Iterable[bytes]:
        yield self._event(self._choice(delta))

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        id_ = self.generation.spec.id
        return Completion(id=id_, created=self.created, model=self.model, choices=choices, usage=usage)

    def _choice(self, delta: ChoiceDelta, *, whole: bool = False) -> CompletionChoice:
        """Returns the JSON object of a choice for one delta. If `whole` is true, the object also has the token ids and
        the log-probabilities of the prompt, which a reply has only once for each choice."""
        return CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._logprobs(delta.scores) if self.with_logprobs else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=self._token_ids(delta),
            prompt_token_ids=self._prompt_token_ids(delta.index // self.generation.spec.n) if whole else None,
            prompt_logprobs=self._prompt_logprobs(delta.prompt_scores) if whole else None,
        )

    def _logprobs(self, scores: Sequence[TokenScore]) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[self.tokenizer.token_text(score.token_id) for score in scores],
            token_logprobs=[score.logprob for score in scores],
            top_logprobs=[self._top(score) for score in scores],
            text_offset=[score.offset for score in scores],
        )

    def _top(self, score: TokenScore) -> dict[str, float] | None:
        """Returns the texts and log-probabilities of the most likely tokens at a position, the most likely token first.

        The last entry is the token of `score`, which the reply has at this position, unless an earlier entry has the
        same text as this token. If several tokens have the same text, only the most likely of these tokens is listed.
        """
        if score.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
            top.setdefault(self.tokenizer.token_text(token_id), logprob)
        return top
