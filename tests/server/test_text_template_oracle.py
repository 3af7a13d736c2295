"""What the two families' templates make of tools, documents, histories and continued messages, compared with
transformers' `apply_chat_template`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.demo import demo_folder
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.synthetic_tokenizer import Family, build_tokenizer, write_tokenizer

Chat = list[dict[str, Any]]

FAMILIES: tuple[Family, ...] = ("jamba-1.5", "reasoning")
SOURCES: Mapping[Family, Path] = {
    "jamba-1.5": demo_folder() / "chat_template.jinja",
    "reasoning": Path(__file__).parent.parent / "templates" / "reasoning.jinja",
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für einen <Ort>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "maximum": 2**80},
    },
}
DOCUMENTS = [{"title": "T", "text": "a text"}, {"text": "another", "country": "FR"}]


def say(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def call(*arguments: Any, name: str = "get_weather") -> list[dict[str, Any]]:
    return [
        {"id": f"call-{n}", "type": "function", "function": {"name": name, "arguments": each}}
        for n, each in enumerate(arguments)
    ]


TOOL_TRIP = [
    say("system", "Be brief."),
    say("user", "Weather?"),
    say("assistant", "", tool_calls=call({"city": "Paris", "days": [1, 2.5, None]}, {})),
    say("tool", "18C", tool_call_id="call-0"),
    say("tool", '{"temp": 8}', tool_call_id="call-1"),
    say("assistant", "18 and 8", reasoning_content="Two results."),
    say("user", "Thanks"),
]
# name: messages, then the options of transformers
CASES: dict[str, tuple[Chat, dict[str, Any]]] = {
    "one question": ([say("user", "Hi")], {}),
    "without generation prompt": ([say("user", "Hi"), say("assistant", "Yes")], {"add_generation_prompt": False}),
    "tools": ([say("user", "Hi")], {"tools": [WEATHER, WEATHER]}),
    "tools and a system message": ([say("system", "S"), say("user", "Hi")], {"tools": [WEATHER]}),
    "a trip to two tools": (TOOL_TRIP, {"tools": [WEATHER]}),
    "a trip that has not ended": (TOOL_TRIP[:5], {"tools": [WEATHER]}),
    "thoughts under other names": (
        [say("user", "a"), say("assistant", "b", reasoning="r"), say("user", "c"), say("assistant", "d", thinking="t")],
        {},
    ),
    "thoughts in the content": (
        [say("user", "a"), say("assistant", "<think>\nr\n</think>\n\nb"), say("user", "c")],
        {},
    ),
    "system messages in the middle": (
        [say("system", "S"), say("user", "a"), say("system", "now in French"), say("assistant", "b"), say("user", "c")],
        {},
    ),
    "a name": ([say("user", "Hi", name="bob")], {}),
    "documents": ([say("user", "a"), say("assistant", "b"), say("user", "c")], {"documents": DOCUMENTS}),
    "variables": ([say("user", "Hi")], {"generation_preamble": "Sure,", "default_system_message": "D"}),
    "another variable": ([say("user", "Hi")], {"thinking_prefix": "Think.\n"}),
    "a continued message": ([say("user", "Hi"), say("assistant", "Sure, ")], {"continue_final_message": True}),
    "white space around it": ([say("user", "Hi"), say("assistant", "\n\n a \n")], {"continue_final_message": True}),
    "a continued thought": (
        [say("user", "Hi"), say("assistant", "<think>\nLet me")],
        {"continue_final_message": True},
    ),
    "an empty continued message": ([say("user", "Hi"), say("assistant", "")], {"continue_final_message": True}),
    "a continued question": ([say("user", "Tell me a")], {"continue_final_message": True}),
    "a message continued with tools": (
        [*TOOL_TRIP, say("assistant", "You are")],
        {"continue_final_message": True, "tools": [WEATHER]},
    ),
    "continued reasoning": (
        [say("user", "Hi"), say("assistant", "", reasoning_content="Hm, ")],
        {"continue_final_message": "reasoning_content"},
    ),
}
# The template of the other family has not these variables, or it shows no reasoning.
ONLY: dict[str, Family] = {
    "documents": "jamba-1.5",
    "variables": "jamba-1.5",
    "another variable": "reasoning",
    "continued reasoning": "reasoning",
}
PAIRS = [(family, name) for family in FAMILIES for name in CASES if ONLY.get(name, family) == family]


class Both:
    """A family's template in this project and in transformers."""

    def __init__(self, family: Family, folder: Path) -> None:
        source = SOURCES[family].read_text(encoding="utf-8")
        write_tokenizer(folder, family, chat_template=source)
        self.tokenizer = Tokenizer.from_folder(folder)
        self.template = ChatTemplate(source, self.tokenizer)
        self.oracle = PreTrainedTokenizerFast(
            tokenizer_object=build_tokenizer(family), chat_template=source, **self.tokenizer.named_tokens
        )


