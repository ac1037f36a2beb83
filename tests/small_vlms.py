"""Small random models of mlx-vlm's own classes, which see images, and folders of them.

As in :mod:`small_models`, the rows of the head have lengths as different as real ones,
and the tokenizer knows every byte.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import small_models
from mlx.utils import tree_flatten
from PIL import Image
from small_models import BOS, EOS, HIDDEN
from tokenizers import Tokenizer

VOCAB = 1003
IMAGE, VISION_START, VISION_END = 300, 301, 302

_TEXT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
}

CONFIGS = {
    "gemma3": {
        "model_type": "gemma3",
        "text_config": _TEXT
        | {
            "model_type": "gemma3_text",
            "sliding_window": 24,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 16,
            "mm_tokens_per_image": 4,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": 16,
        },
        "hidden_size": HIDDEN,
        "image_token_index": IMAGE,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": _TEXT
        | {
            "model_type": "qwen3_vl_text",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "default", "mrope_section": [4, 2, 2]},
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": HIDDEN,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "spatial_patch_size": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        "image_token_id": IMAGE,
        "video_token_id": 303,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "vision_token_id": 304,
    },
    "lfm2-vl": {
        "model_type": "lfm2-vl",
        "text_config": _TEXT
        | {
            "model_type": "lfm2",
            "block_dim": HIDDEN,
            "block_ff_dim": 96,
            "block_auto_adjust_ff_dim": False,
            "conv_dim": HIDDEN,
            "conv_dim_out": HIDDEN,
            "conv_L_cache": 3,
            "conv_bias": False,
            "norm_eps": 1e-5,
            "block_multiple_of": 32,
            "block_ffn_dim_multiplier": 1.0,
            "num_heads": 4,
            "layer_types": ["conv", "full_attention"] * 2,
            "eos_token_id": EOS,
        },
        "vision_config": {
            "model_type": "lfm2_vl",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "num_patches": 16,
        },
        "image_token_id": IMAGE,
        "projector_hidden_size": 48,
    },
}

# Like Qwen3-VL, but for a text model with recurrent layers and a head of its own.
CONFIGS["qwen3_5"] = CONFIGS["qwen3_vl"] | {
    "model_type": "qwen3_5",
    "text_config": _TEXT
    | {
        "model_type": "qwen3_5_text",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "full_attention_interval": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": {
            "type": "default",
            "mrope_section": [4, 2, 2],
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
    },
    "vision_config": CONFIGS["qwen3_vl"]["vision_config"]
    | {"model_type": "qwen3_5", "deepstack_visual_indexes": []},
}

_MARKS = {
    IMAGE: "image_pad",
    VISION_START: "vision_start",
    VISION_END: "vision_end",
    303: "video_pad",
}
_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict]:
    """A random model of the above, and its configuration."""
    config = json.loads(json.dumps(CONFIGS[name]))
    config |= {"eos_token_id": [EOS], "bos_token_id": BOS, "vocab_size": VOCAB}
    arch = importlib.import_module(f"mlx_vlm.models.{name.replace('-', '_')}")
    utils = importlib.import_module("mlx_vlm.utils")
    settings = arch.ModelConfig.from_dict(config)
    settings = utils.update_module_configs(
        settings, arch, config, ["text", "vision", "projector"]
    )
    model = arch.Model(settings)
    _randomize(model, np.random.default_rng(seed), gemma=name == "gemma3")
    return model, config


def _randomize(model: nn.Module, rng: np.random.Generator, gemma: bool) -> None:
    weights = {}
    for name, old in tree_flatten(model.parameters()):
        value = rng.standard_normal(old.shape)
        if "norm" in name:
            # Gemma adds 1.
            ours = 16 * ("post_" in name) if gemma and "language" in name else 1
            value = 0.1 * value + ours * name.endswith("weight")
        elif old.ndim == 2 and old.shape[0] == VOCAB:
            lengths = np.exp(0.3 * rng.standard_normal((VOCAB, 1)))
            value = 0.35 * value * lengths
            value[EOS] = 0  # so that texts go on
        else:
            value = value / np.sqrt(old.size / old.shape[0])
            # What layers add is to outweigh the token itself, which would be repeated.
            value *= 4 if "language" in name else 1
        weights[name] = mx.array(value.astype(np.float32))
    head, table = "language_model.lm_head.weight", "language_model.model.embed_tokens"
    if head in weights:
        weights[head] = weights[f"{table}.weight"]
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())


def prompt(name: str, seed: int = 0, n: int = 12) -> dict[str, mx.array]:
    """Tokens and a random image, as ``mlx_vlm.generate`` takes them when they are
    prepared: ``input_ids``, ``pixel_values`` and what the model needs beside."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 256, n).tolist()
    if name == "gemma3":
        pixels = rng.standard_normal((1, 3, 16, 16))
        ids, extra = [BOS, *[IMAGE] * 4, *text], {}
    elif name.startswith("qwen3"):
        pixels = rng.standard_normal((32, 3 * 2 * 4 * 4))
        extra = {"image_grid_thw": mx.array([[1, 4, 8]])}
        ids = [BOS, VISION_START, *[IMAGE] * 8, VISION_END, *text]
    else:
        pixels = rng.standard_normal((1, 16, 3 * 4 * 4))
        extra = {
            "spatial_shapes": mx.array([[4, 4]]),
            "pixel_attention_mask": mx.ones((1, 16), mx.int32),
        }
        ids = [BOS, *[IMAGE] * 4, *text]
    tokens = mx.array([ids])
    return extra | {
        "input_ids": tokens,
        "pixel_values": mx.array(pixels.astype(np.float32)),
        "mask": mx.ones_like(tokens),
    }


def write(name: str, folder: Path, seed: int = 0) -> Path:
    """A folder as mlx-vlm writes them, in one file without an index."""
    model, config = build(name, seed)
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(
        str(folder / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    small_models.write_tokenizer(folder, VOCAB)
    if name == "qwen3_vl":
        _write_processor(folder)
    return folder


def _write_processor(folder: Path) -> None:
    """What makes Qwen3-VL's processor, which is plain Python, of a folder."""
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for token, name in _MARKS.items():
        text = text.replace(f'"<{token}>"', f'"<|{name}|>"')
    path.write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([f"<|{name}|>" for name in _MARKS.values()])
    tokenizer.save(str(path))
    size = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"min_pixels": 256, "max_pixels": 1024}
    kind = {"processor_class": "Qwen3VLProcessor"}
    settings = kind | {
        "image_processor_type": "Qwen2VLImageProcessor",
        **size,
        **pixels,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | kind | {"chat_template": _TEMPLATE}
    path.write_text(json.dumps(config))


def picture(file: Path) -> None:
    """A picture of noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
