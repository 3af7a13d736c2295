"""Options: where they come from, what goes before what, and what every complaint names."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import CheckpointError, ConfigError
from jamba_server.server.config import OPTIONS, ServerConfig
from jamba_server.server.config_sources import load_config
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.options import parse_size


def write(folder: Path, text: str) -> Path:
    path = folder / "jamba.yaml"
    path.write_text(text)
    return path


# Precedence ---------------------------------------------------------------------------------------------------------


def test_flag_before_variable_before_yaml_before_default(tmp_path: Path) -> None:
    path = write(tmp_path, "port: 1\nmax_num_seqs: 1\nblock_size: 1\n")
    environ = {"JAMBA_PORT": "2", "JAMBA_MAX_NUM_SEQS": "2", "HOME": "/x"}
    config = load_config({"port": "3", "seed": None}, environ, path)
    assert (config.port, config.max_num_seqs, config.block_size, config.seed) == (3, 2, 1, 0)


def test_a_switch_can_be_turned_off_again(tmp_path: Path) -> None:
    path = write(tmp_path, "enable_priority: true\nenable_prefix_caching: false\n")
    config = load_config({"enable_priority": False}, {"JAMBA_ENABLE_PREFIX_CACHING": "true"}, path)
    assert (config.enable_priority, config.enable_prefix_caching) == (False, True)


def test_exact_has_three_values() -> None:
    for flags, requested in (({}, None), ({"batch_invariant": True}, True), ({"batch_invariant": False}, False)):
        assert load_config(flags, {}).engine(Path("m")).batch_invariant is requested


def test_a_variable_may_name_the_file_and_a_flag_goes_before_it(tmp_path: Path) -> None:
    first, other = tmp_path / "first.yaml", tmp_path / "other.yaml"
    first.write_text("port: 1")
    other.write_text("port: 2")
    environ = {"JAMBA_CONFIG": str(first)}
    assert load_config({}, environ).port == 1
    assert load_config({}, environ, other).port == 2


def test_an_empty_variable_is_not_set() -> None:
    config = load_config({}, {"JAMBA_HOST": "", "JAMBA_PORT": ""})
    assert config == ServerConfig()


# Casts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123456789012345678901", 123456789012345678901),
        ("32K", 32768),
        ("32k", 32768),
        ("1M", 1024**2),
        ("1.5M", 3 * 512 * 1024),
        ("4GiB", 4 * 1024**3),
        ("4 GiB", 4 * 1024**3),
        ("4GB", 4 * 10**9),
        ("2T", 2 * 1024**4),
        ("-3", -3),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "1.5", "4Gi B", "1e3", "4X", "0.3K"])
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        parse_size(text)


def test_every_kind_of_option_from_every_source(tmp_path: Path) -> None:
    expected: dict[str, Any] = {
        "max_model_len": 32768,
        "engine_timeout": 2.5,
        "enable_priority": True,
        "host": "::1",
        "device": "cpu",
        "api_key": ("a", "b"),
        "kernels": {"linear": "reference", "mamba": "cpu"},
    }
    texts = {
        "max_model_len": "32K",
        "engine_timeout": "2.5",
        "enable_priority": "true",
        "host": "::1",
        "device": "cpu",
        "api_key": "a, b",
        "kernels": "linear=reference,mamba=cpu",
    }
    flags = texts | {
        "enable_priority": True,
        "api_key": ["a", "b"],
        "kernels": ["linear=reference", "mamba=cpu"],
    }
    document = json.dumps({name: list(value) if name == "api_key" else value for name, value in expected.items()})
    yaml_with_texts = "\n".join(f"{name.replace('_', '-')}: '{text}'" for name, text in texts.items())
    from_all = [
        load_config(flags, {}),
        load_config({}, {OPTIONS[name].variable: text for name, text in texts.items()}),
        load_config({}, {}, write(tmp_path, document)),
        load_config({}, {}, write(tmp_path, yaml_with_texts)),
    ]
    assert from_all == [ServerConfig(**expected)] * 4


@pytest.mark.parametrize(
    ("alias", "dtype"),
    [("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("fp32", "float32"), ("float", "float32")],
)
def test_a_dtype_may_have_the_names_of_other_servers(tmp_path: Path, alias: str, dtype: str) -> None:
    for config in (
        load_config({"dtype": alias}, {}),
        load_config({}, {"JAMBA_DTYPE": alias}),
        load_config({}, {}, write(tmp_path, f"dtype: {alias}")),
    ):
        assert config.dtype == dtype


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("port", "70000", "a whole number of at least 0 and at most 65535"),
        ("port", "http", "a whole number"),
        ("max_num_seqs", "0", "a whole number of at least 1"),
        ("max_model_len", "1.5", "a whole number"),
        ("shutdown_timeout", "-1", "a number of at least 0"),
        ("engine_timeout", "0", "a number above 0"),
        ("engine_timeout", "nan", "a number above 0"),
        ("device", "gpu", "one of auto, cpu, cuda"),
        ("kernels", ["linear"], "OP=IMPLEMENTATION"),
        ("kernels", ["linear="], "OP=IMPLEMENTATION"),
        ("served_model_name", ["a", ""], "a list of texts, none of them empty"),
    ],
)
def test_a_failed_cast_names_flag_value_and_what_is_allowed(name: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({name: value}, {})
    assert str(caught.value).startswith(f"{OPTIONS[name].flag} is {value!r}; it must be {allowed}")


def test_a_failed_cast_names_variable_or_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^JAMBA_METRICS_PUBLIC is 'maybe'; it must be true or false\.$"):
        load_config({}, {"JAMBA_METRICS_PUBLIC": "maybe"})
    path = write(tmp_path, "max-num-seqs: true")
    with pytest.raises(ConfigError, match=rf"^{path}: max_num_seqs is True; it must be a whole number"):
        load_config({}, {}, path)


@pytest.mark.parametrize("text", ["- a\n- b", "text", "a: [", "\x00"])
def test_a_file_that_holds_no_options(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"^--config {path} "):
        load_config({}, {}, path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config({}, {}, tmp_path / "no.yaml")


@pytest.mark.parametrize("text", ["", "# nothing", "port:\nmax_model_len: null"])
def test_a_file_that_sets_nothing(tmp_path: Path, text: str) -> None:
    assert load_config({}, {}, write(tmp_path, text)) == ServerConfig()


# Unknown names ------------------------------------------------------------------------------------------------------


def test_an_unknown_key_names_the_nearest_one(tmp_path: Path) -> None:
    path = write(tmp_path, "max_modle_len: 1")
    with pytest.raises(ConfigError, match=rf"^{path}: 'max_modle_len' is not an option; did you mean max_model_len\?$"):
        load_config({}, {}, path)
    with pytest.raises(
        ConfigError, match=r"JAMBA_MAX_MODEL_LENGTH is not an option; did you mean JAMBA_MAX_MODEL_LEN\?"
    ):
        load_config({}, {"JAMBA_MAX_MODEL_LENGTH": "1"})


def test_an_unknown_key_that_resembles_none() -> None:
    with pytest.raises(ConfigError, match=r"JAMBA_XYZZY is not an option; `jamba serve --help` lists them\.$"):
        load_config({}, {"JAMBA_XYZZY": "1"})


def test_what_kubernetes_injects_is_ignored_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    injected = {
        "JAMBA_SERVICE_HOST": "10.0.0.1",
        "JAMBA_SERVICE_PORT": "8000",
        "JAMBA_SERVICE_PORT_HTTP": "8000",
        "JAMBA_PORT": "tcp://10.0.0.1:8000",
        "JAMBA_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "JAMBA_PORT_8000_TCP_PROTO": "tcp",
        "JAMBA_PORT_8000_TCP_PORT": "8000",
        "JAMBA_PORT_8000_TCP_ADDR": "10.0.0.1",
        "JAMBA_SERVER_PORT": "udp://10.0.0.2:53",
    }
    with caplog.at_level(logging.WARNING):
        config = load_config({}, injected | {"JAMBA_HOST": "0.0.0.0"})
    assert config == ServerConfig(host="0.0.0.0")
    [record] = caplog.records
    assert all(name in record.getMessage() for name in injected)


# Choices and results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"quantization": "fp4"}, "--quantization is 'fp4'; it must be one of int8, int4, int4-g32, fp8."),
        ({"quantize_mamba": True}, "quantize_mamba needs quantization: int8 or int4 or int4-g32 or fp8."),
        ({"ssl_keyfile": "k.pem"}, "ssl_keyfile and ssl_certfile go together"),
        ({"chat_template": "/no/such.jinja"}, "chat_template is '/no/such.jinja'; there is no such file"),
        ({"root_path": "jamba"}, "root_path is 'jamba'; it must begin with a slash"),
    ],
)
def test_choices_that_cannot_be_met_are_errors(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(flags, {})


def test_what_is_printed_has_no_secrets_and_no_defaults() -> None:
    config = load_config({"api_key": ["hunter2"], "port": "8000", "seed": "7"}, {"JAMBA_MAX_NUM_SEQS": "64"})
    assert config.non_defaults() == {"api_key": "***", "seed": 7}


def test_a_secret_is_not_part_of_a_complaint() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"api_key": ["hunter2", ""]}, {})
    assert "hunter2" not in str(caught.value)


def test_the_engine_gets_its_options_and_the_folder() -> None:
    config = load_config({"max_num_seqs": "3", "kernels": ["linear=reference"], "model": "org/name"}, {})
    assert config.engine(Path("/models/x")) == EngineConfig(
        model="/models/x", max_num_seqs=3, kernels={"linear": "reference"}
    )


def test_every_option_of_the_engine_is_one_of_the_server_with_the_same_default() -> None:
    defaults = EngineConfig(model="x")
    fields = {field.name for field in dataclasses.fields(ServerConfig)}
    ours, theirs = ServerConfig(), msgspec.structs.asdict(defaults)
    assert set(theirs) <= fields
    assert {name: getattr(ours, name) for name in theirs if name != "model"} == {
        name: value for name, value in theirs.items() if name != "model"
    }


# Generation defaults ------------------------------------------------------------------------------------------------


def generation_config(folder: Path, text: str) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(text)
    return GenerationDefaults.of(folder)


def test_without_a_file_the_defaults_are_openais(tmp_path: Path) -> None:
    assert GenerationDefaults.of(tmp_path) == GenerationDefaults(temperature=1.0, top_p=1.0, top_k=0)
    assert GenerationDefaults.of(tmp_path).non_defaults() == {}


def test_values_of_the_file_are_the_defaults(tmp_path: Path) -> None:
    text = '{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": null, "eos_token_id": [2, 519]}'
    defaults = generation_config(tmp_path, text)
    assert defaults == GenerationDefaults(temperature=0.6, top_p=0.95)
    assert defaults.non_defaults() == {"temperature": 0.6, "top_p": 0.95}


def test_top_k_minus_one_is_all(tmp_path: Path) -> None:
    assert generation_config(tmp_path, '{"top_k": -1}').top_k == 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a JSON list"),
        ('{"temperature": "hot"}', r"\$\.temperature"),
        ('{"top_p": 0}', r"\$\.top_p"),
        ('{"repetition_penalty": 3}', r"\$\.repetition_penalty"),
    ],
)
def test_a_file_that_cannot_be_obeyed_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json.*{complaint}"):
        generation_config(tmp_path, text)
