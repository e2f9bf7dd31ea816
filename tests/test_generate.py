"""`python -m mlx_openelm.generate`, run as a person runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_openelm import OpenELM, generate
from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.tokenizer.tokenizer import CHAT_TEMPLATE, Tokenizer

from .conftest import Run

MODULE = "mlx_openelm.generate"
PROMPT = "Once upon a time"
# The command, whose third token takes a while
SLOW = """
import sys, time
from mlx_openelm.generate import __main__ as command
stream = command.stream_generate
def slow(*arguments, **options):
    for i, response in enumerate(stream(*arguments, **options)):
        yield response
        if i == 2:
            print("generating", file=sys.stderr, flush=True)
            time.sleep(60)
command.stream_generate = slow
sys.exit(command.main())
"""


def test_text_goes_to_stdout_and_the_rest_to_stderr(
    run: Run, demo: tuple[OpenELM, Tokenizer]
) -> None:
    result = run(MODULE, "--prompt", PROMPT, "--max-tokens", "30")
    assert result.returncode == 0
    assert result.stdout == generate(*demo, PROMPT, max_tokens=30) + "\n"
    assert result.stderr.count("\n") == 1
    assert "bundled demo" in result.stderr
    again = run(MODULE, "--prompt", PROMPT, "--max-tokens", "30", "--temp", "0", "--quiet")
    assert again.stdout == result.stdout
    assert again.stderr == ""


def test_a_prompt_from_stdin_loses_its_last_newline(run: Run) -> None:
    options = ("--max-tokens", "10", "--model", "demo")
    piped = run(MODULE, "--prompt", "-", *options, stdin=PROMPT + "\n")
    assert piped.stdout == run(MODULE, "--prompt", PROMPT, *options).stdout
    assert piped.stderr == ""


def test_verbose_tells_speed_and_memory(run: Run) -> None:
    result = run(MODULE, "-p", PROMPT, "-m", "5", "-v")
    for words in (
        "Start: imports ",
        "first token after",
        "Prompt: ",
        "Generation: 5 tokens",
        "Peak memory: ",
    ):
        assert words in result.stderr


def test_a_full_context_is_reported(run: Run) -> None:
    """The demo's context has 1,024 tokens; the last one generated needs no room in it."""
    long = run(MODULE, "-p", PROMPT, "-m", "2000", "--json")
    report = json.loads(long.stdout)
    assert (report["finish_reason"], report["context_full"]) == ("length", True)
    made = report["generation_tokens"]
    assert made + report["prompt_tokens"] == 1025
    assert f"context of 1,024 tokens is full: 5 of the prompt and {made:,} generated" in long.stderr
    assert "not 2,000" in long.stderr
    unlimited = run(MODULE, "-p", PROMPT, "-m", "-1", "--json")
    assert json.loads(unlimited.stdout)["context_full"]
    assert "is full" not in unlimited.stderr  # as it was asked for
    short = run(MODULE, "-p", PROMPT, "-m", "5", "--json")
    assert not json.loads(short.stdout)["context_full"]


def test_json_is_one_object(run: Run) -> None:
    text = run(MODULE, "-p", PROMPT, "-m", "6", "-q").stdout.removesuffix("\n")
    report = json.loads(run(MODULE, "-p", PROMPT, "-m", "6", "--json").stdout)
    assert report["text"] == text
    assert report["finish_reason"] == "length"
    assert len(report["tokens"]) == report["generation_tokens"] == 6


def test_drafts_change_nothing_but_the_speed(run: Run) -> None:
    options = ("-p", PROMPT, "-m", "60", "-q", "--repetition-penalty", "1.1")
    alone = json.loads(run(MODULE, *options, "--json").stdout)
    assert "drafts" not in alone
    sources = ("--draft-model", "demo-draft", "--prompt-lookup", "--num-draft-tokens", "3")
    drafted = json.loads(run(MODULE, *options, *sources, "--json").stdout)
    assert drafted["tokens"] == alone["tokens"]
    assert drafted["drafts"]["tokens"] == 60
    assert 1 <= drafted["drafts"]["tokens_per_step"] <= 4
    told = run(MODULE, *options[:-3], *sources, "-v").stderr
    assert "Drafts: " in told and "tokens per step" in told


