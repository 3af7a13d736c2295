"""Message boundaries are found for every template, and the next turn of the conversation has the same tokens before
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.demo import demo_folder
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.message_places import common_length
from jamba_server.server.text.tokenizer import Tokenizer
from tests.synthetic_tokenizer import write_tokenizer

Chat = list[dict[str, Any]]

TEMPLATES = {
    "jamba 1.5": (demo_folder() / "chat_template.jinja").read_text(encoding="utf-8"),
    "reasoning": (Path(__file__).parent.parent / "templates" / "reasoning.jinja").read_text(encoding="utf-8"),
    "strips white space": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    ),
    "writes JSON": "{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) }}\n{% endfor %}",
    "wants an alternation": (
        "{% for m in messages %}{% if m.role == 'user' and loop.previtem and loop.previtem.role == 'user' %}"
        "{{ raise_exception('alternate') }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    ),
    "refuses to end with an assistant": (
        "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    ),
    "numbers": "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}",
    "shows the last question first as well": (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{{ messages[-1].content }}"
    ),
    "shows how long a message is": (
        "{% for m in messages %}[{{ m.role }}, {{ m.content | length }}] {{ m.content }}\n{% endfor %}"
    ),
    "cuts long messages": "{% for m in messages %}[{{ m.role }}] {{ m.content[:40] }}\n{% endfor %}",
}
SYSTEM = {"role": "system", "content": "the system"}
HISTORIES: dict[str, Chat] = {
    "plain": [{"role": "assistant", "content": "answer"}],
    "thoughts": [{"role": "assistant", "content": "answer", "reasoning_content": "because"}],
    "thoughts in the content": [{"role": "assistant", "content": "<think>\nbecause\n</think>\n\nanswer"}],
    "tools": [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "answer"},
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("reasoning")
    write_tokenizer(folder, "reasoning")
    return Tokenizer.from_folder(folder)


def saved(template: ChatTemplate, tokenizer: Tokenizer, messages: Chat, **options: Any) -> list[str]:
    """The texts before the positions at which a state is saved."""
    chat = template.render(messages, **options)
    return [tokenizer.decode(chat.prompt_ids[:n], skip_special_tokens=False) for n in chat.save_positions]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_next_turn_begins_with_what_was_saved(tokenizer: Tokenizer, name: str, history: str) -> None:
    """The last position is behind the answer before the last question, and the next prompt has the same tokens."""
    template = ChatTemplate(TEMPLATES[name], tokenizer)
    first = [SYSTEM, {"role": "user", "content": " first question"}, *HISTORIES[history]]
    messages = [*first, {"role": "user", "content": "\nlast question, which is longer than 40 characters"}]
    chat = template.render(messages)
    assert chat == template.render(messages), "the same messages give the same prompt"
    *_, position = chat.save_positions
    text = tokenizer.decode(chat.prompt_ids[:position], skip_special_tokens=False)
    assert "answer" in text
    assert "last question" not in text
    for reply in ({"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y", "reasoning": "z"}):
        turn = template.render([*messages, reply, {"role": "user", "content": "third"}])
        assert turn.prompt_ids[:position] == chat.prompt_ids[:position]
    edited = template.render([*first, {"role": "user", "content": "\nanother question"}])
    assert edited.prompt_ids[:position] == chat.prompt_ids[:position]


def test_the_position_is_right_before_the_last_question(tokenizer: Tokenizer) -> None:
    """The instruction that the template puts in front of the last question is not in front of it in the next turn."""
    template = ChatTemplate(TEMPLATES["reasoning"], tokenizer)
    for messages in HISTORIES.values():
        turn = [SYSTEM, {"role": "user", "content": "a"}, *messages, {"role": "user", "content": "b"}]
        assert saved(template, tokenizer, turn)[-1].endswith("answer<|im_end|>\n<|im_start|>user\n")


def test_the_positions_after_chosen_messages(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(TEMPLATES["jamba 1.5"], tokenizer)
    messages = [
        SYSTEM,
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b "},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    without, chosen = saved(template, tokenizer, messages), saved(template, tokenizer, messages, save_after=[1, 2, 5])
    new = [text for text in chosen if text not in without]
    assert [text.rpartition("<|bom|>")[2] for text in new] == ["<|user|> a", "<|user|>", "<|user|> e"]
    assert set(without) < set(chosen)
    assert saved(template, tokenizer, messages, save_after=[0]) == without, "the system message's end is saved anyway"


def test_the_position_after_tool_calls_is_behind_them(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(TEMPLATES["reasoning"], tokenizer)
    messages = [SYSTEM, {"role": "user", "content": "a"}, *HISTORIES["tools"][:2]]
    texts = saved(template, tokenizer, messages, save_after=[2, 3])
    assert any(text.endswith("</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n") for text in texts)
    assert texts[-1].endswith("<tool_response>\nresult")


def test_contents_that_cannot_be_marked(tokenizer: Tokenizer) -> None:
    """Empty messages have a boundary, too, if the messages before them render alone."""
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}", tokenizer)
    messages = [SYSTEM, {"role": "user", "content": "a"}, *HISTORIES["tools"][:1], {"role": "user", "content": ""}]
    assert saved(template, tokenizer, messages)[-1].endswith("[user]a\n[assistant]\n")


def test_more_positions_than_a_request_may_choose(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(TEMPLATES["jamba 1.5"], tokenizer)
    with pytest.raises(RequestRejected, match="at most 4 messages; this request names 5"):
        template.render([SYSTEM] * 5, save_after=range(5))


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [("", "", 0), ("", "a", 0), ("abc", "abd", 2), ("abc", "abc", 3), ("abc", "ab", 2), ("b", "a", 0)],
)
def test_the_common_length_of_texts(a: str, b: str, length: int) -> None:
    assert common_length(a, b) == length
    assert common_length("x" * 1000 + a, "x" * 1000 + b) == length + 1000
