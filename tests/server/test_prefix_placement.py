"""Where states are saved pays for the conversations that clients have: both families' templates, their tokens, and the
scheduler with a simulated model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.types import Request, SamplingParams
from jamba_server.server.demo import demo_folder
from jamba_server.server.text.chat_template import ChatTemplate, RenderedChat
from jamba_server.server.text.tokenizer import Tokenizer
from tests.engine.simulator import Simulator, make_scheduler
from tests.synthetic_tokenizer import Family, write_tokenizer

BLOCK = 16
Chat = list[dict[str, Any]]
FAMILIES: tuple[Family, ...] = ("jamba-1.5", "reasoning")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


class Talker:
    """Serves conversations in the form of one family. `last_user` is the position in the latest prompt at which its
    last user message begins."""

    def __init__(self, family: Family, folder: Path) -> None:
        write_tokenizer(folder, family)
        self.tokenizer = Tokenizer.from_folder(folder)
        jamba = (demo_folder() / "chat_template.jinja").read_text(encoding="utf-8")
        reasoning = (Path(__file__).parent.parent / "templates" / "reasoning.jinja").read_text(encoding="utf-8")
        self.template = ChatTemplate(jamba if family == "jamba-1.5" else reasoning, self.tokenizer)
        self.thinks = family == "reasoning"
        self.end = self.tokenizer.special_tokens["<|im_end|>" if self.thinks else "<|eom|>"]
        self.scheduler = make_scheduler(
            num_pages=2000, block_size=BLOCK, max_model_len=8000, max_num_batched_tokens=512, num_slots=200
        )
        self.scheduler.eos_token_ids = frozenset({self.end})
        self.simulator, self.number = Simulator(self.scheduler), 0
        self.last_user = 0

    def render(self, messages: Chat) -> RenderedChat:
        return self.template.render(messages, with_message_starts=True)

    def reply_ids(self, messages: Chat, prompt: RenderedChat, answer: str) -> list[int]:
        """The tokens that the model writes for an answer, with its thoughts."""
        if self.thinks:
            return [*self.tokenizer.encode(f"because\n</think>\n\n{answer}", add_special_tokens=False), self.end]
        after = self.render([*messages, assistant(answer), user("x")]).prompt_ids
        assert after[: len(prompt.prompt_ids)] == prompt.prompt_ids
        reply = after[len(prompt.prompt_ids) :]
        return reply[: reply.index(self.end) + 1]

    def ask(self, messages: Chat, answer: str = "an answer to that question") -> tuple[int, int]:
        """Returns the number of tokens in the prompt and how many of them were cached."""
        chat = self.render(messages)
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        self.last_user = chat.message_starts[last]
        reply, self.number = self.reply_ids(messages, chat, answer), self.number + 1
        request = Request(
            id=str(self.number),
            prompt=chat.prompt_ids,
            params=SamplingParams(max_tokens=1000),
            save_positions=chat.save_positions,
        )
        self.scheduler.add([request], now=0.0)
        cached = 0
        while self.scheduler.has_work:
            for update in self.simulator.step(lambda chunk: reply[chunk.end - len(chat.prompt_ids)]):
                cached += update.num_cached or 0
                assert update.finish_reason in (None, "stop")
        return len(chat.prompt_ids), cached


@pytest.fixture(params=FAMILIES)
def talker(request: pytest.FixtureRequest, tmp_path: Path) -> Talker:
    return Talker(request.param, tmp_path)


def system(talker: Talker, num_tokens: int) -> dict[str, Any]:
    text = "you are a friend of all who ask; " * 40
    ids = talker.tokenizer.encode(text, add_special_tokens=False)[:num_tokens]
    assert len(ids) == num_tokens
    return {"role": "system", "content": talker.tokenizer.decode(ids, skip_special_tokens=True)}


def test_a_shared_system_message_is_reused_from_the_second_request_on(talker: Talker) -> None:
    message = system(talker, 1000)
    assert talker.ask([message, user("What is a river?")])[1] == 0
    for question in ("Who was first?", "Why do birds sing?"):
        assert talker.ask([message, user(question)])[1] >= 1000 - BLOCK


def test_twenty_turns(talker: Talker) -> None:
    """1.5 to 1.7: all but the new turn comes from the cache. Reasoning: what came before the last turn, whose thoughts
    and instruction vanish."""
    messages, before = [system(talker, 200)], 0
    for turn in range(20):
        question, answer = user(f"what is after {turn}?"), f"{turn + 1}"
        _, cached = talker.ask([*messages, question], answer)
        if turn and talker.thinks:
            assert cached >= before - BLOCK
        elif turn:
            assert cached >= 0.97 * talker.last_user
        before = talker.last_user
        messages += [question, assistant(answer)]


def test_regenerating_and_editing_the_last_turn(talker: Talker) -> None:
    messages = [system(talker, 50), user("first question"), assistant("first answer"), user("second question " * 5)]
    talker.ask(messages, "one reply")
    length, cached = talker.ask(messages, "another reply")
    assert cached == (length - 1) // BLOCK * BLOCK
    _, cached = talker.ask([*messages[:-1], user("an edited question")])
    assert cached >= talker.last_user - BLOCK
    assert cached > 50


def test_editing_an_earlier_turn_pays_from_the_third_request_on(talker: Talker) -> None:
    start = [system(talker, 50), user("first question, which is long enough " * 4)]
    talker.ask([*start, assistant("a" * 40), user("x")])
    hits = [talker.ask([*start, assistant(letter * 40), user("x")])[1] for letter in "bcd"]
    assert hits[0] >= 50 - BLOCK
    assert hits[1] > hits[0]
    assert hits[2] == hits[1]


def test_a_cache_control_mark(talker: Talker) -> None:
    documents = user("a document " * 30)
    messages = [documents, assistant("read"), user("question")]
    chat = talker.template.render(messages, save_after=[0])
    starts = talker.render(messages).message_starts
    assert any(starts[1] - BLOCK <= position <= starts[1] for position in chat.save_positions)


@pytest.mark.parametrize("length", range(2, 17))
def test_a_prompt_of_less_than_a_page(length: int, tmp_path: Path) -> None:
    scheduler = make_scheduler(num_pages=50, block_size=BLOCK)
    simulator, found = Simulator(scheduler), list[int]()
    for number in range(3):
        params = SamplingParams(max_tokens=20)
        scheduler.add([Request(id=str(number), prompt=list(range(length)), params=params)], now=0.0)
        while scheduler.has_work:
            found += [u.num_cached for u in simulator.step(lambda chunk: chunk.end) if u.num_cached is not None]
    assert found == [0, length - 1, length - 1]
