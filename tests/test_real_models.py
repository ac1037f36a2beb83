"""Real models, converted from GGUF by the command line and measured by NumPy.

Nothing of the package measures here: hidden states come from mlx-lm's own model,
the reference is the dense product of the source's rows, and what was probed is what
``candidates`` says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_flashhead.convert import collect, convert
from mlx_flashhead.convert.gguf import read_gguf
from mlx_flashhead.convert.pipeline import build_head
from mlx_flashhead.convert.recipes import FULL, RECIPES
from mlx_flashhead.convert.source import open_gguf
from mlx_flashhead.convert.upgrade import upgrade
from mlx_lm.utils import load_model
from real_models import Converted, gemma_gguf, smollm_gguf
from test_gguf import REFERENCE, gguf_name

from mlx_flashhead import flash_heads, load, patch_decoding, verification
from mlx_flashhead.integration.loading import install
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
    # The file has them in Q8_0.
    rows = case.head.embed(mx.arange(vocab_size), mx.float32)
    assert np.array_equal(np.array(rows), case.weight)


def same_best_tokens(case: Converted) -> bool:
    """Whether the dense head's best tokens are those of the file's own rows."""
    head = next(flash_heads(case.dense[0]))
    found = [
        np.array(mx.argmax(head.dense(mx.array(h)), axis=-1))
        for h in np.array_split(case.states, 8)
    ]
    return np.array_equal(np.concatenate(found), case.best)


def test_smollm_folder(smollm):
    check_folder(smollm, 49_152, 576)
    assert smollm.peak < 6 * GIB


def test_smollm_dense_head_is_the_files(smollm):
    assert same_best_tokens(smollm)


def test_smollm_recall(smollm):
    head = smollm.head
    assert len(smollm.states) > 1500
    assert head.rows_read() <= 0.15 * head.vocab_size
    assert smollm.recall(head) >= 0.96
    assert smollm.report["recall"] >= 0.96


def test_smollm_beats_the_paper_on_the_same_states(smollm):
    head = smollm.head
    model, _ = load_model(smollm.folder, lazy=True)
    model.set_dtype(mx.float32)
    tokenizer = smollm.dense[1]
    documents = collect.read_documents(None)[::4]
    states = collect.collect(
        model,
        tokenizer,
        "model.embed_tokens",
        documents,
        replace(FULL, n_tokens=1024, n_answers=0),
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


def test_gemma_dense_head_is_the_files(gemma):
    assert same_best_tokens(gemma)


def test_gemma_recall(gemma):
    head = gemma.head
    assert head.n_probes == head.n_clusters // 16
    assert head.rows_read() <= 0.126 * head.vocab_size
    assert gemma.recall(head) >= 0.99
    assert gemma.report["recall"] >= 0.99


def test_gemma_greedy_text_is_mostly_that_of_the_dense_head(gemma):
    assert same_choices(gemma, 10) > 0.6


REAL = {"gemma3-270m": "gemma", "smollm2-135m": "smollm"}


@pytest.fixture
def real(request, name) -> Converted:
    return request.getfixturevalue(REAL[name])


# ---------------------------------------------------------------------------
# Sidecars
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", [("gemma3-270m", 10e6), ("smollm2-135m", 2e6)])
def test_a_real_sidecar(real, name, size, tmp_path):
    """A small file, with which the plain model in the folder decodes its own tokens:
    the file's rows, rounded to bfloat16, not the FlashHead's Q8_0."""
    file = tmp_path / "head.safetensors"
    upgrade(real.folder, file)
    assert file.stat().st_size < size
    tokenizer = real.dense[1]
    patch_decoding()
    dense, exact = (load_model(real.folder, lazy=True)[0] for _ in range(2))
    dense.set_dtype(mx.float32)
    install(exact, file, "exact", model_folder=real.folder)
    with verification() as counted:
        for prompt in PROMPTS[:2]:
            wanted = greedy(dense, tokenizer, prompt, 12)
            assert greedy(exact, tokenizer, prompt, 12) == wanted
    assert counted.acceptance > 0.6


@pytest.mark.full
def test_a_sidecar_of_a_quantized_real_model(tmp_path):
    """As mlx-community has them: converted, in a file, and decoded with."""
    source = open_gguf(str(smollm_gguf()), tmp_path, None).folder
    quantized = tmp_path / "8bit"
    mlx_lm.convert(str(source), str(quantized), quantize=True, q_bits=8)
    file = tmp_path / "head.safetensors"
    report = convert(str(quantized), sidecar=file, verbose=False)
    assert file.stat().st_size < 2e6 and report.dense_bits == report.head_bits == 8
    assert report.recall > 0.95
    model, tokenizer = load(quantized, flashhead=file)
    dense, _ = load(quantized, flashhead=file, dense=True)
    for prompt in PROMPTS:
        wanted = greedy(dense, tokenizer, prompt, 24)
        assert greedy(model, tokenizer, prompt, 24) == wanted


# ---------------------------------------------------------------------------
# What was in the GGUF files, against llama.cpp and the gguf package
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_real_encodings_equal_llama_cpp(real, name):
    assert len(REFERENCE["encodings"]) > 150
    for entry in REFERENCE["encodings"]:
        assert real.dense[1].encode(entry["text"]) == entry[name], entry["text"]


def test_published_gemma_encoding(gemma):
    tokens = gemma.dense[1].encode("Hello, world!")
    assert tokens == [2, 9259, 236764, 1902, 236888]


@pytest.mark.parametrize("name", REAL)
def test_real_text_survives_encoding_and_streaming(real, name):
    tokenizer = real.dense[1]
    kind = "SPM" if name.startswith("gemma") else "BPE"
    assert type(tokenizer.detokenizer).__name__ == f"{kind}StreamingDetokenizer"
    for entry in REFERENCE["encodings"]:
        text = entry["text"]
        if "\u2581" in text or "\0" in text:  # spaces to SentencePiece; mlx-lm's NUL
            continue
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokens) == text
        stream = tokenizer.detokenizer
        for token in tokens:
            stream.add_token(token)
        stream.finalize()
        # mlx-lm's byte-level stream drops a space at the very start.
        assert stream.text in (text, text[1:] if text[:1] == " " else text)


@pytest.mark.parametrize("name", REAL)
def test_real_answers_equal_llama_cpp(real, name):
    model, _ = load_model(real.folder, lazy=True)
    model.update(tree_map(lambda a: a.astype(mx.float32), model.parameters()))
    for entry in REFERENCE["answers"][name][:2]:
        prompt, answer = entry["prompt"], entry["answer"][:5]
        hidden = model.model(mx.array([prompt + answer[:-1]]))[0, len(prompt) - 1 :]
        row = np.array(model.model.embed_tokens.as_linear(hidden))
        assert row.argmax(-1).tolist() == answer
        # The weights were rounded to bfloat16, the reference's were not.
        assert abs(row[0].max() - entry["top_logit"]) < 0.35


def test_real_weights_equal_the_gguf_package(smollm):
    weights = mx.load(str(smollm.folder / "model.safetensors"))
    reader = {t.name: t for t in gguf.GGUFReader(smollm_gguf()).tensors}
    assert len(weights) == len(reader)
    for part in ("self_attn.v_proj", "mlp.down_proj", "self_attn.o_proj"):
        for layer in (0, 11):
            target = f"model.layers.{layer}.{part}.weight"
            tensor = reader[gguf_name("llama", target)]
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            expected = mx.array(values).astype(mx.bfloat16)
            assert mx.array_equal(weights[target], expected)
    assert {str(w.dtype) for w in weights.values()} == {"mlx.core.bfloat16"}


def test_gemma_norms_are_the_published_bfloat16_ones():
    model = read_gguf(gemma_gguf())
    norms = [weight for weight in model._weights.plan if "norm" in weight.name]
    assert len(norms) == 18 * 6 + 1
    for weight in norms:
        value = model._weights.read(weight, mx.float32)
        rounded = value.astype(mx.bfloat16).astype(mx.float32)
        # 1 + weight was stored in float32, which costs the last bits only.
        assert mx.abs(rounded - value).max().item() < 4e-6, weight.name


def test_gemma_files(gemma):
    config = json.loads((gemma.folder / "config.json").read_text())
    wanted = {
        "model_type": "gemma3_text",
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rms_norm_eps": 1e-6,
        "vocab_size": 262144,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    assert {key: config[key] for key in wanted} == wanted
    tokenizer = gemma.dense[1]
    assert tokenizer.eos_token_ids == {1, 106}
    assert not tokenizer.has_chat_template


# A process of its own shows what writing itself needs.
WRITE = """
import pathlib, resource, sys
from mlx_flashhead.convert.gguf import read_gguf
read_gguf(sys.argv[1]).write(sys.argv[2])
status = pathlib.Path("/proc/self/status")
if status.exists():  # getrusage counts what the parent held as well
    print(1024 * int(status.read_text().split("VmHWM:")[1].split()[0]))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.full
def test_a_file_is_written_in_little_memory(tmp_path):
    command = [sys.executable, "-c", WRITE, str(gemma_gguf()), str(tmp_path / "made")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 1.5 * 2**30


def test_smollm_files(smollm):
    folder = smollm.folder
    text = smollm.dense[1].apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == [2, 0]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
