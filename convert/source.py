"""Open what is to be converted: a Hugging Face id, a local folder or a GGUF file."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm import utils
from mlx_lm.convert import MODEL_CONVERSION_DTYPES
from safetensors import safe_open

from mlx_flashhead.compute.device import for_device, on_gpu
from mlx_flashhead.compute.table import Table
from mlx_flashhead.folder import integrity
from mlx_flashhead.folder.hub import from_hub
from mlx_flashhead.folder.section import (
    HEAD_FILE,
    FormatError,
    has_section,
    read_config,
)
from mlx_flashhead.integration.loading import trusting

if TYPE_CHECKING:
    from .gguf import GGUFModel


# Configuration, tokenizer, templates and code.
_TEXTS = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}


class SourceError(ValueError):
    """The model to convert cannot be opened."""


@dataclass(frozen=True)
class Source:
    """A model folder on this machine.

    Attributes:
        folder: Where it is.
        name: How the user named it.
        trust_remote_code: Whether its own code may run.
        gguf: The GGUF file that the folder was made from.
    """

    folder: Path
    name: str
    trust_remote_code: bool = False
    gguf: GGUFModel | None = None

    def exact_rows(self) -> Table | None:
        """The head's rows ``[V, D]`` as a quantized table, where what they were read
        from holds them in one that the folder had to round."""
        return None if self.gguf is None else self.gguf.exact_head()

    @property
    def multimodal(self) -> bool:
        """Whether the model sees or hears, with parts that mlx-lm leaves out."""
        config = read_config(self.folder)
        return any(config.get(f"{part}_config") for part in ("vision", "audio"))

    def copy(self, folder: Path) -> None:
        """Copy what a model is loaded from, its weights as they are: with them the
        folder is whole for other programs, too."""
        weights = integrity.weight_files(self.folder)
        for file in self.folder.iterdir():
            if file in weights or file.suffix in _TEXTS:
                shutil.copyfile(file, folder / file.name)
        index = folder / "model.safetensors.index.json"
        if not index.exists():
            # Without it, mlx-vlm takes every file of this kind for the model's.
            names: dict[str, str] = {}
            for file in weights:
                with safe_open(file, "numpy") as tensors:
                    names |= dict.fromkeys(tensors.keys(), file.name)
            index.write_text(json.dumps({"weight_map": names}), encoding="utf-8")

    def load(
        self, dtype: str | None, as_is: bool = False
    ) -> tuple[nn.Module, Any, dict[str, Any]]:
        """``(model, tokenizer, config)``, lazy.

        Args:
            dtype: What to cast to, instead of the config's, as ``mlx_lm.convert`` does.
            as_is: Whether to cast nothing, as ``mlx_lm.load`` does.

        Raises:
            SourceError: mlx-lm cannot load it.
        """
        try:
            n_tensors = integrity.check_sizes(self.folder, head=False)
            with integrity.bounded(self.folder, n_tensors):
                loaded: Any = utils.load(
                    str(self.folder),
                    return_config=True,
                    lazy=True,
                    tokenizer_config={"trust_remote_code": self.trust_remote_code},
                    **trusting(utils.load, self.folder, self.trust_remote_code),
                )
        except FormatError as e:
            raise SourceError(str(e)) from e
        # Whatever mlx-lm, transformers or the model's own code say of bad files.
        except Exception as e:
            reason = " ".join(str(e).split()) or type(e).__name__
            raise SourceError(
                f"{self.name}: mlx-lm cannot load this model: {reason[:400]}; use one "
                "that mlx_lm.generate runs"
            ) from e
        model, tokenizer, config = loaded
        text_config = config.get("text_config") or {}
        dtype = dtype or config.get("torch_dtype") or text_config.get("dtype")
        if dtype in MODEL_CONVERSION_DTYPES and not as_is:
            cast(model, getattr(mx, dtype))
        return model, tokenizer, config

    def load_for_calibration(self) -> nn.Module:
        """The model once more, to be run: on a CPU dequantized and in float32, where
        anything else is many times slower."""
        trust = trusting(utils.load_model, self.folder, self.trust_remote_code)
        model, _ = utils.load_model(self.folder, lazy=True, **trust)
        if not on_gpu():
            model = for_device(utils.dequantize_model(model))
        return model


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast a model's floating-point parameters where the model allows it."""
    may_cast = getattr(model, "cast_predicate", lambda _: True)

    def set_dtype(name: str, value: mx.array) -> mx.array:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(dtype) if floating and may_cast(name) else value

    model.update(tree_map_with_path(set_dtype, model.parameters()))


def open_hf(
    name: str,
    revision: str | None,
    trust_remote_code: bool,
    flag: str = "--hf-path",
    *,
    plain: bool = True,
) -> Source:
    """A local folder, or a snapshot from the Hugging Face hub.

    Args:
        name: The folder or its Hugging Face id.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether the model's own code may run.
        flag: The option that named it.
        plain: Whether it must not have a FlashHead already.

    Raises:
        SourceError: Neither is there.
    """
    path = Path(name)
    if path.is_file():
        hint = "use --gguf-path" if path.suffix == ".gguf" else "give its folder"
        raise SourceError(f"{flag} {name} is a file; {hint}")
    download = partial(utils._download, name, revision=revision)
    folder = from_hub(flag, name, download, SourceError)
    if not (folder / "config.json").is_file():
        raise SourceError(f"{name} has no config.json; give a model's folder")
    try:
        converted = has_section(folder)
    except FormatError as e:
        raise SourceError(str(e)) from e
    # What mlx-lm's commands make of a converted folder has the section, not the file.
    if plain and converted and (not path.exists() or (folder / HEAD_FILE).exists()):
        raise SourceError(
            f"{name} has a FlashHead already; convert the model it was made from, or "
            f"delete the folder's {HEAD_FILE} first"
        )
    return Source(folder, name, trust_remote_code)


def open_gguf(
    path: str, workspace: Path, dtype: str | None, flag: str = "--gguf-path"
) -> Source:
    """A GGUF file, written out as a model folder in ``workspace``. ``flag`` is the
    option that named it.

    Raises:
        SourceError: What reads such files is not installed.
        GGUFError: The file cannot be read.
    """
    if find_spec("gguf") is None:
        raise SourceError(
            f"{flag} {path} needs the package gguf: pip install 'mlx-flashhead[gguf]'"
        )
    # Only here: other models do without the package.
    from .gguf import read_gguf

    folder = workspace / "source"
    model = read_gguf(path)
    model.write(folder, dtype=dtype or "bfloat16")
    return Source(folder, path, gguf=model)


def open_reference(name: str, workspace: Path) -> Source:
    """A GGUF file, a local folder or a Hugging Face id, as ``--reference`` takes them.

    Raises:
        SourceError, GGUFError: It cannot be opened.
    """
    if Path(name).suffix == ".gguf":
        return open_gguf(name, workspace, None, "--reference")
    return open_hf(name, None, False, "--reference")
