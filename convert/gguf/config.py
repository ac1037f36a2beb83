"""The metadata of a GGUF file as the config.json of a Hugging Face model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from .errors import error, quote
from .metadata import Metadata
from .reader import GGUFFile

# The model_type and class of each architecture.
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}


def architecture(meta: Metadata) -> str:
    arch = meta.text("general.architecture")
    if arch not in _ARCHITECTURES:
        problem = f"its architecture is {quote(arch)}"
        raise error(meta.path, problem, f"use one of {', '.join(_ARCHITECTURES)}")
    return arch


def read_config(file: GGUFFile, arch: str) -> dict[str, Any]:
    """The config.json without the rotary scaling and the special token ids."""
    meta, tensors = file.metadata, file.tensors
    hidden = meta.integer(f"{arch}.embedding_length")
    heads = meta.integer(f"{arch}.attention.head_count")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise error(meta.path, "it lacks tensor 'token_embd.weight'")
    layers = meta.integer(f"{arch}.block_count")
    if layers > len(tensors):
        problem = f"it lacks most of the tensors of its {layers} layers"
        raise error(meta.path, problem)
    model_type, class_name = _ARCHITECTURES[arch]
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": meta.integer(f"{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer(f"{arch}.attention.head_count_kv", heads),
        "head_dim": _head_dim(meta, arch, hidden, heads),
        "rms_norm_eps": meta.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "vocab_size": meta.integer(f"{arch}.vocab_size", embedding.shape[0]),
        "max_position_embeddings": meta.integer(f"{arch}.context_length"),
        "rope_theta": meta.number(f"{arch}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "bfloat16",
    }
    if heads % config["num_key_value_heads"]:
        raise meta.bad(f"{arch}.attention.head_count_kv")
    if config["rope_theta"] <= 1:
        raise meta.bad(f"{arch}.rope.freq_base")
    _refuse_unsupported(meta, arch, config["head_dim"])
    if arch == "gemma3":
        config |= _gemma3_config(meta, config)
    else:
        config["hidden_act"] = "silu"
    if arch == "llama":
        config["attention_bias"] = _any_bias(tensors, "attn_")
        config["mlp_bias"] = _any_bias(tensors, "ffn_")
    if arch == "qwen2" and config["head_dim"] * heads != hidden:
        raise meta.bad("qwen2.attention.key_length")
    return config


def _head_dim(meta: Metadata, arch: str, hidden: int, heads: int) -> int:
    key = f"{arch}.attention.key_length"
    if key not in meta and hidden % heads:
        raise meta.bad(f"{arch}.attention.head_count")
    head_dim = meta.integer(key, hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if meta.integer(f"{arch}.{name}", head_dim) != head_dim:
            problem = f"{arch}.{name} is not the head size {head_dim}"
            fix = "use a model whose heads have one size and rotate whole"
            raise error(meta.path, problem, fix)
    if head_dim % 2:
        raise meta.bad(key)
    return head_dim


def _refuse_unsupported(meta: Metadata, arch: str, head_dim: int) -> None:
    """Features that change the result and that the mlx-lm model lacks."""
    neutral = {
        "expert_count": 0,
        "attn_logit_softcapping": 0,
        "final_logit_softcapping": 0,
        "logit_scale": 1,
        "residual_scale": 1,
        "embedding_scale": 1,
        "attention.scale": head_dim**-0.5,
    }
    for name, value in neutral.items():
        key = f"{arch}.{name}"
        found = meta.number(key, 0)
        if found and not math.isclose(found, value, rel_tol=1e-5):
            problem = f"{key} is {found:g}, which mlx-lm's {arch} does not have"
            raise error(meta.path, problem, f"use a plain {arch} model")


def _any_bias(names: Iterable[str], part: str) -> bool:
    return any(f".{part}" in name and name.endswith(".bias") for name in names)


def _gemma3_config(meta: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    window = meta.integer("gemma3.attention.sliding_window", 0, smallest=0)
    pattern = _window_pattern(meta, layers) if window else 1
    # Of the published sizes only 27B (62 layers) does not scale by its head size.
    scalar = config["head_dim"]
    if layers == 62:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": window or config["max_position_embeddings"],
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": meta.number("gemma3.rope.freq_base_swa", 10000.0),
        "layer_types": [
            "full_attention" if i % pattern == pattern - 1 else "sliding_attention"
            for i in range(layers)
        ],
    }


def _window_pattern(meta: Metadata, layers: int) -> int:
    """Every how many layers one attends to everything."""
    key = "gemma3.attention.sliding_window_pattern"
    if isinstance(meta.values.get(key), np.ndarray):
        slides = meta.numbers(key, layers).astype(bool)
        full = np.flatnonzero(~slides)
        pattern = int(full[0]) + 1 if full.size else layers + 1
        if (slides != ((np.arange(layers) + 1) % pattern != 0)).any():
            problem = f"{key} does not repeat, and mlx-lm knows only one that does"
            raise error(meta.path, problem, "use a plain gemma3 model")
    else:
        pattern = meta.integer(key, 6)
    if pattern > layers:
        problem = f"none of its {layers} layers attends to everything"
        raise error(meta.path, problem, "use a plain gemma3 model")
    return pattern
