"""Every script in examples/ runs, on small made models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_gguf import gguf_tensors, reference_model, write_gguf

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, words)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ran(name: str, *words: object) -> list[str]:
    return run(name, *words, "--max-tokens", 6).strip().splitlines()


@pytest.fixture(scope="module")
def folder(untied_folder):
    return untied_folder


def test_python_api(folder):
    lines = ran("python_api.py", folder)
    assert lines[0] == "90 of 126 clusters are probed per token"
    assert any("126 probes: The lighthouse keeper" in line for line in lines)
    assert lines[-1].endswith("tokens per second")


def test_sampling(folder):
    text = run("sampling.py", folder, "--max-tokens", 6)
    assert text.count("My favourite dish is") == 4
    assert run("sampling.py", folder, "--max-tokens", 6) == text


def test_server_openai(folder):
    text = run("server_openai.py", folder, "--max-tokens", 6)
    assert "The lighthouse keeper" in text and "Once upon a time" in text


def test_speculative(folder):
    accepted, _, proposed, *_ = ran("speculative.py", folder)[-1].split()
    assert 0 <= int(accepted) <= int(proposed) > 0


def test_evaluate_text(folder):
    lines = run("evaluate_text.py", folder, "--tokens", 40).splitlines()
    assert "90 probes" in lines[0] and "126 probes" in lines[1]
    # With every cluster probed nothing is missed.
    assert all("on 40 tokens" in line for line in lines)
    assert "recall 100.00 %" in lines[1] and "KL 0.00" in lines[1]


def test_convert_gguf(tmp_path):
    tensors = gguf_tensors("llama", reference_model("llama"))
    source = write_gguf(tmp_path / "small.gguf", "llama", tensors)
    lines = ran("convert_gguf.py", source, tmp_path / "converted")
    assert lines[0].startswith("Vocabulary ")
    assert any(line.startswith("The capital of France is") for line in lines)
    assert (tmp_path / "converted/flashhead.safetensors").exists()


def test_each_has_a_test_and_real_output():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert {f"test_{name}" for name in names} <= set(globals())
    for path in EXAMPLES.glob("*.py"):
        assert "it prints" in path.read_text().split('"""')[1]
