"""What a chunk can ask for and bring: a token after each of its positions, several tokens at once, a vector."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path
from random import Random

from jamba_server.engine.cache.manager import CacheCopies
from jamba_server.engine.scheduler import Chunk, ChunkResult, SchedulerOutput
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.types import Request, SamplingParams, TokenUpdate
from jamba_server.llm import LLM
from tests.engine.simulator import make_scheduler
from tests.engine.test_exact import CONFIG


def test_a_token_can_be_chosen_after_each_position(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    llm, random = LLM(tmp_path, load_format="dummy", max_model_len=64, max_num_seqs=2, threads=1), Random(2)
    tokens = [random.randrange(3, 500) for _ in range(9)]
    params = SamplingParams(max_tokens=1, temperature=0.9, seed=3, logprobs=1)
    one_by_one = [llm.generate([tokens[: i + 1]], params)[0] for i in range(9)]
    request = Request(id="", prompt=tokens, params=params)
    chunks: list[Chunk] = []
    for unit, num_sampled in ((1, 9), (2, 4)):  # after each position, and after the last four
        seq = Sequence.of(request, arrival=unit, now=0.0)
        seq.block_ids, seq.state_id = array("i", [unit]), unit
        chunks.append(Chunk(seq, 0, 9, num_sampled))
    results = llm.core.model_runner.launch(SchedulerOutput(tuple(chunks), CacheCopies(), ())).results()
    for chunk, found in zip(chunks, results, strict=True):
        expected = one_by_one[9 - chunk.num_sampled :]
        assert list(found.token_ids) == [completion.token_ids[0] for completion in expected]
        assert list(found.logprobs) == [completion.logprobs[0] for completion in expected]


def bring(result: ChunkResult, **params: object) -> TokenUpdate:
    """Returns the updates of a request whose first chunk has the result `result`."""
    scheduler = make_scheduler()
    asked = SamplingParams(**{"max_tokens": 5, "stop_token_ids": (9,)} | params)  # type: ignore[arg-type]
    scheduler.add([Request(id="a", prompt=[1, 2, 3], params=asked)], now=0.0)
    output = scheduler.schedule(now=0.0)
    output = replace(output, chunks=(replace(output.chunks[0], num_sampled=len(result.token_ids)),))
    scheduler.advance(output)
    [update] = scheduler.update(output, [result])
    assert scheduler.has_work == (update.finish_reason is None)
    return update


def test_several_tokens_come_at_once_up_to_the_one_that_ends_the_reply() -> None:
    going_on, stopped, full = bring(ChunkResult((4, 5, 6))), bring(ChunkResult((4, 9, 6))), bring(ChunkResult((4,) * 7))
    assert (going_on.token_ids, going_on.finish_reason) == ([4, 5, 6], None)
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_token_id) == ([4, 9], "stop", 9)
    assert (full.token_ids, full.finish_reason) == ([4] * 5, "length")


def test_a_vector_ends_a_request_that_wants_no_token() -> None:
    update = bring(ChunkResult(vector=b"12345678"), max_tokens=0)
    assert (update.vector, update.token_ids, update.finish_reason) == (b"12345678", [], "length")
