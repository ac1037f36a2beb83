"""GGUF files as model folders: real files, made files, and broken ones.

References that the converter had no part in: llama.cpp's encodings and greedy
answers (``data/encodings.json``), the sentencepiece package, the reader of the
``gguf`` package, and mlx-lm models that get their weights directly.
"""

from __future__ import annotations

import importlib
import io
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import sentencepiece
from gguf import GGMLQuantizationType as Quant
from mlx.utils import tree_flatten
from mlx_flashhead.convert import gguf as convert_gguf
from mlx_flashhead.convert.gguf import GGUFError, read_gguf, rope
from mlx_flashhead.convert.gguf.quantization import floats
from mlx_flashhead.convert.gguf.reader import read_file
from mlx_flashhead.convert.gguf.tokenizer import build_tokenizer
from mlx_lm.gguf import permute_weights
from mlx_lm.utils import load_tokenizer
from real_models import smollm_gguf
from transformers import AutoTokenizer

REFERENCE = json.loads(
    (Path(__file__).parent / "data/encodings.json").read_text(encoding="utf-8")
)

# ---------------------------------------------------------------------------
# Made files
# ---------------------------------------------------------------------------

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 4

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
MODEL_TYPES = {a: a for a in ("llama", "qwen2", "qwen3")} | {"gemma3": "gemma3_text"}


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    table = {b: chr(b) for b in plain}
    table |= {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def byte_level_vocabulary() -> dict[str, object]:
    merges = ["h e", "l l", "he ll", "hell o", "\u0120 w", "\u0120w o"]
    tokens = byte_alphabet() + [m.replace(" ", "") for m in merges]
    specials = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_end|>", "<tool>"]
    kinds = [1] * len(tokens) + [3, 3, 3, 3, 4]
    first = len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + specials,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": first,
        "tokenizer.ggml.eos_token_id": first + 1,
        "tokenizer.ggml.padding_token_id": first + 2,
    }


VOCABULARY = byte_level_vocabulary()
VOCAB = len(VOCABULARY["tokenizer.ggml.tokens"])


def base_metadata(arch: str) -> dict[str, object]:
    meta: dict[str, object] = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "rope.freq_base": 10000.0,
    }
    if arch == "gemma3":
        meta |= {"attention.sliding_window": 5, "attention.sliding_window_pattern": 2}
    return {f"{arch}.{key}": value for key, value in meta.items()}


def reference_model(arch: str, tied: bool = True, **config):
    """An mlx-lm model of random weights, made without the converter."""
    module = importlib.import_module(f"mlx_lm.models.{MODEL_TYPES[arch]}")
    arguments = {
        "model_type": MODEL_TYPES[arch],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
    }
    if arch == "gemma3":
        arguments |= {"sliding_window": 5, "sliding_window_pattern": 2}
        arguments |= {"query_pre_attn_scalar": HEAD_DIM}
    model = module.Model(module.ModelArgs.from_dict(arguments | config))
    if arch == "gemma3" and tied:
        model.sanitize({})
    rng = np.random.default_rng(7)
    # Norms as they are published: near 1, or near 0 where the model adds the 1.
    center = 0.0 if arch == "gemma3" else 1.0
    weights = []
    for name, value in tree_flatten(model.parameters()):
        made = rng.standard_normal(value.shape).astype(np.float32) * 0.2
        weights.append((name, mx.array(made + center * ("norm" in name))))
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def gguf_name(arch: str, name: str) -> str:
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, middle = name.split(".", 3)
    part, kind = middle.rsplit(".", 1)
    table = GEMMA_NAMES if arch == "gemma3" else NAMES
    return f"blk.{layer}.{table[part]}.{kind}"


