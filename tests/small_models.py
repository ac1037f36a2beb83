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

_QWEN_LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
_HYBRID = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_proj_bias": False,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
    "mamba_expand": 1,
    "layer_types": ["mamba", "attention"],
}
_MUSE = {
    "post_norm_eps": 1e-8,
    "layer_types": ["sliding_attention", "full_attention"],
    "layer_rope_theta": [10000.0, 0],
    "sliding_window": 64,
    "final_logit_softcapping": 20.0,
    "output_multiplier": 0.25,
}

# What people run in 2026, besides; likewise, and as they are called.
CURRENT = {
    "Llama 3.2": ARCHITECTURES["llama-tied"],
    "Gemma 3": ARCHITECTURES["gemma3"],
    "Gemma 3, text only": ARCHITECTURES["gemma3_text"],
    "Gemma 3n": ARCHITECTURES["gemma3n"],
    "Gemma 4": (
        "gemma4",
        {
            "text_config": _COMMON
            | {
                "model_type": "gemma4_text",
                "num_hidden_layers": 4,
                "num_kv_shared_layers": 2,
                "global_head_dim": 32,
                "vocab_size_per_layer_input": VOCAB,
                "hidden_size_per_layer_input": 16,
                "sliding_window": 64,
                "sliding_window_pattern": 2,
            }
        },
        "language_model.model.embed_tokens",
    ),
    "Qwen 3": ARCHITECTURES["qwen3-tied"],
    "Qwen 3 VL, text": (
        "qwen3_vl",
        {
            "text_config": _COMMON
            | {"model_type": "qwen3_vl_text", "tie_word_embeddings": True}
        },
        "language_model.model.embed_tokens",
    ),
    "Qwen 3 Next": (
        "qwen3_next",
        _QWEN_LINEAR
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [],
            "moe_intermediate_size": 32,
            "partial_rotary_factor": 0.5,
        },
        "lm_head",
    ),
    "Qwen 3.5": (
        "qwen3_5",
        {
            "text_config": _COMMON
            | _QWEN_LINEAR
            | {"model_type": "qwen3_5_text", "tie_word_embeddings": True}
        },
        "language_model.model.embed_tokens",
    ),
    "LFM 2": (
        "lfm2",
        {
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": HIDDEN,
            "block_multiple_of": 32,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention"],
        },
        "model.embed_tokens",
    ),
    "SmolLM 3": ("smollm3", {"tie_word_embeddings": True}, "model.embed_tokens"),
    "Granite 4, hybrid": (
        "granitemoehybrid",
        _GRANITE | _HYBRID | {"tie_word_embeddings": True},
        "model.embed_tokens",
    ),
    "EXAONE 4": (
        "exaone4",
        {
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "default", "factor": 1.0},
            "sliding_window": 64,
            "sliding_window_pattern": "LG",
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "model.embed_tokens",
    ),
    "Hunyuan, dense": (
        "hunyuan_v1_dense",
        {
            "tie_word_embeddings": True,
            "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
        },
        "model.embed_tokens",
    ),
    "Hunyuan, experts": (
        "hunyuan",
        {
            "attention_bias": False,
            "moe_topk": 2,
            "num_experts": 4,
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
            "use_cla": False,
            "cla_share_factor": 1,
            "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
            "tie_word_embeddings": True,
        },
        "model.embed_tokens",
    ),
    "ERNIE 4.5": (
        "ernie4_5",
        {"use_bias": False, "tie_word_embeddings": True},
        "model.embed_tokens",
    ),
    "Llama 4, text": (
        "llama4_text",
        {
            "intermediate_size_mlp": 96,
            "no_rope_layers": [1, 0],
            "use_qk_norm": True,
            "tie_word_embeddings": True,
        },
        "model.embed_tokens",
    ),
    "MiniCPM": (
        "minicpm",
        {
            "dim_model_base": 16,
            "scale_depth": 1.4,
            "scale_emb": 12,
            "tie_word_embeddings": False,
        },
        "lm_head",
    ),
    "MiniCPM, tied": (
        "minicpm",
        {
            "dim_model_base": 16,
            "scale_depth": 1.4,
            "scale_emb": 12,
            "tie_word_embeddings": True,
        },
        "model.embed_tokens",
    ),
    "Seed-OSS": ("seed_oss", {"tie_word_embeddings": False}, "lm_head"),
    "Seed-OSS, tied": ("seed_oss", {"tie_word_embeddings": True}, "model.embed_tokens"),
    "Muse Glimmer": ("muse_glimmer", _MUSE, "lm_head"),
}


def build(
    name: str, vocab_size: int = VOCAB, seed: int = 0, dtype: str = "float32", **extra
) -> tuple[nn.Module, dict]:
    """A random model of an architecture above, and its configuration."""
    model_type, special, _ = (ARCHITECTURES | CURRENT)[name]
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
