"""Write the model folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import GGUFError, error
from .plan import Weight
from .tensors import Weights
from .tokenizer import build_tokenizer, tokenizer_config
from .vocabulary import Vocabulary

Progress = Callable[[int, int, str], None]

_SHARD_BYTES = 4 << 30


def write_folder(
    folder: Path,
    config: dict[str, Any],
    weights: Weights,
    vocabulary: Vocabulary,
    dtype: mx.Dtype,
    progress: Progress | None,
) -> None:
    """Write weights, tokenizer and configuration, as ``GGUFModel.write`` says."""
    path = weights.file.path
    shards = _shards(weights.plan, dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_other_weights(folder, [name for name, _ in shards])
        _write_tokenizer(folder, path, vocabulary, config["max_position_embeddings"])
        _write_weights(folder, weights, dtype, shards, progress)
        _write_configs(folder, config, dtype)
    except GGUFError:
        raise
    except (OSError, RuntimeError) as cause:
        problem = f"{folder} cannot be written ({cause})"
        raise error(path, problem, "choose another folder or make room") from cause


def _shards(plan: list[Weight], dtype: mx.Dtype) -> list[tuple[str, list[Weight]]]:
    """The weights of each file, by its name."""
    groups: list[list[Weight]] = [[]]
    size = 0
    for weight in plan:
        more = math.prod(weight.shape) * dtype.size
        if groups[-1] and size + more > _SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += more
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    count = len(groups)
    return [
        (f"model-{i:05d}-of-{count:05d}.safetensors", group)
        for i, group in enumerate(groups, 1)
    ]


def _refuse_other_weights(folder: Path, names: list[str]) -> None:
    for file in sorted(folder.glob("model*.safetensors")):
        if file.name not in names:
            problem = "mlx-lm would load it together with the new weights"
            raise error(file, problem, "remove it or choose another folder")


def _write_tokenizer(
    folder: Path, path: Path, vocabulary: Vocabulary, context: int
) -> None:
    text = build_tokenizer(path, vocabulary).to_str(pretty=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config = tokenizer_config(vocabulary, context)
    _write_json(folder / "tokenizer_config.json", config)
    template = folder / "chat_template.jinja"
    if vocabulary.chat_template is not None:
        template.write_text(vocabulary.chat_template, encoding="utf-8")
    else:
        template.unlink(missing_ok=True)


def _write_weights(
    folder: Path,
    weights: Weights,
    dtype: mx.Dtype,
    shards: list[tuple[str, list[Weight]]],
    progress: Progress | None,
) -> None:
    done, placed = 0, {}
    for file, group in shards:
        arrays = {}
        for weight in group:
            arrays[weight.name] = weights.read(weight, dtype)
            placed[weight.name] = file
            # What a chunk used is not wanted again.
            mx.clear_cache()
            done += 1
            if progress is not None:
                progress(done, len(weights.plan), weight.name)
        mx.save_safetensors(str(folder / file), arrays, metadata={"format": "mlx"})
    if len(shards) > 1:
        size = sum(math.prod(w.shape) for w in weights.plan) * dtype.size
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_configs(folder: Path, config: dict[str, Any], dtype: mx.Dtype) -> None:
    name = str(dtype).removeprefix("mlx.core.")
    _write_json(folder / "config.json", config | {"torch_dtype": name})
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {k: config[k] for k in names if k in config}
    _write_json(folder / "generation_config.json", generation)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