Families = Mapping[Family, Both]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return {family: Both(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def reasoning(families: Families) -> Both:
    return families["reasoning"]


def with_text_arguments(messages: Chat) -> Chat:
    """The messages as a client of the API sends them: arguments of calls are JSON text, and contents may be null."""
    sent: Chat = json.loads(json.dumps(messages))
    for message in sent:
        if message["content"] == "":
            message["content"] = None
        for each in message.get("tool_calls", []):
            each["function"]["arguments"] = json.dumps(each["function"]["arguments"], separators=(",", ":"))
    return sent


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_the_prompt_is_that_of_transformers(families: Families, family: Family, name: str) -> None:
    both, (messages, options) = families[family], CASES[name]
    arguments: dict[str, Any] = {"add_generation_prompt": "continue_final_message" not in options, **options}
    expected = both.oracle.apply_chat_template(messages, tokenize=False, **arguments)
    assert isinstance(expected, str)
    own = dict(options)
    ours = {key: own.pop(key) for key in ("tools", "documents", "add_generation_prompt") if key in own}
    ours["continue_final_message"] = bool(own.pop("continue_final_message", False))
    chat = both.template.render(with_text_arguments(messages), kwargs=own, **ours)
    assert chat.text == expected
    assert chat.prompt_ids == both.oracle(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arguments", ["not JSON", "[1]", '{"a": NaN}', '{"a": 1'])
def test_arguments_that_are_no_object_stay_as_they_are(families: Families, family: Family, arguments: str) -> None:
    messages = [say("user", "x"), say("assistant", "", tool_calls=call(arguments)), say("tool", "y")]
    assert f'"arguments": {arguments}}}' in families[family].template.render(messages).text


# Continued messages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "final", "words"),
    [
        ("{{ messages[0].content }}", say("assistant", "b"), "does not show its text unchanged"),
        ("{{ messages[-1].content[:3] }}", say("assistant", "a long text"), "does not show its text unchanged"),
        ("{{ messages[-1].content | upper }}", say("assistant", "b"), "does not show its text unchanged"),
        ("{{ messages[-1].content }}", say("assistant", "b", tool_calls=call({})), "has tool calls"),
        ("{{ messages[-1].content }}", {"role": "assistant", "content": {"a": 1}}, "is no text"),
    ],
)
def test_messages_that_cannot_be_continued(reasoning: Both, source: str, final: dict[str, Any], words: str) -> None:
    template = ChatTemplate(source, reasoning.tokenizer)
    with pytest.raises(RequestRejected, match=words) as caught:
        template.render([say("user", "a"), final], continue_final_message=True)
    assert caught.value.param == "messages"


def test_a_template_that_strips_continued_messages(reasoning: Both) -> None:
    """As in transformers, the prompt then ends with the last character that is no white space."""
    template = ChatTemplate("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", reasoning.tokenizer)
    text = template.render([say("user", "a"), say("assistant", " b \n")], continue_final_message=True).text
    assert text == "[a][b"


# Thoughts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "options", "opens"),
    [
        ([say("user", "Hi")], {}, True),
        ([say("user", "Hi </think>")], {}, True),
        ([say("user", "Hi <think>"), say("assistant", "x")], {"add_generation_prompt": False}, False),
        ([say("user", "Hi"), say("assistant", "<think>\nLet")], {"continue_final_message": True}, True),
        ([say("user", "Hi"), say("assistant", "Let <think")], {"continue_final_message": True}, False),
        ([say("user", "Hi"), say("assistant", "", reasoning="Let")], {"continue_final_message": True}, True),
        ([say("user", "Hi"), say("assistant", "Yes", reasoning="Let")], {"continue_final_message": True}, False),
    ],
)
def test_whether_the_prompt_ends_inside_thoughts(
    reasoning: Both, messages: Chat, options: dict[str, Any], opens: bool
) -> None:
    assert reasoning.template.render(messages, **options).opens_reasoning == opens


@pytest.mark.parametrize("source", ["Q: {{ messages[0].content }}\nA:", "Q: {{ messages[0].content }}"])
def test_a_client_cannot_open_thoughts(reasoning: Both, source: str) -> None:
    """Here no special token stands between the client's text and the end of the prompt."""
    template = ChatTemplate(source, reasoning.tokenizer)
    assert not template.render([say("user", "x <think> y")]).opens_reasoning


@pytest.mark.parametrize("options", [{"reasoning_effort": "none"}, {"kwargs": {"enable_thinking": False}}])
def test_no_reasoning_closes_the_tag_in_the_prompt(reasoning: Both, options: dict[str, Any]) -> None:
    chat = reasoning.template.render([say("user", "Hi")], **options)
    assert chat.text.endswith("Hi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not chat.opens_reasoning
    continued = reasoning.template.render(
        [say("user", "Hi"), say("assistant", "<think>\nLet me see")], continue_final_message=True, **options
    )
    assert continued.text.endswith("<think>\nLet me see\n</think>\n\n")


def test_a_template_with_a_switch_for_thoughts(reasoning: Both) -> None:
    source = "{{ messages[0].content }}:{% if enable_thinking is not false %}<think>{% else %}no{% endif %}"
    template = ChatTemplate(source, reasoning.tokenizer)
    thinking, not_thinking = "a:<think>", "a:no"
    hi = [say("user", "a")]
    assert template.render(hi).text == template.render(hi, reasoning_effort="high").text == thinking
    assert template.render(hi, reasoning_effort="none").text == not_thinking
    assert template.render(hi, kwargs={"enable_thinking": False}).text == not_thinking
    with pytest.raises(RequestRejected, match="send one of them") as caught:
        template.render(hi, reasoning_effort="none", kwargs={"enable_thinking": True})
    assert caught.value.param == "reasoning_effort"


def test_efforts_reach_a_template_that_reads_them(reasoning: Both) -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ reasoning_effort }}", reasoning.tokenizer)
    assert template.render([say("user", "a")], reasoning_effort="low").text == "alow"
    assert template.render([say("user", "a")], reasoning_effort="low", kwargs={"reasoning_effort": "x"}).text == "ax"