def gguf_tensors(arch: str, model) -> dict[str, np.ndarray]:
    """The model's weights as llama.cpp's converter arranges them."""
    out = {}
    for name, value in tree_flatten(model.parameters()):
        if arch == "llama" and ".q_proj" in name:
            value = permute_weights(value, HEADS, HEADS)
        if arch == "llama" and ".k_proj" in name:
            value = permute_weights(value, HEADS, KV_HEADS)
        array = np.array(value)
        out[gguf_name(arch, name)] = array + (arch == "gemma3" and "norm" in name)
    return out


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write_gguf(
    path: Path,
    arch: str,
    tensors: dict[str, np.ndarray],
    quant: Quant = Quant.F32,
    **changes,
) -> Path:
    """A GGUF file; ``changes`` sets metadata and tensors, None drops one.

    In the names of ``changes`` ``:`` stands for the architecture's prefix.
    """
    values = base_metadata(arch) | VOCABULARY
    tensors = dict(tensors)
    for key, value in changes.items():
        key = key.replace(":", f"{arch}.")
        is_tensor = key.endswith((".weight", ".bias")) or key.startswith("blk.")
        target = tensors if is_tensor else values
        if value is None:
            target.pop(key, None)
        else:
            target[key] = value
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", arch))
    for key, value in values.items():
        add_value(writer, key, value)
    for name, array in tensors.items():
        kind = quant if array.ndim > 1 else Quant.F32
        if array.dtype == np.uint8 or kind == Quant.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(path: Path, folder: Path, dtype: str = "float32"):
    read_gguf(path).write(folder, dtype)
    return mlx_lm.load(str(folder))


def logits(model) -> np.ndarray:
    tokens = mx.array([[1, 70, 5, 200, 33, 33, 90, 17, 4, 8]])
    return np.array(model(tokens).astype(mx.float32))


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("made") / "llama.gguf"
    return write_gguf(path, "llama", gguf_tensors("llama", reference_model("llama")))


