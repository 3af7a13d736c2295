"""Times decode and prefill of one engine for `versions.py`, which starts this program in each of two checkouts.

It uses only what all versions of the project have: the classes `LLM` and `SamplingParams`. The first line of the input
is a JSON object with the arguments of `LLM`. Each further line is a JSON object with the fields `count` (prompts),
`length` (tokens of each prompt) and `tokens` (tokens of each reply); the answer is a line with the seconds that they
took.
"""

from __future__ import annotations

import json
import sys
import time
from random import Random
from typing import Any

from jamba_server.engine.types import SamplingParams
from jamba_server.llm import LLM


def main() -> None:
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    vocabulary = range(3, job.pop("vocabulary"))
    random, llm = Random(0), LLM(job.pop("folder"), load_format="dummy", **job)
    print(json.dumps({"tokens_in_a_step": llm.core.info.max_num_batched_tokens}), flush=True)
    for line in sys.stdin:
        case: dict[str, int] = json.loads(line)
        params = SamplingParams(max_tokens=case["tokens"], temperature=0.0, ignore_eos=True)
        prompts = [random.choices(vocabulary, k=case["length"]) for _ in range(case["count"])]
        start = time.perf_counter()
        llm.generate(prompts, params)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
