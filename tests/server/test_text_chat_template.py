"""Chat templates: the renders of both Jamba families, the loading of templates, and their limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.errors import CheckpointError, ConfigError, RequestRejected
from jamba_server.server.demo import demo_folder
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.synthetic_tokenizer import build_tokenizer, write_tokenizer

Chat = list[dict[str, Any]]

PREFIX = (
    "Begin by thinking about the reasoning process in the mind within <think> </think> tags and then proceed to give "
    "your response.\n"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather",
        "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
    },
}
DOCUMENTS = [
    {"title": "Harry Potter", "text": "Harry Potter is a series of seven fantasy novels."},
    {"title": "The Great Gatsby", "country": "United States", "text": "The Great Gatsby is a novel."},
]
TOOLS_SYSTEM = (
    "<|startoftext|><|bom|><|system|> Be brief.\n\n<tool_definitions>\n# Tools\n\n## Functions\n\n{\n"
    '  "name": "get_current_weather",\n  "description": "Get the current weather",\n  "parameters": {\n'
    '    "type": "object",\n    "properties": {\n      "location": {\n        "type": "string"\n      }\n    },\n'
    '    "required": [\n      "location"\n    ]\n  }\n}\n</tool_definitions>'
)


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def calls(name: str, *arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": each}} for each in arguments]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("jamba")
    write_tokenizer(folder, "jamba-1.5")
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def jamba(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate((demo_folder() / "chat_template.jinja").read_text(encoding="utf-8"), tokenizer)


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("reasoning")
    source = (Path(__file__).parent.parent / "templates" / "reasoning.jinja").read_text(encoding="utf-8")
    write_tokenizer(folder, "reasoning", chat_template=source)
    template = ChatTemplate.from_folder(folder, Tokenizer.from_folder(folder))
    assert template is not None
    return template


JAMBA_RENDERS: dict[str, tuple[Chat, dict[str, Any], str]] = {
    "plain": (
        [user("Hi")],
        {},
        "<|startoftext|><|bom|><|system|> <|eom|><|bom|><|user|> Hi<|eom|><|bom|><|assistant|>",
    ),
    "history": (
        [system("You are terse."), user("2+2?"), assistant("4"), user("+1?")],
        {},
        "<|startoftext|><|bom|><|system|> You are terse.<|eom|><|bom|><|user|> 2+2?<|eom|><|bom|><|assistant|> 4<|eom|>"
        "<|bom|><|user|> +1?<|eom|><|bom|><|assistant|>",
    ),
    "tools": (
        [system("Be brief."), user("Weather in Paris?")],
        {"tools": [WEATHER]},
        f"{TOOLS_SYSTEM}<|eom|><|bom|><|user|> Weather in Paris?<|eom|><|bom|><|assistant|>",
    ),
    "tool trip": (
        [
            system("Be brief."),
            user("Weather in Paris?"),
            assistant(None, tool_calls=calls("get_current_weather", {"location": "Paris"}, '{"location": "Rome"}')),
            tool("18C"),
            tool({"temp": 8}),
        ],
        {"tools": [WEATHER]},
        f"{TOOLS_SYSTEM}<|eom|><|bom|><|user|> Weather in Paris?<|eom|><|bom|><|assistant|> <tool_calls>[\n"
        '    {"name": "get_current_weather", "arguments": {"location": "Paris"}},\n'
        '    {"name": "get_current_weather", "arguments": {"location": "Rome"}}\n]</tool_calls><|eom|>'
        '<|bom|><|tool|> 18C<|eom|><|bom|><|tool|> {"temp": 8}<|eom|><|bom|><|assistant|>',
    ),
    "documents": (
        [user("Who wrote it?")],
        {"documents": DOCUMENTS},
        "<|startoftext|><|bom|><|system|> <|eom|><|bom|><|system|> <documents>\n# Documents\n\nYou can use the "
        "following documents for reference:\n\n## Document ID: 0\nTitle: Harry Potter\nText: Harry Potter is a series "
        "of seven fantasy novels.\n\n## Document ID: 1\nTitle: The Great Gatsby\nCountry: United States\nText: The "
        "Great Gatsby is a novel.\n</documents><|eom|><|bom|><|user|> Who wrote it?<|eom|><|bom|><|assistant|>",
    ),
    "preamble": (
        [user("Hi")],
        {"generation_preamble": "Sure,"},
        "<|startoftext|><|bom|><|system|> <|eom|><|bom|><|user|> Hi<|eom|><|bom|><|assistant|> Sure,",
    ),
    "name and a later system message": (
        [user("Hi") | {"name": "bob"}, system("S")],
        {},
        "<|startoftext|><|bom|><|system|> <|eom|><|bom|><|user|> (bob)Hi<|eom|><|bom|><|system|> S<|eom|>"
        "<|bom|><|assistant|>",
    ),
}


def im(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def tool_call(city: str) -> str:
    return f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


THINK = "<|im_start|>assistant\n<think>\n"
THOUGHT = "<think>\nneed tool\n</think>\n\n"
TURN_TWO = f"<|startoftext|>{im('user', PREFIX + 'Hi')}{im('assistant', 'Hello')}{im('user', PREFIX + 'Bye')}{THINK}"
REASONING_RENDERS: dict[str, tuple[Chat, str]] = {
    "plain": ([user("Hi")], f"<|startoftext|>{im('user', PREFIX + 'Hi')}{THINK}"),
    "turn two": (
        [user("Hi"), assistant("Hello"), user("Bye")],
        f"<|startoftext|>{im('user', 'Hi')}{im('assistant', 'Hello')}{im('user', PREFIX + 'Bye')}{THINK}",
    ),
    "reasoning_content": ([user("Hi"), assistant("Hello", reasoning_content="Hm."), user("Bye")], TURN_TWO),
    "inline think": ([user("Hi"), assistant("<think>\nHm.\n</think>\n\nHello"), user("Bye")], TURN_TWO),
    "tool trip": (
        [
            user("W?"),
            assistant(None, tool_calls=calls("get_weather", {"city": "Paris"}, {"city": "Rome"})),
            tool("18C"),
            tool("20C"),
        ],
        f"<|startoftext|>{im('user', 'W?')}{im('assistant', tool_call('Paris') + chr(10) + tool_call('Rome'))}"
        "<|im_start|>user\n<tool_response>\n18C\n</tool_response>\n<tool_response>\n20C\n</tool_response><|im_end|>\n"
        f"{THINK}",
    ),
    "tool trip with reasoning": (
        [
            user("W?"),
            assistant(None, reasoning_content="need tool", tool_calls=calls("get_weather", {"city": "Paris"})),
            tool("18C"),
        ],
        f"<|startoftext|>{im('user', PREFIX + 'W?')}"
        f"{im('assistant', THOUGHT + tool_call('Paris'))}"
        f"<|im_start|>user\n<tool_response>\n18C\n</tool_response><|im_end|>\n{THINK}",
    ),
}


@pytest.mark.parametrize("name", JAMBA_RENDERS)
def test_renders_of_1_5_to_1_7(jamba: ChatTemplate, name: str) -> None:
    messages, kwargs, expected = JAMBA_RENDERS[name]
    chat = jamba.render(messages, kwargs=kwargs)
    assert chat.text == expected
    # The library that parses special tokens in text, given the whole text, is the oracle of the pieces.
    assert chat.prompt_ids == build_tokenizer("jamba-1.5").encode(expected, add_special_tokens=False).ids
    assert chat.strip_leading_space == (name != "preamble")


@pytest.mark.parametrize("name", REASONING_RENDERS)
def test_renders_of_reasoning(reasoning: ChatTemplate, name: str) -> None:
    messages, expected = REASONING_RENDERS[name]
    chat = reasoning.render(messages)
    assert chat.text == expected
    assert chat.prompt_ids == build_tokenizer("reasoning").encode(expected, add_special_tokens=False).ids
    assert not chat.strip_leading_space


def test_without_generation_prompt(jamba: ChatTemplate) -> None:
    chat = jamba.render([user("Hi"), assistant("Hello")], add_generation_prompt=False)
    assert chat.text == (
        "<|startoftext|><|bom|><|system|> <|eom|><|bom|><|user|> Hi<|eom|><|bom|><|assistant|> Hello<|eom|>"
    )
    assert not chat.strip_leading_space


def test_tools_of_reasoning_are_one_line_each(reasoning: ChatTemplate) -> None:
    chat = reasoning.render([system("S"), user("x")], kwargs={"tools": [WEATHER, WEATHER]})
    assert chat.text.startswith("<|startoftext|><|im_start|>system\nS\n\n# Tools\n\nYou may call one or more functions")
    assert f"<tools>\n{json.dumps(WEATHER)}\n{json.dumps(WEATHER)}\n</tools>\n\nFor each function call" in chat.text


@pytest.mark.parametrize("source", ["{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"])
def test_bos_stands_first_exactly_once(tokenizer: Tokenizer, source: str) -> None:
    chat = ChatTemplate(source, tokenizer).render([user("hello")])
    assert chat.prompt_ids == tokenizer.encode("hello")
    assert chat.prompt_ids.count(1) == 1


def test_missing_content_is_empty(jamba: ChatTemplate) -> None:
    nothing = jamba.render([{"role": "user"}, assistant(None)])
    assert nothing == jamba.render([user(""), assistant("")])


# The dialect of transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'b': '<é>&', 'a': 1} | tojson }}", '{"b": "<é>&", "a": 1}'),
        ("{{ {'b': 2, 'a': 1} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 1,\n "b": 2\n}'),
        ("{{ 'é' | tojson(ensure_ascii=True) }}", '"\\u00e9"'),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% continue %}{% endif %}{{ m }}{% endfor %}", "13"),
        ("{% generation %}a{% if true %}b{% endif %}{% endgeneration %}c", "abc"),
        ("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n", "x\n"),
        ("{{ tools is none and documents is none }}{{ knobs is defined }}", "TrueFalse"),
        ("{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ dict(x=1)['x'] }}", "21"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ eos_token }}{{ pad_token }}{{ sep_token }}", "<|endoftext|><|pad|>"),
    ],
)
def test_what_templates_may_use(tokenizer: Tokenizer, source: str, expected: str) -> None:
    assert ChatTemplate(source, tokenizer).render([user("x")]).text == expected


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('Only one system message, please') }}", "Only one system message, please"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set n = namespace() %}{% set n.__html__ = 1 %}", "'__html__' on a namespace"),
        ("{{ namespace(**{'_x': 1}) }}", "'_x' on a namespace"),
        ("{{ range(10 ** 9) }}", "powers"),
        ("{{ range(1000000) | length }}", "[Rr]ange"),
        ("{{ 'x' * 99999999 }}", "longer than"),
        ("{{ 99999999 * [1] }}", "longer than"),
        ("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", "longer than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ lipsum(9) }}", "lipsum"),
        ("{% include '/etc/passwd' %}", "loader"),
    ],
)
def test_what_templates_may_not_do(tokenizer: Tokenizer, source: str, reason: str) -> None:
    template = ChatTemplate(source, tokenizer)
    with pytest.raises(RequestRejected, match=reason) as caught:
        template.render([user("content " * 100)])
    assert caught.value.param == "messages"
    assert len(str(caught.value)) < 600


def test_long_messages_of_templates_are_cut(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ raise_exception('Unknown: ' ~ messages[0].content) }}", tokenizer)
    with pytest.raises(RequestRejected, match="Unknown: <\\|eom\\|>xxx") as caught:
        template.render([user("<|eom|>" + "x" * 100_000)])
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("kwargs", "param", "words"),
    [
        ({"knobs": {"is_set": True}}, "chat_template_kwargs", "no variable `knobs`"),
        ({"messages": []}, "chat_template_kwargs", "`messages` cannot be set"),
        ({"bos_token": "x"}, "chat_template_kwargs", "`bos_token` cannot be set"),
        ({"add_generation_prompt": False}, "chat_template_kwargs", "cannot be set"),
    ],
)
def test_variables_that_would_be_ignored(jamba: ChatTemplate, kwargs: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestRejected, match=words) as caught:
        jamba.render([user("x")], kwargs=kwargs)
    assert caught.value.param == param


def test_tools_for_a_template_without_tools(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0].content }}", tokenizer)
    assert "tools" not in template.variables
    with pytest.raises(RequestRejected, match="no variable `tools`") as caught:
        template.render([user("x")], kwargs={"tools": [WEATHER]})
    assert caught.value.param == "tools"


# Where a template comes from ----------------------------------------------------------------------------------------


def render_from(folder: Path, override: Path | None = None) -> str | None:
    template = ChatTemplate.from_folder(folder, Tokenizer.from_folder(folder), override)
    return template.render([user("x")]).text if template else None


def test_sources_in_their_order(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "jamba-1.5")
    assert render_from(tmp_path) is None
    write_tokenizer(tmp_path, "jamba-1.5", chat_template="config")
    assert render_from(tmp_path) == "config"
    (tmp_path / "chat_template.jinja").write_text("file\n", encoding="utf-8")
    assert render_from(tmp_path) == "file"
    (tmp_path / "mine.jinja").write_text("mine", encoding="utf-8")
    assert render_from(tmp_path, tmp_path / "mine.jinja") == "mine"


def test_named_templates(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "jamba-1.5")
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    path.write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    assert render_from(tmp_path) == "d"
    path.write_text(json.dumps({"chat_template": named[:1]}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="has the chat templates tool_use, but none named"):
        render_from(tmp_path)


def test_templates_that_cannot_be_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jinja cannot be read"):
        ChatTemplate.from_folder(tmp_path, tokenizer, tmp_path / "nowhere.jinja")
    with pytest.raises(CheckpointError, match="does not compile: line 2"):
        ChatTemplate("x\n{% if %}", tokenizer)
