"""Load a converted model, with its FlashHead in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, overload

import mlx.nn as nn
from mlx_lm import utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .integration.patch import patch_decoding, patched


@overload
def load(
    path_or_hf_repo: str | Path,
    *,
    n_probes: int | None = None,
    dense: bool = False,
    return_config: Literal[False] = False,
    **kwargs: Any,
) -> tuple[nn.Module, TokenizerWrapper]: ...


@overload
def load(
    path_or_hf_repo: str | Path,
    *,
    n_probes: int | None = None,
    dense: bool = False,
    return_config: Literal[True],
    **kwargs: Any,
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]: ...


def load(
    path_or_hf_repo: str | Path,
    *,
    n_probes: int | None = None,
    dense: bool = False,
    **kwargs: Any,
) -> (
    tuple[nn.Module, TokenizerWrapper]
    | tuple[nn.Module, TokenizerWrapper, dict[str, Any]]
):
    """Load a converted model and its tokenizer, like :func:`mlx_lm.load`.

    mlx-lm's decoding functions draw among its candidates from then on, as after
    :func:`mlx_flashhead.patch_decoding`; other models they treat as before. On a CPU
    back-end the model computes in float32.

    Args:
        path_or_hf_repo: A converted folder, or the Hugging Face id of one. A model
          without a FlashHead is loaded as mlx-lm loads it.
        n_probes: Clusters probed per decoded token, instead of the stored number; from
          1 to the head's number of clusters.
        dense: Leave the dense head in place. So does ``MLX_FLASHHEAD=0`` in the
          environment.
        return_config: Whether to return the config, too.
        **kwargs: What :func:`mlx_lm.load` takes (``lazy``, ``adapter_path``,
          ``tokenizer_config``, ``revision``, ...).
          ``trust_remote_code`` is the tokenizer's, too.

    Returns:
        ``(model, tokenizer)``, and the config where ``return_config`` is true.

    Raises:
        FormatError: The folder's FlashHead is missing, damaged or another model's, a
          file changed since the conversion, or ``n_probes`` is out of range. It is a
          ``ValueError`` of one line.
        ValueError: The adapter changes the head; or the path is no folder and no
          Hugging Face id.
        FileNotFoundError: There is no model there, or the hub cannot be reached; other
          errors of the hub come as they are.
        PatchError: The installed mlx-lm is not one that this package knows.
    """
    # Left out, transformers asks on the terminal whether a tokenizer's code may run.
    trust = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    kwargs["tokenizer_config"] = trust | (kwargs.get("tokenizer_config") or {})
    with patched(n_probes=n_probes, dense=dense):
        loaded = utils.load(str(path_or_hf_repo), **kwargs)
    patch_decoding()
    return loaded
