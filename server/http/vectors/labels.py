"""Computes the log-probabilities of labels as continuations of prompts.

A step computes the prompt and reads the log-probabilities of the first tokens of all labels. The state after the prompt
is then in the prefix cache, and each label with several tokens goes on from there as a fork of its own. If several
prompts begin alike, their common beginning is computed first, alone, so that it is computed once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from jamba_server.server.http.vectors.run import VectorPrompt, VectorRun

# The name of the prompt that consists of the common beginning of all prompts.
SHARED: Final = "shared"
# The largest number of prompts whose labels are computed at the same time.
MAX_PROMPTS_AT_ONCE: Final = 32

Labels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LabelPrompt:
    """A prompt and the token ids of the labels that may follow it. Each label has at least one token."""

    token_ids: list[int]
    labels: Labels
    save_positions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelScores:
    """The log-probability of each label of each prompt: the sum over its tokens. `num_tokens` counts the tokens of all
    prompts, their common beginning once, and `num_cached` those of them that were found in the prefix cache."""

    logprobs: list[list[float]]
    num_tokens: int
    num_shared: int
    num_cached: int


async def score_labels(run: VectorRun, prompts: Sequence[LabelPrompt]) -> LabelScores:
    """Returns the log-probabilities of all labels. Raises what `VectorRun` raises."""
    shared = common_beginning([prompt.token_ids for prompt in prompts]) if len(prompts) > 1 else 0
    if shared < run.block_size:
        shared = 0  # computing so few tokens again costs less than another step
    counted = {str(n): prompt.token_ids[shared:] for n, prompt in enumerate(prompts)}
    if shared:
        counted[SHARED] = prompts[0].token_ids[:shared]
    slots = asyncio.Semaphore(run.at_most(MAX_PROMPTS_AT_ONCE))

    async def score(name: str, prompt: LabelPrompt) -> tuple[list[float], int]:
        async with slots:
            return await _score(run, name, prompt)

    async with run.admitted(counted):
        num_cached = 0
        if shared:
            beginning = VectorPrompt(prompts[0].token_ids[:shared], "score")
            num_cached = (await run.vectors({SHARED: beginning}))[SHARED].num_cached
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(score(str(n), prompt)) for n, prompt in enumerate(prompts)]
        except BaseExceptionGroup as errors:
            raise _first_of(errors) from None
    results = [task.result() for task in tasks]
    if not shared:
        num_cached = sum(cached for _, cached in results)
    total = sum(map(len, counted.values()))
    return LabelScores([logprobs for logprobs, _ in results], total, shared, num_cached)


async def _score(run: VectorRun, name: str, prompt: LabelPrompt) -> tuple[list[float], int]:
    """Returns the log-probabilities of the labels of one prompt, and how many of its tokens were cached."""
    tokens, labels = prompt.token_ids, prompt.labels
    firsts = tuple(dict.fromkeys(label[0] for label in labels))
    whole = VectorPrompt(tokens, "score", targets=(firsts,), save_positions=prompt.save_positions)
    [first] = (await run.vectors({name: whole})).values()
    begins = dict(zip(firsts, first.numbers.tolist(), strict=True))
    forks = {
        f"{name}-{position}": VectorPrompt([*tokens, *label[:-1]], "score", targets=tuple((id_,) for id_ in label[1:]))
        for position, label in enumerate(labels)
        if len(label) > 1
    }
    rest = await run.vectors(forks) if forks else {}
    logprobs = [begins[label[0]] for label in labels]
    for position in range(len(labels)):
        if (fork := rest.get(f"{name}-{position}")) is not None:
            logprobs[position] = sum(fork.numbers.tolist(), start=logprobs[position])
    return logprobs, first.num_cached


def common_beginning(prompts: Sequence[list[int]]) -> int:
    """Returns how many tokens all prompts begin with alike. Each prompt keeps at least one token of its own."""
    shortest, longest = min(prompts), max(prompts)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(shortest, longest, strict=False)))
    return min(common, min(map(len, prompts)) - 1)


def _first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