# ---------------------------------------------------------------------------
# Architectures and quantizations
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, tied",
    [("llama", False), ("gemma3", True), ("qwen2", True), ("qwen3", False)],
)
def test_architecture_computes_what_it_was_given(tmp_path, arch, tied):
    expected = reference_model(arch, tied)
    path = write_gguf(tmp_path / "m.gguf", arch, gguf_tensors(arch, expected))
    model, _ = convert(path, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    names = dict(tree_flatten(expected.parameters()))
    found = dict(tree_flatten(model.parameters()))
    assert names.keys() == found.keys()
    for name, value in names.items():
        assert mx.allclose(found[name], value, atol=1e-6), name
    np.testing.assert_allclose(logits(model), logits(expected), atol=2e-4)


@pytest.mark.parametrize(
    "quant",
    ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"],
)
def test_quantization(tmp_path, quant):
    kind = Quant[quant]
    tensors = gguf_tensors("llama", reference_model("llama"))
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors, kind)
    found = dict(read_gguf(path).tensors("float32"))
    for target in ("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"):
        source = tensors[gguf_name("llama", f"{target}.weight")]
        expected = gguf.dequantize(gguf.quantize(source, kind), kind)
        if "q_proj" in target:
            rows = expected.reshape(HEADS, HEAD_DIM // 2, 2, HIDDEN)
            expected = rows.swapaxes(1, 2).reshape(-1, HIDDEN)
        np.testing.assert_array_equal(np.array(found[f"{target}.weight"]), expected)


@pytest.mark.parametrize("quant", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_block_quantization_of_256(tmp_path, quant):
    """Types the gguf package only reads: random blocks with finite scales."""
    kind = Quant[quant]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(3)
    raw = np.zeros((INNER, size), np.uint8)
    # Bytes below 0x3C are finite halves wherever the scales lie.
    raw[:] = rng.integers(0, 0x3C, raw.shape)
    expected = gguf.dequantize(raw, kind)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_file(path)
    tensor = file.tensors["x"]
    assert tensor.shape == (INNER, block)
    found = np.frombuffer(file.data, np.uint8, raw.size, tensor.offset)
    values = floats(found.reshape(raw.shape), kind)
    np.testing.assert_array_equal(values, expected)


def test_rows_are_read_in_chunks(tmp_path, monkeypatch, llama_file):
    whole = dict(read_gguf(llama_file).tensors("float32"))
    monkeypatch.setattr(convert_gguf.tensors, "_CHUNK", 3 * HIDDEN)
    for name, value in read_gguf(llama_file).tensors("float32"):
        assert mx.array_equal(value, whole[name]), name


def test_llama_biases_are_completed_with_zeros(tmp_path):
    expected = reference_model("llama", attention_bias=True, mlp_bias=True)
    tensors = gguf_tensors("llama", expected)
    for layer in range(LAYERS):
        del tensors[f"blk.{layer}.attn_output.bias"]
        attention = expected.model.layers[layer].self_attn
        attention.o_proj.bias = mx.zeros_like(attention.o_proj.bias)
    model, _ = convert(
        write_gguf(tmp_path / "m.gguf", "llama", tensors), tmp_path / "out"
    )
    np.testing.assert_allclose(logits(model), logits(expected), atol=2e-4)


def test_scale_tensors_are_applied(tmp_path, llama_file):
    tensors = gguf_tensors("llama", reference_model("llama"))
    scale = np.array([0.5], np.float32)
    changes = {"blk.1.ffn_up.scale": scale, "blk.1.ffn_up.input_scale": scale}
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors, **changes)
    name = "model.layers.1.mlp.up_proj.weight"
    plain = dict(read_gguf(llama_file).tensors("float32"))[name]
    assert mx.array_equal(dict(read_gguf(path).tensors("float32"))[name], plain / 2)


def test_gemma3_window_pattern_and_scalar(tmp_path):
    tensors = gguf_tensors("gemma3", reference_model("gemma3"))

    def config(**changes):
        return read_gguf(
            write_gguf(tmp_path / "m.gguf", "gemma3", tensors, **changes)
        ).config

    key = ":attention.sliding_window_pattern"
    assert config(**{key: [True, True, False, True]})["sliding_window_pattern"] == 3
    assert config(**{key: 4})["sliding_window_pattern"] == 4
    assert config(**{":attention.sliding_window": None})["sliding_window_pattern"] == 1
    found = config(**{":rope.freq_base_swa": 5000.0})
    assert found["rope_local_base_freq"] == 5000.0
    assert found["layer_types"] == ["sliding_attention", "full_attention"] * 2
    for bad in ([True, True, True, True], [False, True, False, True], [True, False]):
        with pytest.raises(GGUFError):
            config(**{key: bad})
    with pytest.raises(GGUFError, match="attends to everything"):
        config(**{key: None})


# ---------------------------------------------------------------------------
# Rotary scaling
# ---------------------------------------------------------------------------


def llama3_factors(theta, factor, low, high, original, size=HEAD_DIM // 2):
    """As llama.cpp's converter writes them, by wavelength."""
    out = []
    for i in range(size):
        wavelength = 2 * np.pi * theta ** (i / size)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize(
    "changes, scaling",
    [
        ({":rope.scaling.type": "none", ":rope.scaling.factor": 4.0}, None),
        ({":rope.scaling.type": "linear"}, None),
        ({":rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({":rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                ":rope.scaling.type": "yarn",
                ":rope.scaling.factor": 4.0,
                ":rope.scaling.original_context_length": 32,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
    ],
)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_rope_scaling(tmp_path, arch, changes, scaling):
    expected = reference_model(arch, rope_scaling=scaling)
    tensors = gguf_tensors(arch, expected)
    path = write_gguf(tmp_path / "m.gguf", arch, tensors, **changes)
    assert read_gguf(path).config.get("rope_scaling") == scaling
    model, _ = convert(path, tmp_path / "out")
    np.testing.assert_allclose(logits(model), logits(expected), atol=2e-4)


@pytest.mark.parametrize(
    "theta, factor, low, high, original, size",
    [
        (500000.0, 8.0, 1.0, 4.0, 8192, 64),
        (500000.0, 32.0, 1.0, 4.0, 8192, 64),
        (500000.0, 32.0, 1.0, 4.0, 8192, 32),
        (500000.0, 16.0, 1.0, 2.0, 8192, 64),
        (10000.0, 4.0, 2.0, 9.0, 2048, 64),
    ],
)
def test_llama3_scaling_is_recovered(theta, factor, low, high, original, size):
    factors = llama3_factors(theta, factor, low, high, original, size)
    found = rope._llama3_scaling(
        Path("x.gguf"), factors, {"rope_theta": theta}, original
    )
    assert found == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def test_llama3_scaling_computes_the_same(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    factors = llama3_factors(10000.0, 8.0, 1.0, 4.0, 64)
    expected = reference_model("llama", rope_scaling=scaling)
    tensors = gguf_tensors("llama", expected) | {"rope_freqs.weight": factors}
    key = ":rope.scaling.original_context_length"
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors, **{key: 64})
    assert read_gguf(path).config["rope_scaling"] == scaling
    model, _ = convert(path, tmp_path / "out")
    np.testing.assert_allclose(logits(model), logits(expected), atol=2e-4)


def test_factors_of_one_are_no_scaling(tmp_path):
    tensors = gguf_tensors("llama", reference_model("llama"))
    tensors["rope_freqs.weight"] = np.ones(HEAD_DIM // 2, np.float32)
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors)
    assert "rope_scaling" not in read_gguf(path).config


# ---------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------


def tokenizer_of(path: Path, folder: Path):
    read_gguf(path).write(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def smollm_vocabulary() -> dict[str, object]:
    fields = gguf.GGUFReader(smollm_gguf()).fields
    return {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}


@pytest.mark.parametrize("pre", [n for n in REFERENCE["splits"] if n != "texts"])
def test_word_splits_equal_llama_cpp(tmp_path, smollm_vocabulary, pre):
    tokens = smollm_vocabulary["tokenizer.ggml.tokens"]
    tensors = gguf_tensors("llama", reference_model("llama"))
    tensors["token_embd.weight"] = np.zeros((len(tokens), HIDDEN), np.float16)
    changes = smollm_vocabulary | {"tokenizer.ggml.pre": pre}
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors, Quant.F16, **changes)
    tokenizer = tokenizer_of(path, tmp_path / "out")
    splits = REFERENCE["splits"]
    for text, expected in zip(splits["texts"], splits[pre], strict=True):
        assert tokenizer.encode(text) == expected, text


def test_qwen2_composes_characters(tmp_path):
    tensors = gguf_tensors("qwen2", reference_model("qwen2"))
    changes = {"tokenizer.ggml.pre": "qwen2"}
    path = write_gguf(tmp_path / "m.gguf", "qwen2", tensors, **changes)
    tokenizer = tokenizer_of(path, tmp_path / "out")
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def sentencepiece_model(add_prefix: bool):
    files = sorted(Path(convert_gguf.__file__).parent.glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    lines = [line for line in text.splitlines() if line.strip()]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        add_dummy_prefix=add_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>", "\t\t"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())


def sentencepiece_metadata(sp, add_prefix: bool) -> dict[str, object]:
    count = range(sp.get_piece_size())
    kinds = []
    for i in count:
        kind = 1
        kind = 2 if sp.is_unknown(i) else kind
        kind = 3 if sp.is_control(i) else kind
        kind = 6 if sp.is_byte(i) else kind
        kind = 4 if sp.id_to_piece(i) in ("<tool>", "\t\t") else kind
        kinds.append(kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in count],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in count],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": add_prefix,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.ggml.eos_token_id": None,
        "tokenizer.ggml.padding_token_id": None,
    }


@pytest.mark.parametrize("add_prefix", [True, False])
def test_sentencepiece_encodings_equal_the_package(tmp_path, add_prefix):
    sp = sentencepiece_model(add_prefix)
    tensors = gguf_tensors("llama", reference_model("llama"))
    size = sp.get_piece_size()
    tensors["token_embd.weight"] = np.zeros((size, HIDDEN), np.float32)
    changes = sentencepiece_metadata(sp, add_prefix)
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors, **changes)
    tokenizer = tokenizer_of(path, tmp_path / "out")
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    texts = [entry["text"] for entry in REFERENCE["encodings"]] + source
    # The package keeps no special tokens in text, and meets a symbol of the user
    # without starting a new word after it, as llama.cpp and Hugging Face do.
    marks = ("<s>", "</s>", "<unk>", *(["<tool>", "\t\t"] if add_prefix else []))
    texts = [t for t in texts if t and "\0" not in t and not any(m in t for m in marks)]
    assert len(texts) > 500
    for text in texts:
        expected = [sp.bos_id(), *sp.encode(text)]
        assert tokenizer.encode(text) == expected, text
    assert tokenizer.unk_token_id == 0
    wrapped = load_tokenizer(tmp_path / "out")
    stream = wrapped.detokenizer
    assert type(stream).__name__ == "SPMStreamingDetokenizer"
    for token in wrapped.encode("for x in range(3): é 漢", add_special_tokens=False):
        stream.add_token(token)
    stream.finalize()
    assert stream.text == "for x in range(3): é 漢"


def test_special_tokens_and_template(tmp_path, llama_file):
    tensors = gguf_tensors("llama", reference_model("llama"))
    tokens = VOCABULARY["tokenizer.ggml.tokens"]
    eot = tokens.index("<tool>")
    changes = {
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.eot_token_id": eot,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}\n✓",
    }
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors, **changes)
    _, tokenizer = convert(path, tmp_path / "out")
    bos, eos = tokens.index("<|bos|>"), tokens.index("<|eos|>")
    hello = tokens.index("hello")
    assert tokenizer.encode("hello") == [bos, hello, eos]
    assert tokenizer.encode("hello", add_special_tokens=False) == [hello]
    assert tokenizer.eos_token_ids == {eos, eot, tokens.index("<|im_end|>")}
    assert tokenizer.bos_token == "<|bos|>" and tokenizer.pad_token == "<|pad|>"
    assert tokenizer.decode([hello, eos], skip_special_tokens=True) == "hello"
    assert tokenizer.decode([hello, eot], skip_special_tokens=True) == "hello<tool>"
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hi\n✓"
    # A folder written again without a template does not keep the old one.
    read_gguf(llama_file).write(tmp_path / "out")
    assert not load_tokenizer(tmp_path / "out").has_chat_template


def test_padded_embedding_and_tokens_without_text(tmp_path):
    tensors = gguf_tensors("llama", reference_model("llama"))
    extra = np.zeros((3, HIDDEN), np.float32)
    tensors["token_embd.weight"] = np.vstack([tensors["token_embd.weight"], extra])
    tokens = [*VOCABULARY["tokenizer.ggml.tokens"], "", ""]
    kinds = [*VOCABULARY["tokenizer.ggml.token_type"], 5, 5]
    changes = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
    }
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors, **changes)
    tokenizer = tokenizer_of(path, tmp_path / "out")
    assert len(tokenizer) == VOCAB + 2
    assert read_gguf(path).config["vocab_size"] == VOCAB + 3


