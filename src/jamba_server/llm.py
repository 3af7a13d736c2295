"""LLM: the engine in this process, for scripts and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.start.build import build_engine
from jamba_server.engine.types import FinishReason, Request, SamplingParams, TokenLogprob, TokenUpdate
from jamba_server.engine.validation import clamp_max_tokens, validate, validate_prompt


@dataclass(slots=True)
class Completion:
    """One choice. `text` is empty for a model without tokenizer.json. Log-probabilities are there if asked for."""

    prompt: list[int]
    index: int
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list["TokenLogprob | None"])
    finish_reason: FinishReason | None = None
    num_cached: int = 0
    text: str = ""

    def take(self, update: TokenUpdate) -> None:
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.finish_reason = update.finish_reason
        self.num_cached = self.num_cached if update.num_cached is None else update.num_cached


class LLM:
    """`LLM("folder", max_num_seqs=8).generate(["Once upon a time"], SamplingParams(max_tokens=32))`.

    Keyword arguments are the fields of `EngineConfig`. Raises ConfigError where one cannot be met.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        self.core = build_engine(msgspec.convert({"model": str(model), **settings}, EngineConfig))
        tokenizer = Path(model) / "tokenizer.json"
        self._tokenizer = Tokenizer.from_file(str(tokenizer)) if tokenizer.is_file() else None
        self._num_requests = 0

    def generate(
        self, prompts: Sequence[str | list[int]], params: SamplingParams | None = None, *, n: int = 1
    ) -> list[Completion]:
        """`n` completions of every prompt (text or token ids), prompt-major. Raises RequestRejected."""
        params = params or SamplingParams()
        open_: dict[str, Completion] = {}
        requests: list[Request] = []
        for prompt in prompts:
            ids = self._encode(prompt)
            checked = self._check(ids, params)
            group = f"prompt-{self._num_requests}"
            for index in range(n):
                request_id = f"llm-{self._num_requests}"
                self._num_requests += 1
                open_[request_id] = Completion(ids, index)
                requests.append(Request(id=request_id, prompt=ids, params=checked, index=index, group=group))
        self.core.inbox.submit(requests)
        completions = list(open_.values())
        try:
            while open_:
                for update in self.core.step().updates:
                    open_[update.request_id].take(update)
                    if update.finish_reason:
                        del open_[update.request_id]
        finally:
            self.core.inbox.abort(list(open_))  # an interrupt must not leave work for the next call
        for completion in completions:
            completion.text = self._decode(completion.token_ids)
        return completions

    def _check(self, prompt: list[int], params: SamplingParams) -> SamplingParams:
        info = self.core.info
        validate(params, vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids)
        validate_prompt(
            prompt,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            param="prompt",
            max_tokens=params.max_tokens,
        )
        return clamp_max_tokens(params, len(prompt), info.max_model_len)

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise CheckpointError("the model folder has no tokenizer.json; give prompts as token ids.")
        return self._tokenizer.encode(prompt).ids

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids) if self._tokenizer else ""
