"""The command line: what each command prints, and its one sentence for each mistake."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jamba_server.engine.errors import CheckpointError
from jamba_server.server.cli import checkpoint, doctor
from jamba_server.server.cli.application import app, run
from jamba_server.server.cli.bench import report as bench
from jamba_server.server.cli.bench.client import Reply
from jamba_server.server.cli.bench.runner import ClosedLoop, Poisson
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.cli.doctor import KernelRow, kernel_table, without_kernel
from jamba_server.server.cli.terminal import LoadProgress, describe_engine
from jamba_server.server.config import OPTIONS, ServerConfig
from jamba_server.server.demo import demo_folder
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.options import PANELS
from tests import quantized_folders
from tests.geometries import write_geometry
from tests.gguf_file import write_gguf
from tests.server.fake_engine import INFO
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]


def jamba(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command in this process; its exit status, or the sentence that it ends with."""
    monkeypatch.setattr(sys, "argv", ["jamba", *arguments])
    with pytest.raises(SystemExit) as ended:
        run()
    return ended.value.code  # pyright: ignore[reportReturnType]


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


# All commands -------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_flag() -> None:
    text = invoke("--help")
    names = "serve run chat run-batch pull list rm plan bench doctor convert cache sessions"
    assert all(f"  {command} " in text for command in names.split())
    assert "..." not in text.replace("[ARGS]...", ""), "a description is cut"
    text = invoke("serve", "-h")
    assert "--api-key KEY" in text
    assert "--gpu-memory-utilization FRACTION" in text


@pytest.mark.parametrize("command", ["serve", "run", "chat", "pull", "list", "rm", "plan"])
def test_help_shows_every_option_whole_in_its_group(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = invoke(command, "--help")
    assert max(map(len, text.splitlines())) <= 80
    groups = dict(re.findall(r"^(\w+) options:\n(.*?)(?=^\w|\Z)", text, flags=re.MULTILINE | re.DOTALL))
    assert [title.lower() for title in groups] == [panel for panel in PANELS if panel.capitalize() in groups]
    assert len(groups) == (4 if command == "serve" else len(groups))
    for option in OPTIONS.values():
        words = " ".join(groups.get(option.help.panel.capitalize(), "").split())
        if command == "serve" and option.name != "model":
            assert f"{option.flag} " in words
        if f"{option.flag} " in words:
            assert f"{option.help.text} [default: {option.shown_default}]" in words


def test_flags_may_have_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    message = jamba(monkeypatch, "serve", "--max_num_seqs", "0")
    assert str(message).startswith("jamba: --max-num-seqs is '0'; it must be a whole number of at least 1")


def test_the_shell_completes_flags() -> None:
    words = {"_JAMBA_COMPLETE": "complete_bash", "COMP_WORDS": "jamba plan --max-num-", "COMP_CWORD": "2"}
    done = CliRunner().invoke(app, env=words, prog_name="jamba")
    assert done.output.split() == ["--max-num-seqs", "--max-num-batched-tokens"]


def test_version_is_the_distributions() -> None:
    try:
        version = metadata.version("jamba-server")
    except metadata.PackageNotFoundError:
        version = "unknown"
    assert invoke("--version") == f"jamba-server {version}\n"


def test_serve_says_something_before_it_imports_what_takes_long() -> None:
    slow = ("fastapi", "huggingface_hub", "torch", "uvicorn", "numpy", "httpx", "rich", "yaml", "asyncio")
    program = (
        "import logging, sys\n"
        "from jamba_server.server.cli import application, serve\n"
        "sys.argv = ['jamba', 'serve']\n"
        f"serve.bind = lambda *address: sys.exit(str(sorted({set(slow)} & sys.modules.keys())))\n"
        "application.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    *banner, loaded = done.stderr.splitlines()
    assert "jamba-server" in banner[0]
    assert loaded == "[]"


def test_a_mistyped_command_gets_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jamba(monkeypatch, "serv") == 2
    assert "Did you mean 'serve'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--port", "http"], "jamba: --port is 'http'; it must be a whole number"),
        (
            ["serve", "--quantization", "int5"],
            "jamba: --quantization is 'int5'; it must be one of int8, int4, int4-g32, fp8.",
        ),
        (["serve", "--quantize-mamba"], "jamba: quantize_mamba needs quantization: int8 or int4 or int4-g32 or fp8."),
        (
            ["plan", "org/name", "--quantize-mamba"],
            "jamba: quantize_mamba needs quantization: int8 or int4 or int4-g32 or fp8.",
        ),
        (["serve", "--config", "/no/such.yaml"], "jamba: --config /no/such.yaml: there is no such file."),
        (["serve", "--port", "0", "/no/such"], "jamba: There is no folder /no/such, and a hub id"),
        (["plan", "org/name"], "jamba: There is no folder org/name, the hub cache"),
        (["plan", "org/name", "--memory", "lots"], "jamba: There is no folder org/name"),
        (
            ["run", "Once upon a time"],
            "jamba: The argument of `jamba run` is a MODEL. If it is the prompt, write: jamba run -p 'Once upon",
        ),
        (["chat", "127.0.0.1:1"], "jamba: No server answers at http://127.0.0.1:1 "),
        (["chat", "http://127.0.0.1:port"], "jamba: 'http://127.0.0.1:port' is not a URL: "),
        (
            ["chat", "http://127.0.0.1:1", "--device", "gpu"],
            "jamba: --device is 'gpu'; it must be one of auto, cpu, cuda.",
        ),
    ],
)
def test_mistakes_end_with_one_sentence(monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str) -> None:
    message = str(jamba(monkeypatch, *arguments))
    assert message.startswith(sentence)
    assert "\n" not in message