# ---------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", mx.float16])
def test_dtypes_and_progress(tmp_path, llama_file, dtype):
    seen = []
    model = read_gguf(llama_file)
    model.write(tmp_path, dtype, progress=lambda *step: seen.append(step))
    weights = mx.load(str(tmp_path / "model.safetensors"))
    name = dtype if isinstance(dtype, str) else "float16"
    assert {w.dtype for w in weights.values()} == {getattr(mx, name)}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == name
    assert [s[:2] for s in seen] == [(i + 1, len(weights)) for i in range(len(weights))]
    assert {s[2] for s in seen} == set(weights)
    whole = dict(model.tensors("float32"))
    for name, value in weights.items():
        assert mx.array_equal(value, whole[name].astype(value.dtype))


def test_large_models_are_sharded(tmp_path, llama_file, monkeypatch):
    monkeypatch.setattr(convert_gguf.write, "_SHARD_BYTES", 100_000)
    model, _ = convert(llama_file, tmp_path)
    files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    expected = reference_model("llama")
    np.testing.assert_allclose(logits(model), logits(expected), atol=2e-4)


HIDDEN_PACKAGES = """
import sys
sys.modules["gguf"] = None  # as if it were not there
sys.argv[0] = "mlx_flashhead.convert"
from mlx_flashhead.convert.cli import main
main()
"""


