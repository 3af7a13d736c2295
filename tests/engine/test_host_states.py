"""States in host memory, as a further kind of store: hits there give the tokens that the model would compute."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from jamba_server.engine.types import SamplingParams
from jamba_server.llm import LLM
from tests.engine.host_states import HostCopies, HostStates
from tests.engine.test_exact import CONFIG, result

RANDOM = Random(8)
PROMPTS = [[RANDOM.randrange(3, 500) for _ in range(RANDOM.randint(40, 80))] for _ in range(6)]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=2)


@pytest.mark.parametrize("ahead", [False, True])
def test_what_was_evicted_from_the_slots_comes_back(ahead: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def load() -> LLM:
        sizes = {"max_model_len": 256, "max_num_seqs": 2, "state_cache_memory_bytes": 0}
        return LLM(tmp_path, load_format="dummy", threads=1, async_scheduling=ahead, **sizes)

    plain, tiered = load(), load()
    core = tiered.core
    store = HostStates(num_slots=core.info.num_state_slots + 1, num_host=40)
    copies = HostCopies(core.model_runner.storage, core.model_runner.kernels, store)
    core.scheduler.cache.store, core.model_runner.states = store, copies
    expected = [result(plain.generate([prompt], GREEDY)[0]) for prompt in PROMPTS]
    assert [result(tiered.generate([prompt], GREEDY)[0]) for prompt in PROMPTS] == expected
    lost, found = plain.generate([PROMPTS[0]], GREEDY)[0], tiered.generate([PROMPTS[0]], GREEDY)[0]
    assert lost.num_cached == 0, "two slots keep the states of the last prompt only"
    assert found.num_cached == (len(PROMPTS[0]) - 1) // 16 * 16
    assert result(found) == expected[0]
    assert copies.num_saved > 0
    assert copies.num_restored == 1
