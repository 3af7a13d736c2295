"""Tables of request fields that other servers have and this server lacks, and that would change the answer.

If this server ignored a field of the tables, the client would get another answer than it requested. A request with such
a field is therefore refused, with an error that names the field. The request is accepted if the value of the field is
neutral, that is, if the value would not change the answer. The attribute `RequestBody.peers` says which table a request
is checked against. Fields that do not affect the answer, such as `cache_prompt`, `keep_alive` and `request_id`, are not
in the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class PeerField:
    """A request field of another server.

    The attribute `of` is the name of the other server. The value null and the values in `neutral` do not change the
    answer. The attribute `switches` has the names of fields that turn this field on. If the request has one of the
    switches with a neutral value, this field has no effect, and all its values are accepted. The attribute `instead` is
    the name of this server's own field with the same meaning, or "" if this server has no such field.
    """

    of: str
    neutral: tuple[object, ...] = ()
    switches: tuple[str, ...] = ()
    instead: str = ""

    def is_neutral(self, value: object) -> bool:
        return value is None or value in self.neutral


PeerFields = Mapping[str, PeerField]

_MIROSTAT = ("mirostat", "mirostat_mode")
_BREAKERS = ["\n", ":", '"', "*"]

# The following request fields change how tokens are sampled.
_SAMPLING = {
    "typical_p": PeerField("llama.cpp", (1, 0)),
    "typical": PeerField("LocalAI", (1, 0)),
    "top_a": PeerField("OpenRouter", (0,)),
    "min_k": PeerField("SGLang", (0, -1)),
    "top_n_sigma": PeerField("llama.cpp", (-1, 0)),
    "nsigma": PeerField("Aphrodite", (0,)),
    "tfs": PeerField("text-generation-webui", (1,)),
    "tfs_z": PeerField("Ollama", (1,)),
    "skew": PeerField("Aphrodite", (0,)),
    "min_keep": PeerField("llama.cpp", (0,)),
    "epsilon_cutoff": PeerField("text-generation-webui", (0,)),
    "eta_cutoff": PeerField("text-generation-webui", (0,)),
    "mirostat": PeerField("llama.cpp", (0, False)),
    "mirostat_mode": PeerField("text-generation-webui", (0,)),
    "mirostat_tau": PeerField("llama.cpp", (5,), switches=_MIROSTAT),
    "mirostat_eta": PeerField("llama.cpp", (0.1,), switches=_MIROSTAT),
    "mirostat_target": PeerField("Fireworks"),
    "mirostat_lr": PeerField("Fireworks", (0.1,)),
    "mirostat_ent": PeerField("llama.cpp", (5,), switches=_MIROSTAT),
    "xtc_probability": PeerField("llama.cpp", (0,)),
    "xtc_threshold": PeerField("llama.cpp", (0.1,), switches=("xtc_probability",)),
    "dry_multiplier": PeerField("llama.cpp", (0,)),
    "dry_base": PeerField("llama.cpp", (1.75,), switches=("dry_multiplier",)),
    "dry_allowed_length": PeerField("llama.cpp", (2,), switches=("dry_multiplier",)),
    "dry_penalty_last_n": PeerField("llama.cpp", (-1, 0), switches=("dry_multiplier",)),
    "dry_range": PeerField("Aphrodite", (0,), switches=("dry_multiplier",)),
    "dry_sequence_breakers": PeerField("llama.cpp", ([], _BREAKERS), switches=("dry_multiplier",)),
    "dry_sequence_breaker_ids": PeerField("Aphrodite", ([],), switches=("dry_multiplier",)),
    "dynamic_temperature": PeerField("text-generation-webui", (False,)),
    "dynatemp_low": PeerField("text-generation-webui", (1,), switches=("dynamic_temperature",)),
    "dynatemp_high": PeerField("text-generation-webui", (1,), switches=("dynamic_temperature",)),
    "dynatemp_range": PeerField("llama.cpp", (0,)),
    "dynatemp_exponent": PeerField("llama.cpp", (1,), switches=("dynatemp_range",)),
    "dynatemp_min": PeerField("Aphrodite", (0,)),
    "dynatemp_max": PeerField("Aphrodite", (0,)),
    "temp": PeerField("llama.cpp", instead="temperature"),
    "temperature_last": PeerField("text-generation-webui", (False,)),
    "smoothing_factor": PeerField("text-generation-webui", (0,)),
    "smoothing_curve": PeerField("text-generation-webui", (1,), switches=("smoothing_factor",)),
    "adaptive_target": PeerField("llama.cpp", (-1,)),
    "adaptive_decay": PeerField("llama.cpp", (0.9,), switches=("adaptive_target",)),
    "samplers": PeerField("llama.cpp", ([],)),
    "sampler_order": PeerField("KoboldCpp", ([],)),
    "sampler_priority": PeerField("text-generation-webui", ([],)),
    "do_sample": PeerField("TGI", (True,), instead="temperature"),
    "watermark": PeerField("TGI", (False,)),
    "penalty_alpha": PeerField("text-generation-webui", (0,)),
    "guidance_scale": PeerField("text-generation-webui", (1,)),
    "cfg_scale": PeerField("llama.cpp", (1,)),
    "negative_prompt": PeerField("text-generation-webui", ("",)),
    "use_beam_search": PeerField("vLLM", (False,)),
    "num_beams": PeerField("transformers", (1,)),
    "length_penalty": PeerField("vLLM", (1,), switches=("use_beam_search",)),
    "early_stopping": PeerField("vLLM", (False,), switches=("use_beam_search",)),
    "best_of": PeerField("TGI", (1,)),
    "sampling_seed": PeerField("SGLang", instead="seed"),
    "random_seed": PeerField("Mistral", instead="seed"),
}

# The following request fields penalise or forbid tokens.
_PENALTIES = {
    "repeat_penalty": PeerField("llama.cpp", (1,), instead="repetition_penalty"),
    "repeat_last_n": PeerField("llama.cpp", (0, 64), switches=("repeat_penalty",)),
    "rep_pen": PeerField("KoboldCpp", (1,), instead="repetition_penalty"),
    "penalize_nl": PeerField("llama.cpp", (False,)),
    "penalty_prompt": PeerField("llama.cpp", ([], "")),
    "repetition_penalty_range": PeerField("text-generation-webui", (0, 1024), switches=("repetition_penalty",)),
    "encoder_repetition_penalty": PeerField("text-generation-webui", (1,)),
    "no_repeat_ngram_size": PeerField("text-generation-webui", (0,)),
    "repetition_detection": PeerField("vLLM"),
    "custom_token_bans": PeerField("text-generation-webui", ("",), instead="bad_words"),
    "banned_tokens": PeerField("Aphrodite", ([], ""), instead="bad_words"),
    "banned_strings": PeerField("KoboldCpp", ([],), instead="bad_words"),
    "ban_eos_token": PeerField("text-generation-webui", (False,), instead="ignore_eos"),
    "logits_processors": PeerField("vLLM", ([],)),
    "custom_logit_processor": PeerField("SGLang", ("",)),
    "custom_params": PeerField("SGLang", ({},)),
    "vllm_xargs": PeerField("vLLM", ({},)),
}

# The following request fields limit the length of the answer or say where the answer ends.
_LENGTHS = {
    "n_predict": PeerField("llama.cpp", (-1,), instead="max_tokens"),
    "num_predict": PeerField("Ollama", (-1,), instead="max_tokens"),
    "max_new_tokens": PeerField("TGI", instead="max_tokens"),
    "max_output_tokens": PeerField("OpenAI's responses", instead="max_tokens"),
    "max_length": PeerField("KoboldCpp", instead="max_tokens"),
    "auto_max_new_tokens": PeerField("text-generation-webui", (False,)),
    "min_new_tokens": PeerField("SGLang", (0,), instead="min_tokens"),
    "stop_sequences": PeerField("Anthropic", ([],), instead="stop"),
    "stopping_strings": PeerField("text-generation-webui", ([],), instead="stop"),
    "custom_stopping_strings": PeerField("text-generation-webui", ([], ""), instead="stop"),
    "stop_regex": PeerField("SGLang", ("", [])),
    "no_stop_trim": PeerField("SGLang", (False,), instead="include_stop_str_in_output"),
    "n_indent": PeerField("llama.cpp", (0,)),
    "t_max_predict_ms": PeerField("llama.cpp", (0, -1)),
    "thinking_token_budget": PeerField("vLLM", (-1,)),
    "thinking_budget": PeerField("Qwen", (-1, 0)),
}

# The following request fields force the answer to follow a grammar.
_GRAMMARS = {
    name: PeerField(of, ("", {}, []), instead="structured_outputs")
    for of, names in {
        "vLLM": ("structural_tag",),
        "SGLang": ("regex", "ebnf"),
        "llama.cpp": ("grammar", "json_schema", "grammar_triggers"),
        "text-generation-webui": ("grammar_string",),
        "Ollama": ("format",),
    }.items()
    for name in names
}

# The following request fields change the text that the model reads, or change the model itself.
_PROMPTS = {
    "system": PeerField("Anthropic", ("", []), instead="messages"),
    "instructions": PeerField("OpenAI's responses", ("",), instead="messages"),
    "input_ids": PeerField("SGLang"),
    "prompt_embeds": PeerField("vLLM"),
    "images": PeerField("Ollama", ([],)),
    "context": PeerField("Ollama", ([], "")),
    "template": PeerField("Ollama", ("",)),
    "instruction_template": PeerField("text-generation-webui", ("",)),
    "character": PeerField("text-generation-webui", ("",)),
    "mode": PeerField("text-generation-webui", ("instruct", "chat")),
    "preset": PeerField("text-generation-webui", ("",)),
    "truncate": PeerField("TGI", (0,)),
    "truncate_prompt_tokens": PeerField("vLLM"),
    "truncation_length": PeerField("text-generation-webui", (0,)),
    "prompt_truncate_len": PeerField("Fireworks"),
    "transforms": PeerField("OpenRouter", ([],)),
    "models": PeerField("OpenRouter", ([],), instead="model"),
    "plugins": PeerField("OpenRouter", ([],)),
    "safe_prompt": PeerField("Mistral", (False,)),
    "add_bos_token": PeerField("text-generation-webui", (True,), instead="add_special_tokens"),
    "lora": PeerField("llama.cpp", ([],)),
    "lora_path": PeerField("SGLang", ("",)),
    "lora_request": PeerField("vLLM"),
    "adapter_id": PeerField("TGI", ("",)),
    "options": PeerField("Ollama", ({},)),
    "parameters": PeerField("TGI", ({},)),
    "sampling_params": PeerField("SGLang", ({},)),
    "session_params": PeerField("SGLang", ({},)),
    "kv_transfer_params": PeerField("vLLM", ({},)),
    "think": PeerField("Ollama", instead="reasoning_effort"),
    "thinking": PeerField("Anthropic", instead="reasoning_effort"),
    "reasoning": PeerField("OpenRouter", ({},), instead="reasoning_effort"),
    "enable_thinking": PeerField("Qwen", instead="reasoning_effort"),
    "enable_search": PeerField("Qwen", (False,)),
}

# The following request fields change which data the reply contains.
_REPLIES = {
    "echo": PeerField("vLLM", (False,)),
    "return_full_text": PeerField("TGI", (False,), instead="echo"),
    "logprob_token_ids": PeerField("vLLM", ([],)),
    "return_logprob": PeerField("SGLang", (False,), instead="logprobs"),
    "top_logprobs_num": PeerField("SGLang", (0,), instead="top_logprobs"),
    "top_n_tokens": PeerField("TGI", (0,), instead="top_logprobs"),
    "decoder_input_details": PeerField("TGI", (False,)),
    "n_probs": PeerField("llama.cpp", (0,), instead="logprobs"),
    "post_sampling_probs": PeerField("llama.cpp", (False,)),
    "return_tokens": PeerField("llama.cpp", (False,)),
    "return_tokens_as_token_ids": PeerField("vLLM", (False,)),
    "return_prompt_text": PeerField("vLLM", (False,)),
    "return_hidden_states": PeerField("SGLang", (False,)),
    "response_fields": PeerField("llama.cpp", ([],)),
}

_GENERATION = _SAMPLING | _PENALTIES | _LENGTHS | _GRAMMARS | _PROMPTS | _REPLIES

CHAT: PeerFields = MappingProxyType(
    _GENERATION
    | {
        "prompt": PeerField("/v1/completions", ("", []), instead="messages"),
        "suffix": PeerField("/v1/completions", ("",)),
    }
)

COMPLETION: PeerFields = MappingProxyType(
    _GENERATION | {"messages": PeerField("/v1/chat/completions", ([],), instead="prompt")}
)

# Fields of this server's other endpoints that have different names in requests to /v1/responses.
_NAMES_IN_RESPONSES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}

RESPONSE: PeerFields = MappingProxyType(
    {
        name: replace(field, instead=_NAMES_IN_RESPONSES.get(field.instead, field.instead))
        for name, field in _GENERATION.items()
    }
    | {
        "messages": PeerField("/v1/chat/completions", ([],), instead="input"),
        "logprobs": PeerField("/v1/chat/completions", (False,), instead="include"),
        "reasoning_effort": PeerField("/v1/chat/completions", instead="reasoning.effort"),
        "functions": PeerField("/v1/chat/completions", ([],), instead="tools"),
        "function_call": PeerField("/v1/chat/completions", ("none", "auto"), instead="tool_choice"),
        "documents": PeerField("/v1/chat/completions", ([],)),
        "chat_template": PeerField("/v1/chat/completions", ("",)),
        "chat_template_kwargs": PeerField("/v1/chat/completions", ({},)),
        "prompt_logprobs": PeerField("/v1/chat/completions"),
        "return_token_ids": PeerField("/v1/chat/completions", (False,)),
        "timings_per_token": PeerField("/v1/chat/completions", (False,)),
        "include_reasoning": PeerField("/v1/chat/completions", (True,)),
        "suffix": PeerField("/v1/completions", ("",)),
    }
)

MESSAGE: PeerFields = MappingProxyType(
    {
        "prefix": PeerField("Mistral", (False,), instead="continue_final_message"),
        "partial": PeerField("Moonshot", (False,), instead="continue_final_message"),
        "images": PeerField("Ollama", ([],)),
        "tool_plan": PeerField("Cohere", ("",)),
    }
)

TOKENIZE: PeerFields = MappingProxyType(
    {
        "content": PeerField("llama.cpp", instead="prompt"),
        "text": PeerField("SGLang", instead="prompt"),
        "add_special": PeerField("llama.cpp", instead="add_special_tokens"),
        "parse_special": PeerField("llama.cpp", (False,)),
        "with_pieces": PeerField("llama.cpp", (False,), instead="return_token_strs"),
    }
)

DETOKENIZE: PeerFields = MappingProxyType(
    {
        "skip_special_tokens": PeerField("SGLang", (False,)),
        "token_ids": PeerField("TensorRT-LLM", instead="tokens"),
    }
)

# Fields of vLLM's requests for vectors, and names of its request fields that are different here.
_VECTORS = {
    "truncate_prompt_tokens": PeerField("vLLM"),
    "truncation_side": PeerField("vLLM"),
    "messages": PeerField("vLLM", ([],)),
    "chat_template": PeerField("vLLM", ("",)),
    "embed_dtype": PeerField("vLLM", ("float32",)),
    "endianness": PeerField("vLLM", ("native", "little")),
    "normalize": PeerField("vLLM", (True,), instead="use_activation"),
    "softmax": PeerField("vLLM", (True,), instead="use_activation"),
    "activation": PeerField("vLLM", (True,), instead="use_activation"),
}
EMBEDDING: PeerFields = MappingProxyType(
    _VECTORS
    | {
        "input_type": PeerField("Cohere", instead="input"),
        "task": PeerField("Jina"),
        "late_chunking": PeerField("Jina", (False,)),
        "truncate": PeerField("Jina", (False,)),
        "truncate_dim": PeerField("TEI", instead="dimensions"),
        "embedding_type": PeerField("Jina", ("float",), instead="encoding_format"),
        "prompt_name": PeerField("TEI"),
        "instruction": PeerField("SGLang", ("",)),
    }
)
VECTOR: PeerFields = MappingProxyType(_VECTORS)
PAIR: PeerFields = MappingProxyType(
    _VECTORS
    | {
        "data_1": PeerField("vLLM", instead="text_1"),
        "data_2": PeerField("vLLM", instead="text_2"),
        "queries": PeerField("vLLM", instead="text_1"),
        "items": PeerField("SGLang", instead="text_2"),
        "label_token_ids": PeerField("SGLang"),
        "apply_softmax": PeerField("SGLang", (False,)),
        "instruction": PeerField("vLLM", ("",)),
        "max_tokens_per_doc": PeerField("Cohere"),
        "rank_fields": PeerField("Cohere", ([],)),
        "max_chunks_per_doc": PeerField("Cohere"),
    }
)
DECISION: PeerFields = MappingProxyType(
    {
        "state": PeerField("System One", instead="input"),
        "messages": PeerField("/v1/chat/completions", ([],), instead="input"),
        "assets": PeerField("System One", ({},)),
        "images": PeerField("System One", ([],)),
        "temperature": PeerField("SGLang", (1,)),
        "chat_template": PeerField("SGLang", ("",)),
        "chat_template_kwargs": PeerField("SGLang", ({},)),
        "instructions": PeerField("OpenAI's responses", ("",), instead="input"),
        "tools": PeerField("OpenAI's responses", ([],)),
    }
)

NONE: PeerFields = MappingProxyType({})
