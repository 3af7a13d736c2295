"""The class `ChatTask` is a conversation to continue, independent of the API through which it came. The function
`plan_chat` turns it into the data that the engine needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.types import Scope

from jamba_server.server.http.choice import TextOptions
from jamba_server.server.http.errors import request_id_of, tenant_of
from jamba_server.server.http.generation import GenerationSpec
from jamba_server.server.http.sampling import admit_prompt, check_priority, sampling_params
from jamba_server.server.http.schemas.base import GenerationBody
from jamba_server.server.http.services import Services
from jamba_server.server.text.grammars.types import OutputFormat

ToolMode = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of the function's arguments."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTask:
    """A conversation that the model shall continue.

    `messages` are dictionaries as chat templates read them, with the keys `role`, `content` (a string), and where they
    apply `name`, `tool_calls`, `tool_call_id` and `reasoning_content`. `body` has the request's sampling parameters and
    its limits. `logprobs` is the number of most likely tokens to report at each position; None reports no
    log-probabilities. If `allowed_tools` is not None, the model may call only the tools that it names. `save_after` has
    indices of messages after which the model's state should be saved, because later requests will begin alike.
    """

    messages: tuple[dict[str, object], ...]
    body: GenerationBody
    logprobs: int | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolMode = "auto"
    allowed_tools: frozenset[str] | None = None
    parallel_tool_calls: bool = True
    output_format: OutputFormat | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: int | None = None
    documents: tuple[Any, ...] = ()
    template_kwargs: Mapping[str, object] = field(default_factory=dict[str, object])
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    save_after: tuple[int, ...] = ()


async def plan_chat(task: ChatTask, services: Services, *, id_: str, scope: Scope) -> GenerationSpec:
    """Renders the conversation with the chat template and returns the data of its choices for the engine.

    Raises RequestRejected if the conversation is too long or has something that the model's template cannot show.
    """
    body = task.body
    context = services.engine.info.max_model_len
    priority = check_priority(body.priority, enabled=services.config.enable_priority)
    chat = await services.render(task.messages, add_generation_prompt=task.add_generation_prompt)
    params = sampling_params(
        body,
        services.defaults,
        max_tokens=body.reply_limit(default=context, context=context),
        seed=services.draw_seed(),
        logprobs=task.logprobs,
        bad_words=await services.bad_words(body.bad_words),
    )
    prompt = admit_prompt(
        chat.prompt_ids, params, services.engine, param="messages", save_positions=chat.save_positions
    )
    text = TextOptions(
        stops=body.stops,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        strip_leading_space=chat.strip_leading_space,
    )
    return GenerationSpec(
        id=id_,
        prompts=(prompt,),
        n=body.n or 1,
        text=text,
        priority=priority,
        cache_salt=body.cache_salt or "",
        tenant=tenant_of(scope),
        http_request_id=request_id_of(scope),
    )
