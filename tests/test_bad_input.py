"""What cannot be converted: one line that says why, and nothing left behind."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import mlx.core as mx
import pytest
import small_models
from click.testing import CliRunner
from mlx_flashhead.convert import convert, pipeline, staging
from mlx_flashhead.convert.cli import main
from mlx_flashhead.convert.staging import StagingError
from test_gguf import gguf_tensors, reference_model, write_gguf

CASES = {}


def case(*complaints: str):
    """A function that makes bad input in a folder, and gives convert's options."""

    def add(make):
        CASES[make.__name__] = (make, complaints)
        return make

    return add


def source_in(folder: Path, name: str = "llama", **options) -> Path:
    return small_models.write(name, folder / "source", 600, **options)


def edit_config(source: Path, **changes) -> dict:
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return {"hf_path": str(source)}


def edit_weights(source: Path, edit) -> dict:
    file = source / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    edit(weights)
    mx.save_safetensors(str(file), weights)
    return {"hf_path": str(source)}


@case("missing/folder", "no such folder")
def missing_folder(folder):
    return {"hf_path": str(folder / "missing/folder")}


@case("nobody/no-such-model", "no such folder")
def missing_hub_id(folder):
    return {"hf_path": "nobody/no-such-model"}


@case("config.json")
def folder_without_config(folder):
    (folder / "empty").mkdir()
    return {"hf_path": str(folder / "empty")}


@case("safetensors")
def folder_without_weights(folder):
    source = source_in(folder)
    (source / "model.safetensors").unlink()
    return {"hf_path": str(source)}


@case("config.json", "not valid JSON")
def malformed_config(folder):
    source = source_in(folder)
    (source / "config.json").write_text('{"model_type": "llama",')
    return {"hf_path": str(source)}


@case("config.json")
def config_that_is_a_list(folder):
    source = source_in(folder)
    (source / "config.json").write_text("[1, 2]")
    return {"hf_path": str(source)}


@case("config.json")
def config_that_is_not_text(folder):
    source = source_in(folder)
    (source / "config.json").write_bytes(b"\xff\xfe\x00")
    return {"hf_path": str(source)}


@case("source", "cannot load")
def config_without_sizes(folder):
    source = source_in(folder)
    (source / "config.json").write_text('{"model_type": "llama"}')
    return {"hf_path": str(source)}


@case("source", "cannot load")
def config_with_a_wrong_type(folder):
    return edit_config(source_in(folder), num_hidden_layers="two")


@case("source", "cannot load", "query_pre_attn_scalar")
def config_that_transformers_refuses(folder):
    return edit_config(source_in(folder, "gemma2"), query_pre_attn_scalar=16.5)


@case("teapot")
def unknown_architecture(folder):
    return edit_config(source_in(folder), model_type="teapot")


@case("source", "cannot load")
def weights_of_another_size(folder):
    return edit_config(source_in(folder), vocab_size=700)


@case("source")
def folder_without_tokenizer(folder):
    source = source_in(folder)
    for file in source.glob("tokenizer*"):
        file.unlink()
    return {"hf_path": str(source)}


@case("source")
def malformed_tokenizer(folder):
    source = source_in(folder)
    (source / "tokenizer.json").write_text('{"model": 3}')
    return {"hf_path": str(source)}


@case("source")
def truncated_safetensors(folder):
    source = source_in(folder)
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    return {"hf_path": str(source)}


@case("source")
def safetensors_cut_in_the_header(folder):
    source = source_in(folder)
    os.truncate(source / "model.safetensors", 100)
    return {"hf_path": str(source)}


@case("source")
def pointer_in_place_of_weights(folder):
    source = source_in(folder)
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (source / "model.safetensors").write_text(text)
    return {"hf_path": str(source)}


def small_gguf(folder: Path) -> Path:
    model = reference_model("llama", True)
    return write_gguf(folder / "model.gguf", "llama", gguf_tensors("llama", model))


