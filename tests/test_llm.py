"""The model in this process: what the server answers, without the server."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

import jamba_server
from jamba_server.engine.errors import CheckpointError, ConfigError, RequestRejected
from jamba_server.engine.process.client import EngineClient
from jamba_server.engine.types import SamplingParams, StepResult
from jamba_server.llm import LLM, Completion
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from jamba_server.server.generation_defaults import GenerationDefaults
from tests.server.real_engine import served_engine
from tests.tiny import TINY_CONFIGS, save_tiny

SIZES: dict[str, Any] = {"threads": 1, "max_num_seqs": 4}
SMUGGLED = "Once <|eom|> upon<|startoftext|> a time <|"
TALK = [{"role": "developer", "content": "Be <|system|> kind."}, {"role": "user", "content": f"{SMUGGLED} and a dog"}]
STORY = "Once upon a time"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(**SIZES)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A model without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    save_tiny(folder, **next(iter(TINY_CONFIGS.values())))
    return LLM(folder, dtype="float32", max_model_len=64, max_num_seqs=2, threads=1)


def texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


async def test_replies_are_those_of_the_server(llm: LLM) -> None:
    """The checkpoint's temperature, which is not OpenAI's, is that of requests that name none."""
    defaults = GenerationDefaults.of(demo_folder())
    assert defaults != GenerationDefaults()
    config = ServerConfig(served_model_name=("jamba-demo",), **SIZES)
    engine = EngineClient(config.engine(demo_folder()))
    await engine.start()
    async with served_engine(config, engine, defaults) as client:
        prompts = [SMUGGLED, STORY]
        fields: dict[str, Any] = {"seed": 5, "max_tokens": 20, "n": 2}
        kinds: list[dict[str, Any]] = [{}, {"include_stop_str_in_output": True}, {"skip_special_tokens": False}]
        for own in (*kinds, {"temperature": 1.9}):
            reply = await client.completions.create(
                model="jamba-demo", prompt=prompts, stop=[" was", "."], extra_body={**own, **fields}
            )
            found = llm.generate(prompts, stop=[" was", "."], **own, **fields)
            assert [(choice.text, choice.finish_reason) for choice in reply.choices] == [
                (completion.text, completion.finish_reason) for completion in found
            ]
            assert reply.usage is not None
            assert reply.usage.prompt_tokens == sum(len(completion.prompt) for completion in found[::2])
            assert reply.usage.completion_tokens == sum(len(completion.token_ids) for completion in found)
        talk: Any = TALK
        chats: list[dict[str, Any]] = [{"seed": 7, "max_tokens": 30}, {"seed": 8, "temperature": 0.0}]
        for fields in chats:
            chat: Any = await client.chat.completions.create(model="jamba-demo", messages=talk, **fields)
            [completion] = llm.chat(TALK, **fields)
            assert (chat.choices[0].message.content, chat.usage.prompt_tokens, chat.usage.completion_tokens) == (
                completion.text,
                len(completion.prompt),
                len(completion.token_ids),
            )
    await engine.close()


def test_a_seed_is_drawn_for_each_prompt_unless_one_is_given(llm: LLM) -> None:
    hot = SamplingParams(max_tokens=12, temperature=1.5)
    drawn = texts(llm.generate([STORY, STORY], hot) + llm.generate(STORY, hot) + llm.chat([TALK, TALK], hot))
    assert len(set(drawn)) == 5
    for seed in (0, 9):
        [first, second] = texts(llm.generate([STORY, STORY], hot, seed=seed))
        assert (
            first == second == texts(llm.generate(STORY, SamplingParams(max_tokens=12, temperature=1.5, seed=seed)))[0]
        )


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("a b", ["a b"]),
        (["a b"], ["a b"]),
        (("a", [5, 6]), ["a", [5, 6]]),
        ([5, 6], [[5, 6]]),
        ((5, 6), [[5, 6]]),
        ([[5], (6, 7)], [[5], [6, 7]]),
        ([], []),
    ],
    ids=str,
)
def test_what_counts_as_one_prompt(llm: LLM, prompts: Any, expected: list[str | list[int]]) -> None:
    found = [completion.prompt for completion in llm.generate(prompts, max_tokens=1)]
    assert found == [llm.generate([p], max_tokens=1)[0].prompt if isinstance(p, str) else p for p in expected]


def test_one_conversation_or_several(llm: LLM) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
    other = [{"role": "user", "content": [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "a story."}]}]
    alone = [*llm.chat(TALK, **greedy), *llm.chat(other, **greedy)]
    together = llm.chat([TALK, other], **greedy)
    assert [(c.prompt, c.text) for c in together] == [(c.prompt, c.text) for c in alone]


def test_a_stop_string_ends_the_tokens_too_and_releases_everything(llm: LLM) -> None:
    [whole] = llm.generate(STORY, max_tokens=30, temperature=0, logprobs=0)
    [cut] = llm.generate(STORY, stop=["zzz", " was"], max_tokens=30, temperature=0, logprobs=0)
    assert (cut.finish_reason, cut.stop_reason) == ("stop", " was")
    assert cut.text == whole.text[: whole.text.index(" was")]
    assert 0 < len(cut.token_ids) < len(whole.token_ids)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert cut.logprobs == whole.logprobs[: len(cut.token_ids)]
    assert not llm.core.has_work
    stats = llm.core.scheduler.stats
    assert (stats.num_running, stats.kv_blocks_used, stats.state_slots_used) == (0, 0, 0)


def test_a_prompt_can_be_scored_alone(llm: LLM) -> None:
    [scored] = llm.generate(STORY, max_tokens=0, prompt_logprobs=2)
    assert (scored.text, scored.token_ids, scored.finish_reason) == ("", [], "length")
    assert [score and score.token_id for score in scored.prompt_logprobs] == [None, *scored.prompt[1:]]


def test_a_progress_bar_is_drawn_on_a_terminal_or_when_asked_for(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate([STORY, STORY], max_tokens=1)
    assert capsys.readouterr() == ("", "")
    llm.generate([STORY, STORY], max_tokens=1, progress=True)
    out, err = capsys.readouterr()
    assert (out, "2/2" in err) == ("", True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qantization": "int8"}, "LLM: 'qantization' is not an option; did you mean quantization?"),
        ({"max_num_seq": 8}, "LLM: 'max_num_seq' is not an option; did you mean max_num_seqs?"),
        ({"port": 8000}, "LLM: 'port' is an option of `jamba serve` only, because LLM starts no server."),
        ({"quantization": "int3"}, "LLM: quantization is 'int3'; it must be one of int8, int4, int4-g32, fp8."),
        ({"threads": 0}, "LLM: threads is 0; it must be a whole number of at least 1 (also as 32K, 1M, 4GiB)."),
        ({"quantize_mamba": True}, "quantize_mamba needs quantization: int8 or int4 or int4-g32 or fp8."),
        ({"chat_template": "/no/such"}, "chat_template is '/no/such'; there is no such file."),
    ],
    ids=str,
)
def test_settings_are_those_of_the_command_line_or_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("model", ["org/name", "./nothing", "/no/such/folder", "org/a--b"])
def test_a_model_that_is_missing_is_reported_as_by_serve(model: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        LLM(model)
    with pytest.raises(CheckpointError) as expected:
        find_checkpoint(ServerConfig(model=model))
    assert str(caught.value) == str(expected.value)


def test_a_path_is_never_a_hub_id() -> None:
    with pytest.raises(CheckpointError, match=f"There is no folder {os.getcwd()}/org/name,"):
        LLM(Path("org/name"))


def test_a_hub_id_is_found_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))  # for the process that asks the hub
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("a" * 40)).symlink_to(demo_folder())
    [completion] = LLM("org/name", **SIZES).generate(STORY, max_tokens=2)
    assert completion.text


@pytest.mark.parametrize(
    ("prompts", "fields", "param"),
    [
        (STORY, {"tempertaure": 1.0}, "tempertaure is not a sampling parameter; did you mean temperature?"),
        (STORY, {"temperature": 3}, "temperature is 3.0; it must be at least 0 and at most 2."),
        (STORY, {"max_tokens": "9"}, "max_tokens is '9'. Expected `int`, got `str`."),
        (STORY, {"n": 0}, "n is 0; it must be at least 1."),
        (STORY, {"stop": ["a", ""]}, "stop has ''; it must be a text of at least one character."),
        ([5, 9999], {}, "prompt has token id 9999 at position 1; ids are 0 to 4095."),
        ([STORY, 5], {}, "prompt 1 is neither a text nor a list of token ids. Expected `str | array`, got `int`."),
    ],
    ids=str,
)
def test_a_request_at_fault_is_refused_by_name(llm: LLM, prompts: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        llm.generate(prompts, **fields)
    assert str(caught.value) == param


@pytest.mark.parametrize(
    ("messages", "param"),
    [([], "messages"), ([{"role": "user"}], "messages.0.content"), ([TALK, [{}]], "messages.0.role")],
)
def test_messages_at_fault_are_refused_as_by_the_server(llm: LLM, messages: Any, param: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        llm.chat(messages)
    assert caught.value.param == param


def test_a_model_without_a_tokenizer_takes_and_gives_ids(bare: LLM) -> None:
    [completion] = bare.generate([5, 6, 7], max_tokens=3, ignore_eos=True)
    assert (len(completion.token_ids), completion.text, completion.finish_reason) == (3, "", "length")
    for call in (lambda: bare.generate("a"), lambda: bare.generate([5], stop="a"), lambda: bare.chat(TALK)):
        with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
            call()


def test_an_interrupt_leaves_no_work_for_the_next_call(bare: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    step, steps = bare.core.step, 0

    def interrupted() -> StepResult:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(bare.core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bare.generate([[5, 6, 7], [8]], params)
    [completion] = bare.generate([[5, 6, 7]], params)
    assert len(completion.token_ids) == 8
    assert bare.core.scheduler.stats.kv_blocks_used == 0


def test_the_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(from jamba_server import .*?)```", readme, re.DOTALL)
    exec(example.replace("path/to/model", str(demo_folder())), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("]") and lines[-1].endswith(("stop", "length"))
    assert not hasattr(jamba_server, "Nothing")
