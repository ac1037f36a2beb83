"""The commands, through click's runner and as processes of their own."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner
from mlx_flashhead.convert.cli import main as convert_command
from mlx_lm import utils
from versions import OLD_MLX_LM

from mlx_flashhead import __version__, demo_model, flash_heads, load
from mlx_flashhead.__main__ import main as short_command
from mlx_flashhead.compute import device
from mlx_flashhead.demo import main as demo_command
from mlx_flashhead.folder.format import HEAD_FILE
from mlx_flashhead.folder.section import TableForm, read_section
from mlx_flashhead.generate import main as generate_command

# The module; the package has a function of this name.
mlx_lm_generate = importlib.import_module("mlx_lm.generate")

PROMPT = "The quick brown fox"
BIN = Path(sys.executable).parent


def invoke(command, *words, **options):
    result = CliRunner().invoke(command, [str(w) for w in words], **options)
    assert "Traceback" not in result.output
    return result


def write(folder: Path, *words, prompt: str = PROMPT, **options) -> str:
    """What ``mlx_flashhead.generate`` writes, without its statistics."""
    result = invoke(
        generate_command,
        *("--model", folder, "--prompt", prompt, "--max-tokens", 8),
        *("--verbose", "F", "--ignore-chat-template", *words),
        **options,
    )
    assert result.exit_code == 0, result.output
    return result.stdout.removesuffix("\n")


def expected(
    folder: Path, n_probes: int | None = None, dense: bool = False, exact: bool = False
) -> str:
    model, tokenizer = load(folder, n_probes=n_probes, dense=dense, exact=exact)
    return mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=8)


def run(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(w) for w in words], capture_output=True, text=True, **options
    )


# ---------------------------------------------------------------------------
# generate
# ---------------------------------------------------------------------------


def test_generate_writes_what_the_head_says(untied_folder):
    flash = expected(untied_folder)
    dense = expected(untied_folder, dense=True)
    few = expected(untied_folder, n_probes=1)
    assert len({flash, dense, few}) >= 2
    assert write(untied_folder, "--approximate") == flash
    assert write(untied_folder, "--approximate", "--n-probes", 1) == few
    assert write(untied_folder, "--dense") == dense
    assert write(untied_folder) == write(untied_folder, "--n-probes", 1) == dense
    assert write(untied_folder, "--exact", "--verify-every", 3) == dense


def test_generate_switched_off(untied_folder, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD", "0")
    assert write(untied_folder) == expected(untied_folder, dense=True)


def test_generate_with_all_probes_writes_the_dense_text_of_the_rows(tied_folder):
    all_of_them = ("--approximate", "--n-probes", 126)
    assert write(tied_folder, *all_of_them) == expected(tied_folder, n_probes=126)


def test_generate_uses_the_flash_head_and_leaves_mlx_lm_alone(
    untied_folder, monkeypatch
):
    stock, arguments = utils.load_model, list(sys.argv)
    seen = []
    generate = mlx_lm_generate.generate

    def spy(model, *args, **kwargs):
        seen.append([head.n_probes for head in flash_heads(model)])
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(mlx_lm_generate, "generate", spy)
    write(untied_folder)
    write(untied_folder, "--approximate")
    write(untied_folder, "--n-probes", 7)
    write(untied_folder, "--dense")
    draft = read_section(untied_folder).draft
    assert seen == [[draft.n_probes], [90], [7], []]
    assert utils.load_model is stock
    assert sys.argv == arguments


def test_generate_takes_a_seed(untied_folder):
    sampled = [
        write(untied_folder, "--temp", 1, "--top-p", 0.95, "--seed", seed)
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    "words",
    [
        ("--temp", 1.5),
        ("--temp", 0.7, "--top-p", 0.5),
        ("--temp", 1, "--top-k", 5),
        ("--temp", 1, "--min-p", 0.1, "--min-tokens-to-keep", 2),
        ("--temp", 1, "--xtc-probability", 0.5, "--xtc-threshold", 0.05),
        ("--max-kv-size", 64),
        ("--kv-bits", 8, "--kv-group-size", 32),
        ("--prefill-step-size", 4),
        ("--extra-eos-token", "<300>", "--extra-eos-token", "<301>"),
    ],
)
def test_mlx_lms_flags_mean_the_same(untied_folder, words):
    """With the same seed the text is that of mlx-lm's own command."""
    if OLD_MLX_LM and {"--min-tokens-to-keep", "--prefill-step-size"} & set(words):
        pytest.skip("mlx-lm before 0.32 fails with the one and lacks the other")
    ours = write(untied_folder, "--seed", 3, "--dense", *words)
    theirs = [str(w) for w in words]
    if words[0] == "--extra-eos-token":
        theirs = ["--extra-eos-token", "<300>", "<301>"]
    command = ["--model", str(untied_folder), "--prompt", PROMPT, "--max-tokens", "8"]
    command += ["--verbose", "F", "--ignore-chat-template", "--seed", "3", *theirs]
    mlx_lm_command = click.Command("theirs", callback=mlx_lm_generate.main, params=[])
    before = sys.argv
    sys.argv = ["generate", *command]
    try:
        result = CliRunner().invoke(mlx_lm_command, [])
    finally:
        sys.argv = before
    assert result.exit_code == 0, result.output
    assert ours == result.stdout.removesuffix("\n")