def test_unknown_flags_and_missing_arguments_are_usage_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jamba(monkeypatch, "serve", "--max-modle-len", "1") == 2
    assert "--max-model-len" in capsys.readouterr().err
    assert jamba(monkeypatch, "bench") == 2
    assert jamba(monkeypatch, "run", "--max-tokens", "0") == 2
    assert "Invalid value for '--max-tokens'" in capsys.readouterr().err


def test_variables_count_for_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAMBA_MAX_NUM_SEQS", "5")
    report = json.loads(invoke("plan", str(write_geometry(tmp_path, "tiny-dev")), "--json", "--memory", "8GiB"))
    assert report["plan"]["max_num_seqs"] == 5


# Checkpoints --------------------------------------------------------------------------------------------------------


def test_a_folder_is_served_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    write_geometry(folder, "3b")
    found = find_checkpoint(ServerConfig(model=str(folder) + "/"))
    assert (found.folder, found.name, found.demo) == (folder, "my-model", False)


def test_no_model_is_the_demonstration() -> None:
    found = find_checkpoint(ServerConfig())
    assert (found.name, found.demo) == ("jamba-demo", True)
    assert (found.folder / "config.json").is_file()


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    write_geometry(tmp_path, "3b")
    with pytest.raises(CheckpointError, match="--revision main is for hub ids"):
        find_checkpoint(ServerConfig(model=str(tmp_path), revision="main"))


@pytest.mark.parametrize(("load_format", "weights"), [("auto", True), ("dummy", False)])
def test_only_needed_files_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load_format: Any, weights: bool
) -> None:
    asked: list[Any] = []

    def download(*wanted: Any) -> Path:
        asked.extend(wanted)
        return write_geometry(tmp_path, "3b")

    monkeypatch.setattr(checkpoint, "download", download)
    found = find_checkpoint(ServerConfig(model="org/name", revision="v2", load_format=load_format))
    assert (found.folder, found.name) == (tmp_path, "org/name")
    name, revision, patterns = asked
    assert (name, revision) == ("org/name", "v2")
    assert ("*.safetensors" in patterns) == weights
    assert {"config.json", "tokenizer.json", "*.jinja"} <= set(patterns)


def test_a_name_that_is_no_hub_id() -> None:
    with pytest.raises(CheckpointError, match="'org/a--b' is neither a folder nor a hub id"):
        find_checkpoint(ServerConfig(model="org/a--b"))


# plan ---------------------------------------------------------------------------------------------------------------


