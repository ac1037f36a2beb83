"""Real models, converted from GGUF by the command line and measured by NumPy.

Nothing of the package measures here: hidden states come from mlx-lm's own model,
the reference is the dense product of the source's rows, and what was probed is what
``candidates`` says. Gemma 3 270M takes minutes to convert, so its folder is kept in
the cache of :mod:`real_models` for as long as the converter stays the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import real_models
from mlx_flashhead.convert import collect
from mlx_flashhead.convert.pipeline import build_head
from mlx_flashhead.convert.recipes import RECIPES
from mlx_lm.utils import load_model

import mlx_flashhead
from mlx_flashhead import convert as converter
from mlx_flashhead import flash_heads, load
from mlx_flashhead.integration.locate import get_module, head_table

GIB = 2**30
PASSAGES = [
    json.loads(line)
    for line in (Path(__file__).parent / "data/passages.jsonl")
    .read_text(encoding="utf-8")
    .split("\n")
    if line
]
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "To make a simple tomato soup, you need",
    "1, 2, 3, 4, 5,",
]


@dataclass
class Converted:
    """A converted folder, and what the command said and needed."""

    folder: Path
    report: dict
    peak: int

    @cached_property
    def flash(self):
        return load(self.folder)

    @cached_property
    def dense(self):
        return load(self.folder, dense=True)

    @property
    def head(self):
        return next(flash_heads(self.flash[0]))

    @cached_property
    def weight(self) -> np.ndarray:
        """The dense head's rows, float32 ``[V, D]``."""
        model, _ = load_model(self.folder, lazy=True)
        rows = head_table(model.model.embed_tokens).dequantize(mx.float32)
        return np.array(rows)

    @cached_property
    def states(self) -> np.ndarray:
        """What the head is given on the passages, float32 ``[n, D]``."""
        model, tokenizer = self.dense
        found = []
        for passage in PASSAGES:
            tokens = tokenizer.encode(passage["text"])
            hidden = model.model(mx.array([tokens]))[0, 1:]
            found.append(np.array(hidden.astype(mx.float32)))
        return np.concatenate(found)

    @cached_property
    def best(self) -> np.ndarray:
        """The dense head's best token after each token of the passages."""
        return np.concatenate(
            [(h @ self.weight.T).argmax(1) for h in np.array_split(self.states, 8)]
        )

    def recall(self, head) -> float:
        hits = []
        for start in range(0, len(self.states), 64):
            some = slice(start, start + 64)
            ids = np.array(head.candidates(mx.array(self.states[some])).ids)
            hits.append((ids == self.best[some][:, None]).any(1))
        return float(np.concatenate(hits).mean())


# In a process of its own, which says what it needed at its peak.
CONVERT = """
import resource, sys
from mlx_flashhead.convert.cli import main
main(sys.argv[2:], standalone_mode=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
open(sys.argv[1], "w").write(str(peak if sys.platform == "darwin" else peak * 1024))
"""


def convert_gguf(gguf: Path, folder: Path) -> Converted:
    """Convert into ``folder/model``, and keep what the command said beside it."""
    peak, target = folder / "peak.txt", folder / "model"
    command = [sys.executable, "-c", CONVERT, str(peak), "--json"]
    command += ["--gguf-path", str(gguf), "--mlx-path", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "report.json").write_text(done.stdout)
    return converted(folder)


def converted(folder: Path) -> Converted:
    report = json.loads((folder / "report.json").read_text())
    return Converted(folder / "model", report, int((folder / "peak.txt").read_text()))


def converter_key() -> str:
    """Changes when the converter, or what it stands on, does."""
    files = list(Path(converter.__file__).parent.rglob("*.py"))
    files += Path(converter.__file__).parent.glob("*.jsonl")
    runtime = Path(mlx_flashhead.__file__).parent
    for room in ("compute", "evaluation", "folder", "head"):
        files += (runtime / room).glob("*.py")
    files.append(runtime / "integration" / "locate.py")
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    for name in ("mlx", "mlx-lm", "numpy", "gguf"):
        digest.update(version(name).encode())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def smollm(tmp_path_factory) -> Converted:
    return convert_gguf(real_models.smollm_gguf(), tmp_path_factory.mktemp("smollm"))