def test_sampling_options_reach_the_sampler(run: Run) -> None:
    def text(*options: str) -> str:
        result = run(MODULE, "-p", PROMPT, "-m", "25", "-q", *options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    greedy = text()
    hot = text("--temp", "1.2", "--seed", "1")
    assert hot == text("--temp", "1.2", "--seed", "1") != text("--temp", "1.2", "--seed", "2")
    assert text("--temp", "1.2", "--top-k", "1") == greedy
    assert text("--temp", "1.2", "--top-p", "1e-6") == greedy
    assert text("--temp", "1.2", "--min-p", "1") == greedy
    assert text("--repetition-penalty", "2") != greedy
    assert greedy.startswith(text("--stop", greedy[5:8]).removesuffix("\n"))
    assert len(text("--stop", greedy[5:8])) == 6


def test_chat_puts_the_prompt_into_the_instruct_format(
    run: Run, demo: tuple[OpenELM, Tokenizer]
) -> None:
    model, tokenizer = demo
    messages = [{"role": "user", "content": "Who are you?"}]
    ids = tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATE)
    result = run(MODULE, "-p", "Who are you?", "--chat", "-m", "12", "-q")
    assert "no chat template: that of OpenELM's Instruct models is used" in result.stderr
    assert result.stdout == generate(model, tokenizer, ids, max_tokens=12) + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--temp", "-1"], "temp must be at least 0"),
        (["--top-p", "2"], "top_p must be between 0 and 1"),
        (["--max-tokens", "0"], "max_tokens must be at least 1"),
        (["--prompt", "a " * 1100], "tokens, more than the 1024"),
        (["--model", "./nowhere"], "./nowhere: no such file or directory"),
        (["--model", "nowhere"], "nowhere: no such file or directory"),
        (["--model", str(Path(__file__))], "is a file, not a model directory"),
        (["--model", str(Path(__file__).parent)], "config.json: No such file"),
        (["--tokenizer", "./nowhere.model"], "./nowhere.model: no such file"),
        (["--max-kv-size", "2"], "max_kv_size must be more than 4"),
        (["--kv-bits", "3"], "kv_bits must be 4 or 8, not 3"),
        (["--draft-model", "./nowhere"], "./nowhere: no such file or directory"),
        (["--prompt-lookup", "--num-draft-tokens", "0"], "num_draft_tokens must be at least 1"),
        (["--prompt-lookup", "--max-kv-size", "99"], "can't be combined with a context that slid"),
        (["--temp", "warm"], "argument --temp: invalid float value: 'warm'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run: Run, options: list[str], message: str) -> None:
    given = options if "--prompt" in options else ["--prompt", PROMPT, *options]
    result = run(MODULE, "--quiet", *given)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback(run: Run) -> None:
    result = run(MODULE, "-p", "x", "--temp", "-1", "--debug")
    assert "Traceback" in result.stderr
    assert result.returncode == 1


def test_ctrl_c_ends_with_what_was_made(demo: tuple[OpenELM, Tokenizer]) -> None:
    endless = ["-m", "1000000", "--max-kv-size", "256", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, "-p", PROMPT, *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a suite that runs in the background has Ctrl-C turned off, and hands that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    begun = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    assert rest.endswith("\n")
    assert generate(*demo, PROMPT, max_tokens=20, max_kv_size=256).startswith(begun)


def test_sigterm_ends_with_what_was_made_and_saves_the_cache(tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    options = ["-m", "-1", "--json", "-q", "--prompt-cache-file", str(file)]
    for number in (signal.SIGTERM, signal.SIGHUP):
        with subprocess.Popen(
            [sys.executable, "-c", SLOW, "-p", PROMPT, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == "generating\n"
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (128 + number, "")
        assert json.loads(out)["finish_reason"] == "interrupted"
        assert file.exists()


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m {MODULE} -p '{PROMPT}' -m 300 -q | head -c 10"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert len(result.stdout) == 10
    assert result.stderr == ""


def test_the_name_generate_is_the_function_and_the_package() -> None:
    import importlib

    import mlx_openelm

    importlib.import_module("mlx_openelm.generate.__main__")
    assert callable(mlx_openelm.generate)
    assert "mlx_openelm.generate" in sys.modules


@pytest.mark.parametrize("columns", [40, 50, 80])
def test_no_help_is_wider_than_the_terminal(run: Run, columns: int) -> None:
    for words in (
        [MODULE],
        ["mlx_openelm"],
        ["mlx_openelm.convert"],
        ["mlx_openelm.convert", "verify"],
        ["mlx_openelm.benchmarks"],
        ["mlx_openelm.benchmarks", "run"],
    ):
        result = run(*words, "--help", COLUMNS=str(columns))
        assert result.returncode == 0, result.stderr
        assert max(map(len, result.stdout.splitlines())) <= columns


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_are_known_by_name(run: Run, name: str) -> None:
    result = run(MODULE, "--model", name, "-p", PROMPT, "-m", "3")
    assert result.returncode == 0
    assert result.stderr == ""


def test_importing_is_cheap() -> None:
    code = (
        "import time; t = time.perf_counter(); import mlx_openelm; t = time.perf_counter() - t; "
        "import sys; heavy = {'torch', 'transformers', 'huggingface_hub', 'sentencepiece', "
        "'tokenizers', 'yaml', 'rich', 'numpy'}; print(t, *filter(sys.modules.get, heavy))"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
        for _ in range(5)
    ]
    assert min(float(seconds) for seconds, *_ in outputs) < 0.25
    assert all(heavy == [] for _, *heavy in outputs)