def test_plan_shows_bytes_and_what_fits(tmp_path: Path) -> None:
    text = invoke("plan", str(write_geometry(tmp_path, "mini")), "--memory", "141GiB", "--device", "cuda")
    assert "51,570,323,328 parameters in bfloat16" in text
    assert "96.1 GiB" in text
    assert "16,384 bytes per token" in text
    assert "15.3 MiB per sequence or saved state" in text
    assert "262,144 tokens per sequence, 64 sequences, 8192 prompt tokens per step" in text
    [row] = [line.split() for line in text.splitlines() if line.strip().startswith("131,072 ")]
    assert [cell.startswith("(") for cell in row[1::2]] == [False, False, True, True, True]


def test_plan_counts_int8_saved_states(tmp_path: Path) -> None:
    folder, flags = str(write_geometry(tmp_path, "3b")), ("--memory", "24GiB", "--device", "cuda")
    sizes = (*flags, "--max-num-seqs", "8", "--state-cache-memory-bytes", "100MiB", "--state-cache-dtype", "int8")
    text = invoke("plan", folder, *sizes)
    assert "8.9 MiB per sequence, 3.3 MiB per saved state (int8)" in text
    assert "(8 running, 30 saved)" in text
    report = json.loads(invoke("plan", folder, *sizes, "--json"))
    assert (report["state_bytes_per_sequence"], report["bytes_per_saved_state"]) == (9_318_400, 3_461_120)
    refused = invoke("plan", folder, *sizes, "--no-enable-prefix-caching")
    assert "jamba serve would not start: state_cache_dtype 'int8' compresses the prefix cache, so it needs" in refused


def test_plan_as_json_agrees_with_arithmetic(tmp_path: Path) -> None:
    report = json.loads(
        invoke("plan", str(write_geometry(tmp_path, "3b")), "--memory", "24GiB", "--device", "cuda", "--json")
    )
    assert report["kv_bytes_per_token"] == 1024
    assert report["state_bytes_per_sequence"] == 9_318_400
    usable = 24 * 1024**3 * 92 // 100
    assert report["memory_bytes"] == usable
    assert report["plan"]["max_model_len"] == 262_144
    assert [cell["context"] for cell in report["table"]][::5] == [4096, 32768, 131072, 262144]
    one, eight = (next(c for c in report["table"] if c["context"] == 32768 and c["sequences"] == n) for n in (1, 8))
    assert eight["bytes"] - one["bytes"] == 7 * (9_318_400 + (32768 + 16) * 1024 + 4 * 40_960)  # activations of a reply
    assert all(cell["fits"] == (cell["bytes"] <= usable) for cell in report["table"])


def plan_as_json(folder: Path, *flags: str) -> Any:
    return json.loads(invoke("plan", str(folder), "--device", "cuda", "--memory", "141GiB", "--json", *flags))