@case("model.gguf")
def truncated_gguf(folder):
    file = small_gguf(folder)
    os.truncate(file, file.stat().st_size * 2 // 3)
    return {"gguf_path": str(file)}


@case("missing.gguf")
def missing_gguf(folder):
    return {"gguf_path": str(folder / "missing.gguf")}


@case("model.gguf")
def gguf_that_is_none(folder):
    (folder / "model.gguf").write_text("hello" * 100)
    return {"gguf_path": str(folder / "model.gguf")}


@case("gguf")
def gguf_that_is_a_folder(folder):
    (folder / "gguf").mkdir()
    return {"gguf_path": str(folder / "gguf")}


@case("--gguf-path")
def gguf_as_hf_path(folder):
    return {"hf_path": str(small_gguf(folder))}


@case("NaN")
def nan_in_the_head(folder):
    def edit(weights):
        weights["lm_head.weight"][17, 3] = float("nan")

    return edit_weights(source_in(folder), edit)


@case("infinite")
def infinity_in_the_head(folder):
    def edit(weights):
        weights["lm_head.weight"][599, 0] = -float("inf")

    return edit_weights(source_in(folder), edit)


@case("not finite")
def nan_in_the_body(folder):
    def edit(weights):
        weights["model.layers.1.mlp.up_proj.weight"][5, 5] = float("nan")

    return edit_weights(source_in(folder), edit)


UNUSUAL = """
import mlx.nn as nn
from mlx_lm.models import llama
ModelArgs = llama.ModelArgs
class Model(llama.Model):
    def __call__(self, inputs, cache=None):
        return super().__call__(inputs, cache)[..., ::-1]
"""


@case("lm_head", "looked at")
def no_head(folder):
    source = source_in(folder)
    (source / "unusual.py").write_text(UNUSUAL)
    edit_config(source, model_file="unusual.py")
    return {"hf_path": str(source), "trust_remote_code": True}


@case("already")
def target_is_a_folder(folder):
    (folder / "target").mkdir()
    return {"hf_path": str(source_in(folder))}


@case("already")
def target_is_a_file(folder):
    (folder / "target").write_text("mine")
    return {"hf_path": str(source_in(folder))}


@case("already")
def target_is_a_dangling_link(folder):
    (folder / "target").symlink_to(folder / "nowhere")
    return {"hf_path": str(source_in(folder))}


@case("cannot write")
def target_below_a_file(folder):
    (folder / "file").write_text("mine")
    return {"hf_path": str(source_in(folder)), "mlx_path": folder / "file/target"}


@case("no such folder")
def target_in_a_new_folder(folder):
    """The folders above the target go, too."""
    return {"hf_path": str(folder / "no"), "mlx_path": folder / "new/deep/target"}


@case("--hf-path", "--gguf-path")
def no_input(folder):
    return {}


@case("--hf-path", "--gguf-path")
def two_inputs(folder):
    return {"hf_path": str(source_in(folder)), "gguf_path": str(small_gguf(folder))}


@case("too short")
def short_calibration_text(folder):
    (folder / "text.txt").write_text("Too short.\n")
    source = source_in(folder)
    return {"hf_path": str(source), "calibration_data": str(folder / "text.txt")}


@case("text.txt", "No such file")
def missing_calibration_text(folder):
    source = source_in(folder)
    return {"hf_path": str(source), "calibration_data": str(folder / "text.txt")}


@case("multiple", "--group-size")
def group_size_that_does_not_fit(folder):
    source = source_in(folder, hidden_size=96, head_dim=24)
    return {"hf_path": str(source), "group_size": 64}


@case("48", "--head-bits 16")
def hidden_size_that_no_group_size_fits(folder):
    source = source_in(folder, hidden_size=48, head_dim=12)
    return {"hf_path": str(source)}


@case("-q", "bits")
def body_bits_that_do_not_fit(folder):
    source = source_in(folder)
    return {"hf_path": str(source), "quantize": True, "q_bits": 7}


@case("-q", "group")
def body_group_size_that_does_not_fit(folder):
    source = source_in(folder)
    return {"hf_path": str(source), "quantize": True, "q_group_size": 48}


@case("source", "cannot load", "mxfp6")
def a_quantization_mode_that_mlx_does_not_have(folder):
    quantize = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    source = source_in(folder, quantize=quantize)
    head = {"lm_head": quantize | {"mode": "mxfp6"}}
    return edit_config(source, quantization=quantize | head)


@case("--q-mode", "mxfp6", "nvfp4")
def a_mode_for_the_body_that_mlx_does_not_have(folder):
    options = {"quantize": True, "q_mode": "mxfp6"}
    return {"hf_path": str(source_in(folder))} | options


@case("--n-probes", "1 to 38", "39")
def more_probes_than_clusters(folder):
    return {"hf_path": str(source_in(folder)), "n_probes": 39}


@case("already", "made from")
def a_model_that_has_a_flash_head(folder):
    source = source_in(folder)
    (source / "flashhead.safetensors").write_bytes(b"")
    return edit_config(source, flashhead={"format_version": 1})


def contents(folder: Path) -> dict[str, tuple]:
    return {
        str(p.relative_to(folder)): (p.lstat().st_mode, p.lstat().st_mtime_ns)
        for p in folder.rglob("*")
    }


def options_for(make, folder: Path) -> dict:
    return {"mlx_path": folder / "target"} | make(folder)


@pytest.mark.parametrize("name", CASES)
def test_in_python(tmp_path, monkeypatch, name):
    # Python itself keeps what it compiles of a model that brings code.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    make, complaints = CASES[name]
    options = options_for(make, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError) as error:
        convert(**options, verbose=False)
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 600
    for text in complaints:
        assert text in message
    assert contents(tmp_path) == before


def command_line(options: dict) -> list[str]:
    words = []
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words


def assert_one_line(stderr: str) -> str:
    """The last line is the error, the only one, and there is no traceback."""
    assert "Traceback" not in stderr
    lines = stderr.rstrip("\n").split("\n")
    assert lines[-1].startswith("Error: ") and len(lines[-1]) > 15
    assert sum(line.startswith("Error") for line in lines) == 1
    return lines[-1]


# One of each kind of error: of the source, of a GGUF file, of the target, of the
# options, of the text and of what is found on the way.
ON_THE_COMMAND_LINE = [
    "missing_folder",
    "truncated_gguf",
    "target_is_a_folder",
    "no_input",
    "short_calibration_text",
    "nan_in_the_head",
    "more_probes_than_clusters",
]


@pytest.mark.parametrize("name", ON_THE_COMMAND_LINE)
def test_on_the_command_line(tmp_path, name):
    make, complaints = CASES[name]
    options = options_for(make, tmp_path)
    before = contents(tmp_path)
    result = CliRunner().invoke(main, command_line(options))
    assert result.exit_code == 1, result.exception
    message = assert_one_line(result.stderr)
    for text in complaints:
        assert text in message
    assert result.stdout == ""
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        ["--head-bits", "7"],
        ["--cluster-size", "129"],
        ["--n-probes", "0"],
        ["--seed", "-1"],
        ["--recipe", "theirs"],
        ["--no-such-option"],
        ["surplus"],
    ],
)
def test_options_that_do_not_exist(untied_source, tmp_path, words):
    options = {"hf_path": untied_source, "mlx_path": tmp_path / "target"}
    result = CliRunner().invoke(main, [*command_line(options), *words])
    assert result.exit_code == 2
    assert_one_line(result.stderr)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "option, value",
    [
        ("head_bits", 7),
        ("centroid_bits", 0),
        ("group_size", 48),
        ("cluster_size", 1),
        ("cluster_size", 500),
        ("n_probes", 0),
        ("recipe", "theirs"),
        ("dtype", "int8"),
        ("q_mode", "int4"),
    ],
)
def test_values_that_do_not_exist(untied_source, tmp_path, option, value):
    with pytest.raises(ValueError) as error:
        convert(
            str(untied_source),
            tmp_path / "target",
            verbose=False,
            **({"quantize": True} | {option: value}),
        )
    assert "\n" not in str(error.value)
    assert str(value) in str(error.value)
    assert contents(tmp_path) == {}


