"""An open GGUF file as a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_flashhead.compute.table import Table

from .config import architecture, read_config
from .errors import error
from .plan import plan_weights
from .reader import read_file
from .rope import rope_scaling
from .tensors import Weights, weight_dtype
from .vocabulary import Vocabulary, read_vocabulary
from .write import Progress, write_folder


@dataclass
class GGUFModel:
    """An open, checked GGUF file.

    Attributes:
        path: the file.
        config: the config.json of the model folder, as mlx-lm reads it.
    """

    path: Path
    config: dict[str, Any]
    _weights: Weights = field(repr=False)
    _vocabulary: Vocabulary = field(repr=False)

    def tensors(self, dtype: str | mx.Dtype) -> Iterator[tuple[str, mx.array]]:
        """Hugging Face names and dequantized weights, one at a time.

        Args:
            dtype: "float32", "float16" or "bfloat16", of every array. Values
                are computed in float32 and cast.

        Yields:
            (name, array): a projection has shape (out, in), the embedding
            (vocab_size, hidden_size), a norm or bias one dimension.

        Raises:
            GGUFError: a weight is not finite, or too large for ``dtype``.
        """
        kind = weight_dtype(self.path, dtype)
        for weight in self._weights.plan:
            yield weight.name, self._weights.read(weight, kind)

    def exact_head(self) -> Table | None:
        """The rows ``[vocab_size, hidden_size]`` of the head, the embedding where they
        are tied, as a quantized table with the very values of the file; ``None`` where
        MLX has no such form for its quantization."""
        tied = self.config["tie_word_embeddings"]
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        weights = {weight.name: weight for weight in self._weights.plan}
        return self._weights.table(weights[name])

    def write(
        self,
        folder: str | Path,
        dtype: str | mx.Dtype = "bfloat16",
        progress: Progress | None = None,
    ) -> None:
        """Write the model folder; it is made if needed.

        Weights go to model.safetensors, or to numbered files with an index
        where they take more than 4 GiB, so that no more than that is held.

        Args:
            folder: where to write. Other weights there are refused, because
                mlx-lm would load them too.
            dtype: of the weights, as in ``tensors``.
            progress: called as ``progress(done, total, name)`` after each
                tensor, with the number of tensors.

        Raises:
            GGUFError: as ``tensors``, or the folder cannot be written.
        """
        kind = weight_dtype(self.path, dtype)
        write_folder(
            Path(folder), self.config, self._weights, self._vocabulary, kind, progress
        )


def read_gguf(path: str | Path) -> GGUFModel:
    """Open a GGUF file and check everything but the values of its weights.

    Args:
        path: a GGUF file of architecture llama, gemma3, qwen2 or qwen3.

    Returns:
        The model; its file stays memory-mapped.

    Raises:
        GGUFError: the file cannot be read or converted. One line, which names
            the file and what to do.
    """
    path = Path(path)
    file = read_file(path)
    arch = architecture(file.metadata)
    config = read_config(file, arch)
    plan = plan_weights(file, arch, config)
    scaling = rope_scaling(file, arch, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    vocabulary = read_vocabulary(file.metadata)
    if len(vocabulary.tokens) > config["vocab_size"]:
        problem = "its tokenizer has more tokens than its embedding has rows"
        raise error(path, problem)
    config |= vocabulary.config_ids()
    return GGUFModel(path, config, Weights(file, plan), vocabulary)
