"""Which weights the mlx-lm model has, and the tensor each one comes from.

Two architectures store some weights in a way of their own: llama interleaves
the rows of its q and k projections for its rotary embedding, and gemma3 stores
``1 + weight`` for its norms, where mlx-lm adds the 1 itself.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from .errors import error, quote
from .reader import GGUFFile

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NAMES = {
    "llama": _LAYER,
    "gemma3": _LAYER | _QK_NORMS | _GEMMA_NORMS,
    "qwen2": _LAYER,
    "qwen3": _LAYER | _QK_NORMS,
}


@dataclass(frozen=True)
class Weight:
    """One weight of the mlx-lm model and where it comes from.

    ``source`` None stands for zeros, ``heads`` undoes the rotary interleaving
    of that many heads, ``shift`` is added.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    heads: int = 0
    shift: float = 0.0


def plan_weights(file: GGUFFile, arch: str, config: dict[str, Any]) -> list[Weight]:
    """The weights to write, in mlx-lm's order.

    Raises:
        GGUFError: one is not in the file, or has another shape there, or the
            file has a tensor that the model does not.
    """
    plan, used = [], {"rope_freqs.weight"} if arch != "gemma3" else set()
    for weight in _weights(arch, config, file.tensors):
        plan.append(weight)
        if weight.source is None:
            continue
        tensor = file.tensors.get(weight.source)
        if tensor is None:
            raise error(file.path, f"it lacks tensor {weight.source!r}")
        if tensor.shape != weight.shape:
            problem = (
                f"tensor {weight.source!r} has shape {tensor.shape}, "
                f"and the metadata asks for {weight.shape}"
            )
            raise error(file.path, problem)
        stem = weight.source.removesuffix(".weight")
        used |= {weight.source, f"{stem}.scale", f"{stem}.input_scale"}
    for name in file.tensors:
        if name not in used:
            problem = f"tensor {quote(name)} has no place in mlx-lm's {arch}"
            raise error(file.path, problem, f"use a plain {arch} model")
    return plan


def _weights(
    arch: str, config: dict[str, Any], stored: Container[str]
) -> Iterator[Weight]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shift = -1.0 if arch == "gemma3" else 0.0
    yield Weight("model.embed_tokens.weight", "token_embd.weight", (vocab, hidden))
    for i in range(config["num_hidden_layers"]):
        yield from _layer_weights(arch, config, stored, i, shift)
    yield Weight("model.norm.weight", "output_norm.weight", (hidden,), shift=shift)
    if not config["tie_word_embeddings"]:
        yield Weight("lm_head.weight", "output.weight", (vocab, hidden))


def _layer_weights(
    arch: str, config: dict[str, Any], stored: Container[str], layer: int, shift: float
) -> Iterator[Weight]:
    shapes, heads = _layer_shapes(config), _interleaved_heads(arch, config)
    for part, target in _NAMES[arch].items():
        name, source = f"model.layers.{layer}.{target}", f"blk.{layer}.{part}"
        weight, shape = (f"{name}.weight", f"{source}.weight"), shapes[part]
        if part.endswith("norm"):
            yield Weight(*weight, shape, shift=shift)
            continue
        yield Weight(*weight, shape, heads.get(part, 0))
        if _has_bias(arch, config, part):
            bias: str | None = f"{source}.bias"
            # mlx-lm's llama has all biases of a block or none.
            if arch == "llama" and bias not in stored:
                bias = None
            yield Weight(f"{name}.bias", bias, shape[:1], heads.get(part, 0))


def _layer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    return {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
        "attn_q_norm": (head_dim,),
        "attn_k_norm": (head_dim,),
        "post_attention_norm": (hidden,),
        "post_ffw_norm": (hidden,),
    }


def _interleaved_heads(arch: str, config: dict[str, Any]) -> dict[str, int]:
    if arch != "llama":
        return {}
    return {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }


def _has_bias(arch: str, config: dict[str, Any], part: str) -> bool:
    if arch == "llama":
        return config["attention_bias" if part.startswith("attn") else "mlp_bias"]
    return arch == "qwen2" and part in ("attn_q", "attn_k", "attn_v")
