"""Turn a GGUF file into a model folder that mlx-lm loads.

``read_gguf(path).write(folder)`` reads a GGUF file of architecture llama,
gemma3, qwen2 or qwen3 and writes Hugging Face weights, configuration,
tokenizer and chat template, so that ``mlx_lm.load(folder)`` works. Every
quantization that the ``gguf`` package dequantizes is accepted.

The file is memory-mapped and nothing in it is trusted: counts, lengths and
offsets are checked against the size of the file before anything is allocated,
and whatever is wrong becomes a one-line :class:`GGUFError` that names the file
and the way out.

Modules, each importing only from those above it:

* ``errors``: the error and its messages;
* ``cursor``, ``metadata``, ``quantization``: values one after the other, typed
  access to the metadata, quantized bytes as numbers;
* ``reader``: the header, checked, and where each tensor lies;
* ``config``, ``rope``: the metadata as config.json, and its rotary scaling;
* ``plan``, ``tensors``: which weights the model has, and their values;
* ``word_splits``, ``vocabulary``: the metadata of the tokenizer;
* ``tokenizer_bpe``, ``tokenizer_spm``, ``tokenizer``: the tokenizer, of two kinds;
* ``write``: the model folder;
* ``model``: ``read_gguf`` and what it returns.
"""

from .errors import GGUFError
from .model import GGUFModel, read_gguf

__all__ = ["GGUFError", "GGUFModel", "read_gguf"]