def test_the_way_out_of_an_odd_hidden_size_is_one(tmp_path):
    source = source_in(tmp_path, hidden_size=48, head_dim=12)
    report = convert(
        str(source), tmp_path / "made", head_bits=16, centroid_bits=16, verbose=False
    )
    assert report.head_bits == 16


# ---------------------------------------------------------------------------
# Disks and interruptions
# ---------------------------------------------------------------------------


def test_a_disk_without_room(untied_source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage(9, 8, 100_000))
    with pytest.raises(StagingError, match="the disk has 0.0 GB left") as error:
        convert(str(untied_source), tmp_path / "target", verbose=False)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == {}


PRELUDE = """
import os, resource, signal, sys
from mlx_flashhead.convert import cli, pack
"""
LIMITED = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
cli.main(sys.argv[2:])
"""
# Processes started in the background of a shell ignore SIGINT otherwise.
INTERRUPTED = """
signal.signal(signal.SIGINT, signal.default_int_handler)
pack.pack = lambda *_, **__: os.kill(os.getpid(), int(sys.argv[1]))
cli.main(sys.argv[2:])
"""


def run(code: str, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PRELUDE + code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("kilobytes", [100, 400])
def test_a_disk_that_fills_up(untied_source, tmp_path, kilobytes):
    """A limit on the size of files makes writing fail as a full disk does: in the
    head's file, or in the model's."""
    sizes = {f.name: f.stat().st_size for f in untied_source.iterdir()}
    assert sizes["model.safetensors"] > 400 * 1024
    result = run(
        LIMITED,
        kilobytes * 1024,
        *("--hf-path", untied_source, "--mlx-path", tmp_path / "target"),
        *("--head-bits", 16),
    )
    assert result.returncode == 1, result.stderr
    # It says where, and what to do.
    message = assert_one_line(result.stderr)
    assert str(tmp_path) in message and "space" in message
    assert contents(tmp_path) == {}


def test_a_disk_that_fills_up_with_a_gguf_file(tmp_path_factory, tmp_path):
    file = small_gguf(tmp_path_factory.mktemp("source"))
    words = ["--gguf-path", file, "--mlx-path", tmp_path / "target"]
    result = run(LIMITED, 50 * 1024, *words)
    assert result.returncode == 1, result.stderr
    assert_one_line(result.stderr)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted(untied_source, tmp_path, name):
    result = run(
        INTERRUPTED,
        int(getattr(signal, name)),
        *("--hf-path", untied_source, "--mlx-path", tmp_path / "target"),
    )
    assert result.returncode in (1, 130, 143)
    assert "Traceback" not in result.stderr
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_errors_midway_leave_nothing(untied_source, tmp_path, monkeypatch, error):
    def build_head(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "build_head", build_head)
    with pytest.raises(error):
        convert(str(untied_source), tmp_path / "target", verbose=False)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        # As the tokenizers package says it.
        Exception("No space left on device (os error 28)"),
    ],
)
def test_an_error_while_writing_leaves_nothing(
    untied_source, tmp_path, monkeypatch, error
):
    def save(*_, **__):
        raise error

    monkeypatch.setattr(pipeline.utils, "save", save)
    words = ["--hf-path", str(untied_source), "--mlx-path", str(tmp_path / "target")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "No space left" in assert_one_line(result.stderr)
    assert contents(tmp_path) == {}


def test_a_target_that_appears_meanwhile_is_kept(untied_source, tmp_path, monkeypatch):
    build = pipeline.build_head

    def build_head(*args, **kwargs):
        (tmp_path / "target").mkdir()
        (tmp_path / "target/mine").write_text("precious")
        return build(*args, **kwargs)

    monkeypatch.setattr(pipeline, "build_head", build_head)
    with pytest.raises(ValueError, match="target"):
        convert(str(untied_source), tmp_path / "target", verbose=False)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target/mine").read_text() == "precious"


def test_a_leftover_of_another_run_is_no_hindrance(untied_source, tmp_path):
    leftover = tmp_path / ".target.partial-abc"
    shutil.copytree(untied_source, leftover)
    convert(str(untied_source), tmp_path / "target", verbose=False)
    assert (tmp_path / "target/config.json").exists()


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("convert --hf-path someone/none --mlx-path out", "--hf-path"),
        ("generate --model someone/none --prompt a", "--model"),
        ("chat --model someone/none", "--model"),
        ("server --model someone/none --port 0", "--model"),
        ("benchmark --model someone/none", "--model"),
        ("tune --model someone/none", "--model"),
    ],
)
def test_a_model_that_the_hub_does_not_give(command, flag, tmp_path, monkeypatch):
    """Before anything is started: mlx-lm's server would go on without a model."""
    monkeypatch.chdir(tmp_path)
    name, *arguments = command.split()
    module = importlib.import_module(
        f"mlx_flashhead.{'convert.cli' if name == 'convert' else name}"
    )
    result = CliRunner().invoke(module.main, arguments)
    assert result.exit_code == 1
    last = result.output.strip().splitlines()[-1]
    assert f"Error: {flag} someone/none: no such folder, and the Hugging" in last
    assert last.endswith("check the name and the connection, or name a local folder")
    assert not os.listdir(tmp_path)
