"""Real models, converted from GGUF by the command line and measured by NumPy.

Nothing of the package measures here: hidden states come from mlx-lm's own model,
the reference is the dense product of the source's rows, and what was probed is what
``candidates`` says.
"""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_flashhead.convert import collect
from mlx_flashhead.convert.pipeline import build_head
from mlx_flashhead.convert.recipes import RECIPES
from real_models import Converted

from mlx_flashhead.integration.locate import get_module, head_table

GIB = 2**30
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "To make a simple tomato soup, you need",
    "1, 2, 3, 4, 5,",
]


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