def test_a_flag_that_takes_several_values_can_be_repeated(untied_folder):
    model, tokenizer = load(untied_folder)
    stream = mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=8)
    tokens = [response.token for response in stream]
    stop = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    word = tokenizer.convert_ids_to_tokens(tokens[stop])
    unused = tokenizer.convert_ids_to_tokens(next(iter({300, 301} - set(tokens))))
    flags = ("--extra-eos-token", unused, "--extra-eos-token", word)
    assert write(untied_folder, *flags) == tokenizer.decode(tokens[:stop])


def test_short_flags(untied_folder):
    words = ["--model", untied_folder, "-p", PROMPT, "-m", 8, "--verbose", "F"]
    result = invoke(generate_command, *words, "--ignore-chat-template")
    assert result.stdout.removesuffix("\n") == expected(untied_folder)


def test_the_chat_template_and_its_switches(untied_folder, monkeypatch):
    prompts = []
    generate = mlx_lm_generate.generate

    def spy(model, tokenizer, prompt, **kwargs):
        prompts.append(tokenizer.decode(prompt))
        return generate(model, tokenizer, prompt, **kwargs)

    monkeypatch.setattr(mlx_lm_generate, "generate", spy)
    words = ("--model", untied_folder, "--prompt", "Hi", "-m", 2)
    for more in (
        (),
        ("--system-prompt", "Be brief."),
        ("--ignore-chat-template",),
    ):
        assert invoke(generate_command, *words, *more).exit_code == 0
    assert prompts == [
        "[user]Hi[assistant]",
        "[system]Be brief.[user]Hi[assistant]",
        "Hi",
    ]


def test_the_prompt_from_standard_input(untied_folder):
    found = write(untied_folder, prompt="-", input=PROMPT)
    assert found == expected(untied_folder)


@pytest.mark.parametrize("prompt", ["-5 degrees", "--help me", "a=b", "", "é\\n中"])
def test_odd_prompts(untied_folder, prompt):
    result = invoke(
        generate_command, "--model", untied_folder, f"--prompt={prompt}", "-m", 2
    )
    assert result.exit_code == 0, result.output


def test_verbose_statistics(untied_folder):
    result = invoke(
        generate_command, "--model", untied_folder, "--prompt", "Hi", "-m", 3
    )
    assert result.exit_code == 0
    assert "Generation: 3 tokens" in result.stdout


