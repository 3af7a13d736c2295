"""The class `ChatTask` describes a conversation that the model shall continue. It is independent of the API (chat
completions, Responses or Messages) through which the request came. The function `plan_chat` turns a task into the data
that the engine needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from starlette.types import Scope

from jamba_server.engine.errors import RequestRejected
from jamba_server.engine.types import SamplingParams
from jamba_server.server.http.cache_use import cache_salt, cache_use
from jamba_server.server.http.choice import TextOptions
from jamba_server.server.http.deadlines import time_limit_of
from jamba_server.server.http.errors import progress_hook, request_id_of, tenant_of
from jamba_server.server.http.generation import GenerationSpec
from jamba_server.server.http.sampling import admit_prompt, engine_priority, sampling_params
from jamba_server.server.http.schemas.base import GenerationBody
from jamba_server.server.http.services import Services
from jamba_server.server.http.unknown_fields import ignore_field, listed, warn
from jamba_server.server.text.chat_template import RenderedChat
from jamba_server.server.text.grammars.types import OutputFormat, ReasoningGrammar, ToolGrammar
from jamba_server.server.text.reasoning import THINK_TAGS
from jamba_server.server.text.tool_calls import TOOL_TAGS, ToolCallOptions

# The header X-Warning names parts of schemas that are not enforced in at most this number of characters.
MAX_LEFT_OUT_CHARS = 400
MAX_PATH_CHARS = 120  # number of characters of a part's path that are shown

ToolMode = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of the function's arguments. `param` is the
    name of the request's field that has this schema."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    strict: bool = False
    param: str = "tools"

    def to_template(self) -> dict[str, object]:
        """Returns the tool as a dictionary for chat templates, which expect the form of OpenAI's API."""
        function: dict[str, object] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": function | {"parameters": self.parameters}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTask:
    """A conversation that the model shall continue.

    `messages` are dictionaries as chat templates read them, with the keys `role`, `content` (a string), and where they
    apply `name`, `tool_calls`, `tool_call_id` and `reasoning_content`. `body` has the request's sampling parameters and
    its limits. `logprobs` is the number of most likely tokens to report at each position; None reports no
    log-probabilities. `prompt_logprobs` is the same number for the prompt. If `allowed_tools` is not None, the model
    may call only the tools that it names. The `reasoning_effort` "none" makes the model answer without thoughts.
    `chat_template` is a template that replaces the model's own. `save_after` has indices of messages after which the
    model's state should be saved, because later requests will begin alike.
    """

    messages: tuple[dict[str, object], ...]
    body: GenerationBody
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolMode = "auto"
    allowed_tools: frozenset[str] | None = None
    parallel_tool_calls: bool = True
    output_format: OutputFormat | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: int | None = None
    documents: tuple[Any, ...] = ()
    chat_template: str | None = None
    template_kwargs: Mapping[str, object] = field(default_factory=dict[str, object])
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    save_after: tuple[int, ...] = ()

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Returns the functions that the reply may call. There are none if the request forbids calls."""
        if self.tool_choice == "none":
            return ()
        return tuple(tool for tool in self.tools if self.allowed_tools is None or tool.name in self.allowed_tools)


async def render_task(task: ChatTask, services: Services, scope: Scope) -> RenderedChat:
    """Returns the prompt that the chat template makes from a conversation. Raises RequestRejected.

    If the template does not read the `reasoning_effort`, the reply's header X-Ignored-Fields lists it.
    """
    template = services.chat_template
    knows_efforts = template is not None and "reasoning_effort" in template.variables
    if task.reasoning_effort not in (None, "none") and not knows_efforts:
        ignore_field("reasoning_effort", scope, services)
    if task.chat_template is not None and not services.config.allow_request_templates:
        raise RequestRejected(
            "chat_template is only allowed if the server was started with --allow-request-templates.",
            param="chat_template",
        )
    return await services.render(
        task.messages,
        scope,
        template=task.chat_template,
        tools=[tool.to_template() for tool in task.tools],
        documents=task.documents,
        kwargs=task.template_kwargs,
        add_generation_prompt=task.add_generation_prompt,
        continue_final_message=task.continue_final_message,
        reasoning_effort=task.reasoning_effort,
        save_after=task.save_after,
        with_message_starts=cache_use(task.body).explain,
    )


async def plan_chat(task: ChatTask, services: Services, *, id_: str, scope: Scope) -> GenerationSpec:
    """Renders the conversation with the chat template and returns the data of its choices for the engine.

    Fields of the request that have no effect with this model are listed in the reply's header X-Ignored-Fields. Raises
    RequestRejected if the conversation is too long or has something that the model's template cannot show.
    """
    body = task.body
    priority = engine_priority(body.priority, scope, enabled=services.config.enable_priority)
    _check_abilities(task, services)
    chat = await render_task(task, services, scope)
    params = await _sampling_params(task, chat, services, scope)
    prompt = admit_prompt(
        chat.prompt_ids,
        params,
        services.engine,
        param="messages",
        save_positions=chat.save_positions,
        message_starts=chat.message_starts,
    )
    text = TextOptions(
        stops=body.stops,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        strip_leading_space=chat.strip_leading_space,
        thinking=chat.opens_reasoning if services.reply_style.reasoning else None,
        tool_calls=_tool_call_options(task, services, has_grammar=bool(params.grammar)),
    )
    return GenerationSpec(
        id=id_,
        prompts=(prompt,),
        n=body.n or 1,
        text=text,
        priority=priority,
        cache_salt=cache_salt(body.cache_salt, tenant_of(scope), services.config),
        cache=cache_use(body),
        tenant=tenant_of(scope),
        time_limit=time_limit_of(scope),
        http_request_id=request_id_of(scope),
        on_progress=progress_hook(scope),
    )


def _check_abilities(task: ChatTask, services: Services) -> None:
    """Raises RequestRejected if the request needs something that this server or its model cannot do."""
    if task.tool_choice == "required" and task.tools and services.reply_style.tool_calls is None:
        raise RequestRejected(
            "tool_choice requires a tool call, but this server does not know how the model writes them. Start it with "
            "--tool-call-parser jamba or hermes.",
            param="tool_choice",
        )


async def _sampling_params(task: ChatTask, chat: RenderedChat, services: Services, scope: Scope) -> SamplingParams:
    body, context = task.body, services.engine.info.max_model_len
    params = sampling_params(
        body,
        services.defaults,
        max_tokens=body.reply_limit(default=context, context=context),
        seed=services.draw_seed(),
        logprobs=task.logprobs,
        prompt_logprobs=task.prompt_logprobs,
        bad_words=await services.bad_words(body.bad_words) + _forbidden_tags(task, services),
        grammar=await _grammar(task, chat, services, scope),
    )
    budget, thinking_end = task.thinking_token_budget, ()
    if budget is not None and chat.opens_reasoning:
        end = await services.encode(THINK_TAGS.end, add_special_tokens=False)
        thinking_end = tuple(end)
    elif budget is not None:
        ignore_field("thinking_token_budget", scope, services)
        budget = None
    return msgspec.structs.replace(params, thinking_token_budget=budget, thinking_end=thinking_end)


async def _grammar(task: ChatTask, chat: RenderedChat, services: Services, scope: Scope) -> str:
    """Returns the grammar of the whole reply, or "" if the request allows every reply. If the grammar does not enforce
    a part of a function's schema, the reply's header X-Warning says so."""
    style, functions = services.reply_style, task.callable_tools
    tools = None
    if functions and style.tool_calls is not None:
        tools = ToolGrammar(
            functions=functions,
            mode="required" if task.tool_choice == "required" else "auto",
            style=style.tool_calls,
            parallel=task.parallel_tool_calls,
        )
    if tools is None and task.output_format is None:
        return ""
    reasoning = ReasoningGrammar(opened=chat.opens_reasoning) if style.reasoning else None
    grammar = await services.grammar(
        scope, task.output_format, tools, reasoning, leading_space=chat.strip_leading_space
    )
    places = [f"{name} {path[:MAX_PATH_CHARS]}" for name, paths in grammar.left_out.items() for path in paths]
    if places:
        text = listed(places, MAX_LEFT_OUT_CHARS)
        warn(f"the grammar does not enforce these parts of the schemas of functions: {text}", scope)
    return grammar.text


def _forbidden_tags(task: ChatTask, services: Services) -> tuple[tuple[int, ...], ...]:
    """Returns the start tag of tool calls if the request declares tools and forbids their use (`tool_choice` "none").

    The tools stay in the prompt. So the prompt begins with the same tokens as the earlier prompts of the conversation,
    and these tokens are found in the prefix cache.
    """
    style = services.reply_style.tool_calls
    if task.tool_choice != "none" or not task.tools or style is None:
        return ()
    start = services.tokenizer.tags.get(TOOL_TAGS[style].start)
    return () if start is None else ((start,),)


def _tool_call_options(task: ChatTask, services: Services, *, has_grammar: bool) -> ToolCallOptions | None:
    style, functions = services.reply_style.tool_calls, task.callable_tools
    if not functions or style is None:
        return None
    # A call that the grammar of calls has made is valid from its beginning. Content in JSON has no text that looks like
    # the beginning of a call, because its quotes are escaped. Content in other forms may have such text.
    is_json = task.output_format is None or task.output_format.kind in ("json_object", "json_schema")
    return ToolCallOptions(
        style=style,
        names=frozenset(function.name for function in functions),
        max_calls=None if task.parallel_tool_calls else 1,
        early=has_grammar and is_json,
    )