def test_other_models_do_without_the_package(llama_file, tmp_path):
    """Only where a GGUF file is given is it looked for."""

    def ran(*words) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", HIDDEN_PACKAGES, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert ran("--help").returncode == 0
    done = ran("--gguf-path", llama_file)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last == (
        f"Error: --gguf-path {llama_file} needs the package gguf: "
        "pip install 'mlx-flashhead[gguf]'"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_converter_imports_the_package_only_to_read_a_file():
    code = "import sys, mlx_flashhead.convert.cli; print('gguf' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def fails(path: Path, match: str, action=read_gguf) -> None:
    with pytest.raises(GGUFError, match=match) as caught:
        action(path)
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    assert str(path) in message


def test_write_refuses(tmp_path, llama_file):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(GGUFError, match="choose another folder"):
        read_gguf(llama_file).write(tmp_path)
    fails(llama_file, "float32", lambda p: read_gguf(p).write(tmp_path, "int8"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    fails(llama_file, "cannot be written", lambda p: read_gguf(p).write(blocked))


@pytest.mark.parametrize(
    "value, match, dtype",
    [
        (np.nan, "not finite", "float32"),
        (np.inf, "not finite", "bfloat16"),
        (-np.inf, "not finite", "float16"),
        (1e6, "too large", "float16"),
    ],
)
def test_values_that_do_not_work(tmp_path, value, match, dtype):
    tensors = gguf_tensors("llama", reference_model("llama"))
    tensors["blk.2.ffn_up.weight"][5, 7] = value
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors)
    fails(
        path,
        f"blk.2.ffn_up.weight.*{match}",
        lambda p: list(read_gguf(p).tensors(dtype)),
    )
    fails(path, match, lambda p: read_gguf(p).write(tmp_path / "out", dtype))
    assert not list((tmp_path / "out").glob("*.safetensors"))


# ---------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------

SIZE = np.zeros((2, 2), np.float32)
TYPES = "tokenizer.ggml.token_type"


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"general.architecture": "mamba"}, "architecture is 'mamba'"),
        ({":block_count": None}, "lacks llama.block_count"),
        ({":block_count": 0}, "block_count"),
        ({":block_count": 2**31 - 1}, "lacks most"),
        ({":block_count": LAYERS + 1}, "lacks tensor 'blk.4"),
        ({":block_count": LAYERS - 1}, "no place"),
        ({":block_count": "four"}, "block_count is 'four'"),
        ({":embedding_length": 32}, "has shape"),
        ({":feed_forward_length": [96, 96, 64, 96]}, "differs between layers"),
        ({":attention.head_count": 3}, "head_count_kv"),
        ({":attention.head_count_kv": 4}, "attn_k.weight' has shape"),
        ({":attention.value_length": 8}, "head size"),
        ({":rope.dimension_count": 8}, "head size"),
        ({":attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
        ({":rope.freq_base": 0.0}, "freq_base"),
        ({":rope.freq_base": -1.0}, "freq_base"),
        ({":expert_count": 8}, "expert_count"),
        ({":attention.scale": 0.5}, "attention.scale"),
        ({":final_logit_softcapping": 30.0}, "softcapping"),
        ({":vocab_size": VOCAB + 1}, "token_embd.weight' has shape"),
        ({":rope.scaling.type": "longrope", ":rope.scaling.factor": 4.0}, "longrope"),
        ({":rope.scaling.factor": float("inf")}, "factor is inf"),
        (
            {
                ":rope.scaling.type": "yarn",
                ":rope.scaling.factor": 4.0,
                ":rope.scaling.yarn_ext_factor": 0.5,
            },
            "yarn_ext_factor",
        ),
        ({"rope_freqs.weight": np.array([1, 3, 1, 9, 1, 1, 1, 1], "f4")}, "Llama 3"),
        ({"rope_freqs.weight": np.ones(3, np.float32)}, "does not fit"),
        ({"rope_freqs.weight": np.full(8, np.nan, np.float32)}, "does not fit"),
        (
            {
                ":rope.scaling.factor": 8.0,
                "rope_freqs.weight": llama3_factors(1e4, 8.0, 1.0, 4.0, 64),
                ":rope.scaling.original_context_length": 64,
            },
            "two ways",
        ),
        ({"token_embd.weight": None}, "token_embd"),
        ({"output_norm.weight": None}, "output_norm"),
        ({"blk.1.ffn_up.weight": None}, "blk.1.ffn_up.weight"),
        ({"blk.1.ffn_up.weight": SIZE}, "has shape"),
        ({"blk.1.ffn_gate_exps.weight": SIZE}, "no place"),
        ({"blk.1.ffn_up.weight": np.zeros((96, 64), np.int32)}, "I32"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.model": "t5"}, "'t5'"),
        ({"tokenizer.ggml.model": "llama"}, "scores"),
        ({"tokenizer.ggml.pre": "kimi-k2"}, "'kimi-k2'.*smollm"),
        ({"tokenizer.ggml.merges": None}, "merges"),
        ({"tokenizer.ggml.tokens": None}, "tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "twice"),
        ({"tokenizer.ggml.tokens": ["a"] + [str(i) for i in range(VOCAB)]}, "type"),
        (
            {
                "tokenizer.ggml.tokens": [str(i) for i in range(VOCAB + 1)],
                TYPES: [1] * (VOCAB + 1),
            },
            "more tokens",
        ),
        ({TYPES: [1, 2]}, "token_type"),
        ({"tokenizer.ggml.eos_token_id": VOCAB}, "eos_token_id"),
        ({"tokenizer.ggml.eot_token_id": VOCAB}, "eot_token_id"),
        (
            {
                "tokenizer.ggml.bos_token_id": None,
                "tokenizer.ggml.add_bos_token": True,
            },
            "bos_token_id",
        ),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({"general.alignment": "wide"}, "alignment"),
    ],
)
def test_bad_files(tmp_path, changes, match):
    tensors = gguf_tensors("llama", reference_model("llama"))
    fails(write_gguf(tmp_path / "m.gguf", "llama", tensors, **changes), match)


@pytest.mark.parametrize("merges", [["h x y", "q"], ["no separator", "h€ €"]])
def test_bad_merges(tmp_path, merges):
    tensors = gguf_tensors("llama", reference_model("llama"))
    changes = {"tokenizer.ggml.merges": merges}
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors, **changes)
    fails(path, "not consistent", lambda p: read_gguf(p).write(tmp_path / "out"))


def test_other_architectures_check_too(tmp_path):
    gemma = gguf_tensors("gemma3", reference_model("gemma3"))
    cases = [
        ("gemma3", gemma, {":final_logit_softcapping": 30.0}, "softcapping"),
        ("gemma3", gemma, {"rope_freqs.weight": np.ones(8, np.float32)}, "no place"),
        ("gemma3", gemma, {"blk.0.attn_q_norm.weight": None}, "attn_q_norm"),
    ]
    qwen2 = gguf_tensors("qwen2", reference_model("qwen2"))
    cases += [
        ("qwen2", qwen2, {"blk.0.attn_q.bias": None}, "attn_q.bias"),
        ("qwen2", qwen2, {"output.bias": np.zeros(VOCAB, np.float32)}, "no place"),
    ]
    for arch, tensors, changes, match in cases:
        fails(write_gguf(tmp_path / "m.gguf", arch, tensors, **changes), match)


def test_bad_paths(tmp_path):
    fails(tmp_path / "none.gguf", "no such file")
    fails(tmp_path, "folder")
    fails(tmp_path / "m-00001-of-00003.gguf", "llama-gguf-split --merge")
    empty = tmp_path / "empty.gguf"
    empty.write_bytes(b"")
    fails(empty, "empty")
    text = tmp_path / "text.gguf"
    text.write_text("this is no model at all\n" * 10)
    fails(text, "not a GGUF file")


def header(
    *, version: int = 3, tensors: int = 0, values: int = 0, rest: bytes = b""
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


KEY = struct.pack("<Q", 1) + b"k"
HUGE = 2**62


@pytest.mark.parametrize(
    "content, match",
    [
        (b"GGUF", "ends inside"),
        (header(version=1), "version 1"),
        (header(version=99), "version 99"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(tensors=HUGE), "claims"),
        (header(values=HUGE), "claims"),
        (header(tensors=10**6), "ends inside"),
        (header(values=10**6), "ends inside"),
        (header(values=1, rest=struct.pack("<Q", HUGE) + b"k" * 40), "too long"),
        (header(values=1, rest=KEY + struct.pack("<IQ", 8, HUGE)), "ends inside"),
        (header(values=1, rest=KEY + struct.pack("<IIQ", 9, 4, HUGE)), "claims"),
        (header(values=1, rest=KEY + struct.pack("<IIQ", 9, 8, 10**6)), "ends inside"),
        (header(values=1, rest=KEY + struct.pack("<IIQ", 9, 12, 4)), "ends inside"),
        (header(values=1, rest=KEY + struct.pack("<IIQ", 9, 9, 4)), "arrays of type 9"),
        (header(values=1, rest=KEY + struct.pack("<IQ", 99, 0)), "type 99"),
        (
            header(values=2, rest=(KEY + struct.pack("<IB", 0, 0)) * 2),
            "'k' twice|ends inside",
        ),
        (
            header(values=1, rest=KEY + struct.pack("<IQ", 8, 2) + b"\xff\xfe"),
            "UTF-8",
        ),
        (
            header(
                values=1, rest=KEY + struct.pack("<IIQQ", 9, 8, 2, HUGE) + b"x" * 40
            ),
            "ends inside",
        ),
        (
            header(tensors=1, rest=KEY + struct.pack("<I", 2**31) + b"\0" * 40),
            "dimensions",
        ),
        (
            header(
                tensors=1,
                rest=KEY + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0) + b"\0" * 64,
            ),
            "ends inside",
        ),
        (
            header(
                tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 4, 777, 0) + b"\0" * 64
            ),
            "unknown type 777",
        ),
        (
            header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 0, 0, 0) + b"\0" * 64),
            "shape",
        ),
        (
            header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 4, 2, 0) + b"\0" * 64),
            "Q4_0",
        ),
        (
            header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 4, 0, 3) + b"\0" * 64),
            "not aligned",
        ),
        (
            header(
                tensors=1,
                rest=KEY + struct.pack("<IQIQ", 1, 4, 0, 2**63) + b"\0" * 64,
            ),
            "ends inside",
        ),
    ],
)
def test_hostile_headers(tmp_path, content, match):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    fails(path, match)


def test_truncated_anywhere(tmp_path, llama_file):
    whole = llama_file.read_bytes()
    reader = gguf.GGUFReader(llama_file)
    last = max(t.data_offset + t.n_bytes for t in reader.tensors)
    starts = reader.data_offset
    cuts = {*range(1, 400, 7), *range(400, starts, 997), starts - 1, starts, last - 1}
    cuts |= set(range(starts, last, (last - starts) // 20))
    path = tmp_path / "m.gguf"
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        fails(path, "ends inside")


def test_damaged_bytes_never_escape(tmp_path, llama_file):
    whole = bytearray(llama_file.read_bytes())
    starts = gguf.GGUFReader(llama_file).data_offset
    rng = random.Random(11)
    path, outcomes = tmp_path / "m.gguf", {True: 0, False: 0}
    for _ in range(300):
        damaged = whole.copy()
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(4, starts)] = rng.choice([0, 1, 0x7F, 0xFF])
        path.write_bytes(damaged)
        try:
            model = read_gguf(path)
            for _ in model.tensors("float32"):
                pass
            build_tokenizer(path, model._vocabulary)
            outcomes[True] += 1
        except GGUFError as error:
            assert "\n" not in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 10