def test_generate_help_has_every_flag_of_mlx_lm():
    result = invoke(generate_command, "--help")
    assert result.exit_code == 0
    flags = [
        flag
        for action in mlx_lm_generate.setup_arg_parser()._actions
        for flag in action.option_strings
    ]
    for flag in [*flags, "--n-probes", "--dense"]:
        assert flag in result.stdout


def test_an_unconverted_model_runs_dense(untied_source, untied_folder):
    assert write(untied_source) == expected(untied_folder, dense=True)


def assert_one_line(result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    last = result.stderr.rstrip("\n").split("\n")[-1]
    assert last.startswith("Error: ") and len(last) > 15
    return last


def test_generate_with_a_missing_model(tmp_path):
    for name in ("missing", "far/away/missing"):
        words = ("--model", tmp_path / name, "--prompt", "Hi")
        result = invoke(generate_command, *words)
        message = assert_one_line(result)
        assert name in message
        assert "folder" in message


NO_MODELS = {
    "generate": ["--prompt", "Hi"],
    "chat": [],
    "server": ["--port", "0"],
    "run": [],
    "tune": [],
    "evaluate": ["--text", "a.txt"],
    "benchmark": ["--quick"],
    "demo": [],
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_a_folder_that_is_no_model(tmp_path, name):
    target = ["mlx_lm.chat"] if name == "run" else []
    for flag in (["--model", tmp_path], [f"--model={tmp_path}"]):
        result = invoke(short_command, name, *target, *flag, *NO_MODELS[name])
        assert assert_one_line(result) == (
            f"Error: --model {tmp_path} is no model folder: it has no config.json; "
            "name the folder that has it, or a Hugging Face id"
        )


def test_generate_with_a_damaged_head(untied_folder, tmp_path):
    copy = Path(shutil.copytree(untied_folder, tmp_path / "copy"))
    (copy / HEAD_FILE).unlink()
    result = invoke(generate_command, "--model", copy, "--prompt", "Hi")
    message = assert_one_line(result)
    assert HEAD_FILE in message and "MLX_FLASHHEAD=0" in message
    assert write(copy, "--dense") == expected(untied_folder, dense=True)


def test_generate_with_options_that_do_not_fit(untied_folder):
    words = ("--model", untied_folder, "--prompt", "Hi")
    result = invoke(generate_command, *words, "--n-probes", 127)
    assert "1 to 126" in assert_one_line(result)
    for more in (("--n-probes", 0), ("--max-tokens", "x"), ("--no-such-option",)):
        assert_one_line(invoke(generate_command, *words, *more), 2)
    for more in (
        *(() if OLD_MLX_LM else (("--max-tokens", 0),)),  # its generate() fails
        ("--chat-template-config", "{"),
        ("--prompt-cache-file", "missing.safetensors"),
        ("--temp", 1, "--top-p", 0.5, "--min-p", 7),
    ):
        assert_one_line(invoke(generate_command, *words, *more))


# ---------------------------------------------------------------------------
# The default model
# ---------------------------------------------------------------------------


def test_without_a_model_the_demo_is_used_and_said(
    untied_folder, tmp_path, monkeypatch
):
    """As if it had been converted before."""
    monkeypatch.setenv("MLX_FLASHHEAD_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model, "demo_installed", lambda: True)
    shutil.copytree(untied_folder, tmp_path / "gemma-3-270m")
    words = ("--prompt", PROMPT, "-m", 8, "--verbose", "F", "--ignore-chat-template")
    result = invoke(generate_command, *words)
    assert result.exit_code == 0
    assert result.stdout.removesuffix("\n") == expected(untied_folder)
    assert "Gemma 3 270M" in result.stderr
    assert demo_model.DEMO_PACKAGE in result.stderr


def test_without_the_demo_a_hub_id_is_used_and_said(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "demo_installed", lambda: False)
    result = invoke(generate_command, "--prompt", "Hi")
    assert demo_model.HUB_ID in assert_one_line(result)
    assert [p for p in tmp_path.rglob("*") if "gemma" in p.name] == []


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_CACHE", str(tmp_path / "a"))
    assert demo_model.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("MLX_FLASHHEAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert demo_model.cache_folder() == tmp_path / "b/mlx-flashhead"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert demo_model.cache_folder() == tmp_path / "c/.cache/mlx-flashhead"


# ---------------------------------------------------------------------------
# demo, and the hint on BLAS
# ---------------------------------------------------------------------------


def test_demo(untied_folder):
    words = ("--model", untied_folder, "--prompt", PROMPT, "--max-tokens", 8)
    for exact in (True, False):
        result = invoke(demo_command, *words, *["--approximate"][exact:])
        assert result.exit_code == 0, result.output
        for text in (
            expected(untied_folder, exact=exact),
            expected(untied_folder, dense=True),
            "Dense head: reads all 1,003 rows",
            "FlashHead, exact: drafts" if exact else "FlashHead, approximate: reads",
            "times the dense head's speed",
        ):
            assert text in result.stdout
        assert result.stdout.count("tokens per second") == 2
        if exact:
            assert "The texts are the same, all 8 tokens" in result.stdout
        assert ("of the drafted tokens stood" in result.stdout) == exact
    recall = read_section(untied_folder).measured.recall
    assert f"Recall {100 * recall:.2f} %" in result.stdout


def test_the_demo_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model, "demo_installed", lambda: False)
    message = assert_one_line(invoke(demo_command))
    assert f"pip install {demo_model.DEMO_PACKAGE}" in message


def test_demo_with_a_model_that_has_no_flash_head(untied_source, tmp_path):
    result = invoke(demo_command, "--model", untied_source)
    assert "mlx_flashhead.convert" in assert_one_line(result)
    result = invoke(demo_command, "--model", tmp_path / "missing")
    assert "no such folder" in assert_one_line(result)


def test_demo_with_a_damaged_folder(untied_folder, tmp_path):
    copy = Path(shutil.copytree(untied_folder, tmp_path / "copy"))
    (copy / HEAD_FILE).unlink()
    assert HEAD_FILE in assert_one_line(invoke(demo_command, "--model", copy))
    (copy / "config.json").write_text("{")
    assert "config.json" in assert_one_line(invoke(demo_command, "--model", copy))


def test_the_hint_is_one_line_and_only_where_it_helps(monkeypatch):
    monkeypatch.setattr(device.platform, "system", lambda: "Darwin")
    assert device.blas_hint() is None
    monkeypatch.setattr(device.platform, "system", lambda: "Linux")

    class Maps:
        text = "/usr/lib/libopenblas.so.0"

        def __init__(self, path):
            assert path == "/proc/self/maps"

        def exists(self):
            return True

        def read_text(self):
            return self.text

    monkeypatch.setattr(device, "Path", Maps)
    assert device.blas_hint() is None
    Maps.text = "/usr/lib/libblas.so.3"
    if mx.default_device() == mx.Device(mx.cpu):
        assert "LD_PRELOAD" in device.blas_hint() and "\n" not in device.blas_hint()


# ---------------------------------------------------------------------------
# As a user runs them
# ---------------------------------------------------------------------------


def test_convert_help():
    result = invoke(convert_command, "--help")
    assert result.exit_code == 0
    for flag in (
        *("--hf-path", "--gguf-path", "--mlx-path", "--quantize", "--q-bits"),
        *("--q-group-size", "--q-mode", "--dtype", "--revision"),
        *("--trust-remote-code", "--head-bits", "--centroid-bits", "--group-size"),
        *("--cluster-size", "--n-probes", "--calibration-data", "--seed", "--recipe"),
    ):
        assert flag in result.stdout


def test_convert_flags_reach_the_folder(untied_source, tmp_path):
    result = invoke(
        convert_command,
        *("--hf-path", untied_source, "--mlx-path", tmp_path / "made", "-q"),
        *("--q-bits", 8, "--q-group-size", 32, "--dtype", "bfloat16"),
        *("--head-bits", 6, "--centroid-bits", 5, "--group-size", 32),
        *("--cluster-size", 10, "--n-probes", 12, "--seed", 5, "--recipe", "paper"),
        "--json",
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["head_bits"] == 6 and report["centroid_bits"] == 5
    section = read_section(tmp_path / "made")
    assert section.rows == TableForm(bits=6, group_size=32)
    assert section.centroids == TableForm(bits=5, group_size=32)
    assert (section.cluster_size, section.n_probes) == (10, 12)
    assert (section.seed, section.recipe) == (5, "paper")
    config = json.loads((tmp_path / "made/config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (
        *(8, 32),
    )


def test_converting_and_generating_as_processes(untied_source, untied_folder, tmp_path):
    """By the installed command and by the module, from the folder that one is in."""
    made = run(
        *(BIN / "mlx_flashhead.convert", "--hf-path", untied_source),
        *("--cluster-size", 8, "--n-probes", 90),
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    assert "Try " in made.stdout and "mlx_model" in made.stdout
    folder = tmp_path / "mlx_model"
    # In another process, and so with another hash seed, it is the same head.
    for name in (HEAD_FILE, "config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (untied_folder / name).read_bytes()

    command = made.stdout.split("Try ")[1].strip().split()
    assert command[:3] == ["python", "-m", "mlx_flashhead.generate"]
    words = [*command[1:5], "--prompt", PROMPT, "-m", "8", "--verbose", "F"]
    written = run(sys.executable, *words, "--ignore-chat-template", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert written.stdout.removesuffix("\n") == expected(folder)
    assert "Traceback" not in written.stderr

    piped = run(
        *(BIN / "mlx_flashhead.generate", "--model", folder, "--prompt", "-"),
        *("-m", 8, "--verbose", "F", "--ignore-chat-template", "--n-probes", 126),
        input=PROMPT,
    )
    assert piped.stdout.removesuffix("\n") == expected(folder, n_probes=126)


@pytest.mark.parametrize("module", ["convert", "generate", "demo"])
def test_modules_know_errors(module, tmp_path):
    command = [sys.executable, "-m", f"mlx_flashhead.{module}"]
    flag = "--hf-path" if module == "convert" else "--model"
    failed = run(*command, flag, tmp_path / "missing", cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.strip().split("\n")[-1].startswith("Error: ")
    assert "Traceback" not in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_running_does_not_import_the_converter():
    code = "import sys, mlx_flashhead.generate, mlx_flashhead.demo\n"
    code += "print([m for m in sys.modules if 'flashhead.convert' in m])"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_installed_commands():
    commands = importlib.metadata.entry_points(group="console_scripts")
    for name in ("convert", "generate", "demo"):
        (command,) = commands.select(name=f"mlx_flashhead.{name}")
        assert callable(command.load())


def test_commands_by_their_short_names():
    """As mlx_lm has them; one that does not exist is refused in a line."""
    shown = invoke(short_command, "--help").output
    commands = importlib.metadata.entry_points(group="console_scripts")
    names = [c.name[14:] for c in commands if c.name.startswith("mlx_flashhead.")]
    assert len(names) > 8
    for name in names:
        assert re.search(rf"^  {name} ", shown, flags=re.M), name
    theirs = invoke(generate_command, "--help").output
    for name in ("generate", "mlx_flashhead.generate"):
        ours = invoke(short_command, name, "--help").output
        assert ours.splitlines()[1:] == theirs.splitlines()[1:]
    unknown = invoke(short_command, "compile")
    assert unknown.exit_code == 2 and unknown.output.count("\n") == 1
    assert "no command 'compile'; there are benchmark, chat, " in unknown.output
    assert invoke(short_command, "--version").output == f"{__version__}\n"


def test_the_package_runs_as_a_module(tmp_path):
    done = run(sys.executable, "-m", "mlx_flashhead", "generate", "-h", cwd=tmp_path)
    assert done.stdout.startswith("Usage: mlx_flashhead generate [OPTIONS]")
