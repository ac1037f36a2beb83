"""Tokens per second of mlx-vlm: dense, FlashHead approximate and exact.

    python benchmarks/vlm.py --model FOLDER

FOLDER is a converted Gemma 3 of text alone. mlx-vlm does not load such models, so its
weights become the text part of mlx-vlm's Gemma 3, beside a small made vision tower: the
text, its head and its drafts are real, the tower is not. The prompt has no image.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import utils
from samplers import SAMPLERS

from mlx_flashhead import patch, verification
from mlx_flashhead.compute.device import for_device
from mlx_flashhead.integration.loading import install

PROMPT = "The history of the steam engine begins"
_VISION = {
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}


def build(folder: Path) -> Any:
    """mlx-vlm's Gemma 3 with the text model of a folder."""
    text, config = utils.load_model(folder, lazy=True)
    arch = importlib.import_module("mlx_vlm.models.gemma3")
    own = {**config, "mm_tokens_per_image": 4, "model_type": "gemma3_text"}
    settings = arch.ModelConfig(
        text_config=arch.TextConfig.from_dict(own),
        vision_config=arch.VisionConfig.from_dict(_VISION),
        model_type="gemma3",
        hidden_size=own["hidden_size"],
    )
    model = arch.Model(settings)
    weights = {f"language_model.{k}": v for k, v in tree_flatten(text.parameters())}
    model.load_weights(
        list(model.language_model.sanitize(weights).items()), strict=False
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    mlx_vlm = importlib.import_module("mlx_vlm")
    loader = importlib.import_module("mlx_vlm.utils")
    # Nothing of a text is looked for in it that would end it.
    processor = loader.load_processor(args.model, True, eos_token_ids=[])
    models = {"dense": for_device(build(args.model))}
    for decoding in ("approximate", "exact"):
        models[decoding] = install(build(args.model), args.model, decoding)
    patch()
    ids = mx.array([processor.encode(PROMPT)])
    runs: dict[tuple[str, str], list[float]] = {}
    texts: dict[tuple[str, str], str] = {}
    counts = {}
    for repeat in range(args.repeats + 1):
        for name in ("greedy", "top-p"):
            options = dict(SAMPLERS[name])
            options["temperature"] = options.pop("temp")
            for decoding, model in models.items():
                mx.random.seed(0)
                with verification() as count:
                    results = list(
                        mlx_vlm.stream_generate(
                            model,
                            processor,
                            "",
                            input_ids=ids,
                            max_tokens=args.max_tokens if repeat else 8,
                            **options,
                        )
                    )
                if repeat:  # the first run compiles
                    speed = results[-1].generation_tps
                    runs.setdefault((name, decoding), []).append(speed)
                    texts[name, decoding] = "".join(r.text for r in results)
                    counts[name, decoding] = count
    print("| sampling | decoding | tokens/s | of dense | steps undone |")
    print("| --- | --- | --- | --- | --- |")
    for (name, decoding), values in runs.items():
        speed = statistics.median(values)
        ratio = speed / statistics.median(runs[name, "dense"])
        waste = f"{counts[name, decoding].waste:.1%}" if decoding == "exact" else ""
        print(f"| {name} | {decoding} | {speed:.1f} | {ratio:.2f} | {waste} |")
    same = texts["greedy", "exact"] == texts["greedy", "dense"]
    print(json.dumps({"greedy exact is dense": same, "runs": list(runs.values())}))


if __name__ == "__main__":
    main()