def test_plan_of_one_of_eight_processes(tmp_path: Path) -> None:
    """Large with int8 weights on eight GPUs of 80 GB, by hand. Decimal bytes; h 8192, f 24576, d 16384, 72 layers."""
    write_geometry(tmp_path, "large")
    sizes = ["--device", "cuda", "--memory", "80GB", "--tensor-parallel-size", "8", "--quantization", "int8"]
    report = json.loads(invoke("plan", str(tmp_path), *sizes, "--json"))
    h, f, d, layers, mamba, attention = 8192, 24576, 16384, 72, 63, 9
    matrices = 36 * 16 * 3 * h * f + 36 * 3 * h * f  # of experts and dense layers, in one byte
    matrices += attention * 2 * h * 128 * (64 + 8) + 65536 * h  # attention and head, in one byte
    scales = 4 * (36 * 17 * (2 * f + 8 * h) + attention * (80 * 128 + 8 * h) + 65536)  # a rank has all rows of down, o
    plain = 2 * (mamba * (3 * d * h + d * (544 + 512 + 5)) + 65536 * h)  # in_proj, out_proj, x_proj, dt_proj, conv
    everywhere = 8 * 2 * ((2 * layers + 1) * h + mamba * 544 + 36 * 16 * h)  # norms and routers
    total = matrices + scales + plain + everywhere + 4 * mamba * d * (16 + 2)
    assert report["weight_bytes"] == pytest.approx(total / 8, rel=1e-9)
    assert report["kv_bytes_per_token"] == attention * 2 * 1 * 128 * 2  # one of eight KV heads
    assert report["state_bytes_per_sequence"] == mamba * (d // 8) * (16 * 4 + 3 * 2)
    assert report["exchanges"]["count"] == 2 * mamba + attention + layers + 2 == 209
    sums = 207 - mamba  # all sums but those of x_proj have h numbers; a rank sends one section to seven others
    others = h * 2 * 7 / 8 * 2 + 7 * 65536 / 8 * 2  # the embedding, and the logits of a rank to seven others
    assert report["exchanges"]["bytes_alone"] == round(7 * 4 * (sums * h + mamba * 544) + others)
    assert "209 in a step; a rank sends 34,133,120 bytes for one sequence" in invoke("plan", str(tmp_path), *sizes)


def test_plan_counts_quantised_weights(tmp_path: Path) -> None:
    folder = write_geometry(tmp_path, "mini")
    plain, int8 = plan_as_json(folder), plan_as_json(folder, "--quantization", "int8")
    mixers, experts, mlps = 28 * 3 * 4096 * 8192, 16 * 16 * 3 * 4096 * 14336, 16 * 3 * 4096 * 14336
    attention, head = 4 * 2 * 4096 * (4096 + 1024), 65536 * 4096
    rows = 17 * 16 * (2 * 14336 + 4096) + 4 * (4096 + 2 * 1024 + 4096) + 65536  # each has one scale
    assert plain["weight_bytes"] - int8["weight_bytes"] == experts + mlps + attention + head - 4 * rows
    both = plan_as_json(folder, "--quantization", "int8", "--quantize-mamba")
    assert int8["weight_bytes"] - both["weight_bytes"] == mixers - 4 * 28 * (2 * 8192 + 4096)
    int4 = plan_as_json(folder, "--quantization", "int4")
    saved = (experts + mlps + attention + head) * (16 - 4 - 32 / 128) / 8
    assert plain["weight_bytes"] - int4["weight_bytes"] == saved
    assert int4["plan"]["weight_bytes"] == int4["weight_bytes"]


def test_plan_shows_the_decode_limit(tmp_path: Path) -> None:
    flags = ("plan", str(write_geometry(tmp_path, "3b")), "--device", "cuda", "--memory", "80GiB")
    assert "decode at 1 sequence: 6.08 GB per token (--bandwidth shows the limit)" in invoke(*flags)
    text = invoke(*flags, "--bandwidth", "3.35TB", "--quantization", "int8", "--quantize-mamba")
    assert "parameters in bfloat16 with int8 weights (Mamba mixers too)" in text
    assert "decode limit at 1 sequence: 3.11 GB per token / 3,350 GB/s = 1,078 tok/s" in text


def test_plan_shows_what_was_measured_beside_the_limit(tmp_path: Path) -> None:
    # the first token after 10 s, 64 more in as many seconds
    reply = Reply(start=0.0, arrivals=(10.0, 74.0), end=74.0, prompt_tokens=5, output_tokens=65, max_tokens=65)
    levels = [bench.summarize(bench.Plan(load, 1), [reply]) for load in (ClosedLoop(8), Poisson(2.0))]
    (tmp_path / "bench.json").write_bytes(bench.to_json(bench.Report({}, levels)))
    flags = ("--device", "cpu", "--memory", "24GiB", "--bandwidth", "40GB", "--bench", str(tmp_path / "bench.json"))
    text = invoke("plan", str(write_geometry(tmp_path, "3b")), *flags)
    assert "decode limit at 1 sequence: 6.08 GB per token / 40 GB/s = 6.58 tok/s\n" in text
    assert "decode limit at 8 sequences: 6.21 GB per step / 40 GB/s = 51.5 tok/s; measured 8 tok/s, 16% of it\n" in text


def test_plan_refuses_what_is_no_bench_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = str(write_geometry(tmp_path, "3b"))
    for path in ("config.json", "none.json"):
        message = str(jamba(monkeypatch, "plan", folder, "--memory", "8GiB", "--bench", str(tmp_path / path)))
        assert message.startswith(f"jamba: --bench {tmp_path / path} cannot be read as a report of `jamba bench --out")


def test_plan_measures_the_bandwidth_of_a_cpu(tmp_path: Path) -> None:
    folder = str(write_geometry(tmp_path, "3b"))
    report = json.loads(invoke("plan", folder, "--device", "cpu", "--memory", "24GiB", "--threads", "1", "--json"))
    assert 1e8 < report["bandwidth"] < 1e13


def test_plan_refuses_a_bandwidth_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = str(write_geometry(tmp_path, "3b"))
    for text in ("fast", "0"):
        message = str(jamba(monkeypatch, "plan", folder, "--device", "cpu", "--bandwidth", text))
        assert (
            message == f"jamba: --bandwidth is {text!r}; it must be the bytes that are read per second, such as 3.35TB."
        )


def test_plan_without_a_model_is_of_the_demonstration() -> None:
    report = json.loads(invoke("plan", "--json", "--memory", "8GiB", "--bandwidth", "1GB"))
    assert report["model"] == "jamba-demo"
    assert report["plan"]["max_num_seqs"] == 64


def test_plan_says_why_a_server_would_stop(tmp_path: Path) -> None:
    report = json.loads(invoke("plan", str(write_geometry(tmp_path, "large")), "--memory", "80G", "--json"))
    assert report["plan"] is None
    assert "742.4 GiB" in report["refusal"]
    assert not any(cell["fits"] for cell in report["table"])


def test_plan_without_a_gpu_asks_for_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = str(write_geometry(tmp_path, "3b"))
    assert "say how much memory it has with --memory" in str(jamba(monkeypatch, "plan", folder, "--device", "cuda"))


def test_plan_asks_the_driver_for_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 80000, 81000\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    folder = str(write_geometry(tmp_path, "3b"))
    report = json.loads(invoke("plan", folder, "--json", "--gpu-memory-utilization", "0.9"))
    # a tenth of what there is stays free, and 1000 MiB are in use
    assert (report["device"], report["memory_bytes"]) == ("cuda", (81000 * 9 // 10 - 1000) * 1024**2)


def test_the_start_says_whether_results_are_exact() -> None:
    lines = describe_engine(msgspec.structs.replace(INFO, kernels={"linear": "cpu"}), GenerationDefaults())
    assert "results   the same bits in every batch, however prompts are cut and cached" in lines
    info = msgspec.structs.replace(INFO, kernels={"linear": "reference"}, batch_dependent_ops=("linear", "run_experts"))
    lines = describe_engine(info, GenerationDefaults())
    assert "results   last bits may depend on the batch: linear, run_experts" in lines


def test_the_start_says_that_hits_on_int8_saved_states_are_not_exact() -> None:
    info = msgspec.structs.replace(INFO, kernels={"linear": "cpu"}, state_cache_dtype="int8")
    lines = describe_engine(info, GenerationDefaults())
    assert any(line.startswith("memory ") and line.endswith(": 4 running, 4 saved as int8") for line in lines)
    not_exact = "not exact after a prefix-cache hit or a preemption: int8 saved states"
    assert f"results   the same bits in every batch, however prompts are cut; {not_exact}" in lines
    lines = describe_engine(msgspec.structs.replace(info, batch_dependent_ops=("linear",)), GenerationDefaults())
    assert f"results   last bits may depend on the batch: linear; {not_exact}" in lines


def test_a_start_has_one_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, legacy_windows=False)
    with LoadProgress(console) as progress:
        progress.update("loading weights", 0.5)
        progress.update("measuring memory", 0.25)
        shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "starting" in shown
    assert shown.count("\n") == 0


def test_without_a_terminal_a_start_is_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with LoadProgress(Console(file=io.StringIO())) as progress:
        for percent in range(101):
            progress.update("loading weights", percent / 100)
        progress.update("loading weights", 0.0)  # an engine that is restarted
    assert caplog.messages == [f"loading weights: {percent} %" for percent in (0, 25, 50, 75, 100)]


# doctor -------------------------------------------------------------------------------------------------------------


def machine(*rows: tuple[str, str, str]) -> doctor.Machine:
    return doctor.Machine(
        python="3.11",
        torch="2.13",
        platform="Linux",
        cpu_flags={"avx2": True, "amx": False},
        cpu_level="avx2",
        cpu_levels=["portable", "avx2", "avx512", "amx"],
        cpu_units="avx_vnni",
        cpu_amx="no tiles",
        threads=2,
        cuda_devices=None,
        kernels={"cpu": [KernelRow(*row) for row in rows]},
    )


ROWS = (("linear", "cpu", "no compiler"), ("linear", "reference", "selected"), ("linear", "slow", "available"))


def test_doctor_shows_versions_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ask_kernels", lambda: machine(*ROWS))
    text = invoke("doctor")
    assert "avx2, products with 8-bit activations avx_vnni; compiled and faster, but not usable: " in text
    assert "avx512 (this processor lacks it), amx (no tiles); compiled and slower: portable\n" in text
    [row] = [line.split() for line in text.splitlines() if line.strip().startswith("linear ")]
    assert row == ["linear", "reference", "slow", "cpu:", "no", "compiler"]


def test_doctor_describes_a_checkpoint(tmp_path: Path) -> None:
    text = invoke("doctor", str(demo_folder()))
    assert "JambaForCausalLM, 8,771,472 parameters, bfloat16" in text
    assert "quantised        nothing" in text
    save_tiny(tmp_path, hidden_size=64, mamba_dt_rank=32, intermediate_size=64)
    lines = invoke("doctor", str(write_gguf(tmp_path / "tiny.gguf", tmp_path, lambda _: "Q4_1"))).splitlines()
    facts = {line[:16].strip(): line[17:] for line in lines}
    assert facts["checkpoint"] == f"{tmp_path / 'tiny.gguf'}, a GGUF file"
    assert facts["quantised"].endswith(" matrices of type Q4_1")
    assert facts["quantised"] == facts["as stored"].replace(" of type", " matrices of type")


def test_doctor_describes_a_folder_that_another_tool_has_quantised(tmp_path: Path) -> None:
    save_tiny(tmp_path, hidden_size=64, mamba_dt_rank=32, intermediate_size=64)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}

    def write(module: str, weight: quantized_folders.Array) -> quantized_folders.Written | None:
        return quantized_folders.awq(weight, size=32) if module.endswith(("gate_proj", "up_proj")) else None

    folder = quantized_folders.rewrite(tmp_path, tmp_path / "awq", settings, write)
    facts = {line[:16].strip(): line[17:] for line in invoke("doctor", str(folder)).splitlines()}
    assert facts["quantised"] == "20 matrices of type AWQ of 4 bits"
    assert facts["converting"].startswith("rounds 20 quantised matrices twice, first to float32 and then to the new fo")


def test_doctor_fails_where_an_op_has_no_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "ask_kernels", lambda: machine(*ROWS, ("sample", "cpu", "no compiler")))
    assert jamba(monkeypatch, "doctor") == 1
    assert "There is no kernel that runs here for sample on cpu." in capsys.readouterr().out


def test_a_table_shows_text_in_brackets_as_it_is() -> None:
    table = kernel_table("cpu", [KernelRow("linear", "cpu", "gcc [not found]")])
    assert list(table.columns[3].cells) == ["cpu: gcc \\[not found]"]
    assert without_kernel([KernelRow("linear", "cpu", "gcc [not found]")]) == ["linear"]


def test_doctor_says_what_is_not_exact() -> None:
    table = kernel_table("cpu", [KernelRow("linear", "reference", "selected", batch_invariant=False)])
    assert list(table.columns[1].cells) == ["reference (depends on the batch)"]


def test_the_kernels_report_is_what_doctor_reads() -> None:
    found = doctor.ask_kernels()
    assert msgspec.to_builtins(found)["kernels"]["cpu"]
    assert without_kernel(found.kernels["cpu"]) == []


# serve --------------------------------------------------------------------------------------------------------------