def test_no_reasoning_of_a_model_without_thoughts(families: Families) -> None:
    jamba = families["jamba-1.5"].template
    hi = [say("user", "Hi")]
    assert jamba.render(hi, reasoning_effort="none") == jamba.render(hi)
    assert jamba.render(hi, kwargs={"enable_thinking": False}) == jamba.render(hi)
    with pytest.raises(RequestRejected, match="no variable `enable_thinking`"):
        jamba.render(hi, kwargs={"enable_thinking": True})


def test_tools_cannot_be_sent_twice(reasoning: Both) -> None:
    with pytest.raises(RequestRejected, match="`tools` is sent both"):
        reasoning.template.render([say("user", "Hi")], tools=[WEATHER], kwargs={"tools": [WEATHER]})


def test_a_template_of_a_request(reasoning: Both) -> None:
    other = reasoning.template.with_source("{{ messages | length }}")
    assert other.render([say("user", "Hi")]).text == "1"
    with pytest.raises(RequestRejected, match="does not compile: line 1") as caught:
        reasoning.template.with_source("{{")
    assert caught.value.param == "chat_template"


def test_errors_name_the_line(reasoning: Both) -> None:
    template = ChatTemplate("a\n{{ messages[0].content }}\n{{ messages[0].content + 1 }}", reasoning.tokenizer)
    with pytest.raises(RequestRejected, match=r"can only concatenate str .* \(line 3 of the template\)"):
        template.render([say("user", "Hi")])