@pytest.fixture(scope="session")
def gemma() -> Converted:
    source = real_models.gemma_gguf()
    folder = source.parent / f"gemma-3-270m-flashhead-{converter_key()}"
    if not folder.exists():
        for old in source.parent.glob("gemma-3-270m-flashhead-*"):
            shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            convert_gguf(source, made)
            if not folder.exists():  # another run may have been faster
                made.rename(folder)
    return converted(folder)


def greedy(model, tokenizer, prompt: str, n: int) -> list[int]:
    responses = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=n)
    return [response.token for response in responses]


def same_choices(case: Converted, n: int) -> float:
    """Share of greedy continuations' tokens up to the first that differs."""
    same = total = 0
    for prompt in PROMPTS:
        dense, flash = (greedy(*m, prompt, n) for m in (case.dense, case.flash))
        equal = [a == b for a, b in zip(dense, flash)]
        same += equal.index(False) if False in equal else len(dense)
        total += len(dense)
    return same / total


def check_folder(case: Converted, vocab_size: int, hidden_size: int) -> None:
    config = json.loads((case.folder / "config.json").read_text())["flashhead"]
    assert config["vocab_size"] == case.report["vocab_size"] == vocab_size
    assert config["hidden_size"] == hidden_size
    ids = np.array(case.head.token_ids).reshape(-1)
    assert sorted(ids[:vocab_size].tolist()) == list(range(vocab_size))
    assert (ids[vocab_size:] == vocab_size).all()
    for name in ("spread", "excess"):
        assert np.isfinite(np.array(case.head[name])).all()
    # The rows are the model's, to the precision of 8 bits.
    some = np.linspace(0, vocab_size - 1, 300).astype(int)
    rows = np.array(case.head.embed(mx.array(some)).astype(mx.float32))
    wanted = case.weight[some]
    assert np.abs(rows - wanted).max() < 0.01 * np.abs(wanted).max()


def test_smollm_folder(smollm):
    check_folder(smollm, 49_152, 576)
    assert smollm.peak < 6 * GIB


def test_smollm_recall(smollm):
    head = smollm.head
    assert len(smollm.states) > 1500
    assert head.rows_read() <= 0.15 * head.vocab_size
    assert smollm.recall(head) >= 0.96
    assert smollm.report["recall"] >= 0.96


def test_smollm_beats_the_paper_on_the_same_states(smollm):
    head = smollm.head
    model, tokenizer = smollm.dense
    documents = collect.read_documents(None)[::4]
    states = collect.collect(
        model,
        tokenizer,
        "model.embed_tokens",
        documents,
        n_tokens=1024,
        n_answered=0,
    )
    module = get_module(model, "model.embed_tokens")
    paper = build_head(
        head_table(module),
        smollm.weight,
        None,
        states,
        RECIPES["paper"],
        n_probes=head.n_probes,
    )
    assert paper.n_probes == head.n_probes
    assert smollm.recall(head) > smollm.recall(paper) + 0.01


def test_smollm_greedy_text_is_mostly_that_of_the_dense_head(smollm):
    assert same_choices(smollm, 16) > 0.6


def test_smollm_reads_a_chat(smollm):
    model, tokenizer = smollm.flash
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
    )
    assert "Paris" in mlx_lm.generate(model, tokenizer, prompt, max_tokens=24)


def test_gemma_folder(gemma):
    check_folder(gemma, 262_144, 640)
    assert gemma.peak < 6 * GIB


def test_gemma_recall(gemma):
    head = gemma.head
    assert head.n_probes == head.n_clusters // 16
    assert head.rows_read() <= 0.126 * head.vocab_size
    assert gemma.recall(head) >= 0.99
    assert gemma.report["recall"] >= 0.99


def test_gemma_greedy_text_is_mostly_that_of_the_dense_head(gemma):
    assert same_choices(gemma, 10) > 0.6
