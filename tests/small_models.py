"""Small random mlx-lm models of several architectures, and folders of them.

The weights are random, but the rows of the head have lengths as different as real
ones, so that some tokens are frequent and most are rare. The tokenizer knows every
byte; the rest of its vocabulary is words that no text contains.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import utils
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN = 64
VOCAB = 600
BOS, EOS = 256, 257

_COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
_GPT = {"n_embd": HIDDEN, "n_head": 4, "n_layer": 2, "n_positions": 4096}
_GEMMA3 = {"sliding_window": 64, "sliding_window_pattern": 2}
_GRANITE = {
    "logits_scaling": 4.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
}

# Name: (model type, what its configuration has beside the common, its head).
ARCHITECTURES = {
    "llama": ("llama", {"tie_word_embeddings": False}, "lm_head"),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, "model.embed_tokens"),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, "model.embed_tokens"),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}, "lm_head"),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}, "model.embed_tokens"),
    "gemma2": (
        "gemma2",
        {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
        "model.embed_tokens",
    ),
    "gemma3_text": ("gemma3_text", _GEMMA3, "model.embed_tokens"),
    "gemma3": (
        "gemma3",
        {"text_config": _COMMON | _GEMMA3 | {"model_type": "gemma3_text"}},
        "language_model.model.embed_tokens",
    ),
    "gemma3n": (
        "gemma3n",
        {
            "text_config": _COMMON
            | {
                "model_type": "gemma3n_text",
                "num_hidden_layers": 4,
                "num_kv_shared_layers": 2,
                "vocab_size_per_layer_input": VOCAB,
                "sliding_window": 64,
                "rope_local_base_freq": 10000.0,
                "final_logit_softcapping": 5.0,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
                "hidden_size_per_layer_input": 16,
                "altup_num_inputs": 3,
                "altup_coef_clip": 120.0,
                "altup_correct_scale": True,
                "altup_active_idx": 0,
                "laurel_rank": 8,
                "intermediate_size": 96,
            }
        },
        "model.language_model.embed_tokens",
    ),
    "cohere": ("cohere", {"logit_scale": 0.0625}, "model.embed_tokens"),
    "granite": ("granite", _GRANITE | {"tie_word_embeddings": False}, "lm_head"),
    "granite-tied": (
        "granite",
        _GRANITE | {"tie_word_embeddings": True},
        "model.embed_tokens",
    ),
    "phi": ("phi", {"partial_rotary_factor": 0.5}, "lm_head"),
    "gptj": ("gptj", _GPT | {"rotary_dim": 8, "layer_norm_epsilon": 1e-5}, "lm_head"),
    "gpt2": (
        "gpt2",
        _GPT | {"n_ctx": 4096, "layer_norm_epsilon": 1e-5},
        "model.wte",
    ),
}


def build(
    name: str, vocab_size: int = VOCAB, seed: int = 0, dtype: str = "float32", **extra
) -> tuple[nn.Module, dict]:
    """A random model of an architecture above, and its configuration."""
    model_type, special, _ = ARCHITECTURES[name]
    config = json.loads(json.dumps(_COMMON | special | extra))
    config |= {"model_type": model_type, "vocab_size": vocab_size}
    if "text_config" in config:
        config["text_config"]["vocab_size"] = vocab_size
    config |= {"bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": dtype}
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if model_type == "gemma3_text":
        model.sanitize({})  # ties the head, as loading it without one does
    elif model_type == "gemma3":
        model.language_model.sanitize({})
    _randomize(model, vocab_size, np.random.default_rng(seed))
    model.set_dtype(getattr(mx, dtype))
    model.eval()
    return model, config


def _randomize(model: nn.Module, vocab_size: int, rng: np.random.Generator) -> None:
    zero_norms = model.model_type.startswith("gemma")
    weights = []
    for name, old in tree_flatten(model.parameters()):
        value = rng.standard_normal(old.shape)
        if "norm" in name or ".ln_" in name:
            is_weight = name.endswith("weight")
            value = 0.1 * value + (is_weight and not zero_norms)
        elif old.ndim == 2 and old.shape[0] == vocab_size:
            lengths = np.exp(0.3 * rng.standard_normal((vocab_size, 1)))
            value = 0.35 * value * lengths
            value[EOS] = 0  # so that texts go on
        else:
            value = value / np.sqrt(old.shape[-1])
        weights.append((name, mx.array(value.astype(np.float32))))
    model.load_weights(weights)
    mx.eval(model.parameters())


def write(
    name: str,
    folder: Path,
    vocab_size: int = VOCAB,
    *,
    seed: int = 0,
    dtype: str = "float32",
    quantize: dict | None = None,
    **extra,
) -> Path:
    """A folder as mlx-lm writes them; ``quantize`` is for ``quantize_model``."""
    model, config = build(name, vocab_size, seed, dtype, **extra)
    if quantize:
        model, config = utils.quantize_model(model, config, **quantize)
    folder.mkdir(parents=True)
    utils.save_model(folder, model, donate_model=False)
    utils.save_config(config, folder / "config.json")
    write_tokenizer(folder, vocab_size)
    return folder


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    table = {b: chr(b) for b in plain}
    table |= {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A token per byte, <s>, </s>, and words up to the vocabulary's size."""
    tokens = [*byte_alphabet(), "<s>", "</s>"]
    tokens += [f"<{i}>" for i in range(len(tokens), vocab_size)]
    vocabulary = {token: i for i, token in enumerate(tokens[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
