"""Load a converted model, with its FlashHead in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, overload

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .integration import loading
from .integration.patch import patch_decoding, stock_loader


@overload
def load(
    path_or_hf_repo: str | Path,
    *,
    n_probes: int | None = None,
    dense: bool = False,
    exact: bool = True,
    verify_every: int | None = None,
    tune: bool = True,
    flashhead: str | Path | None = None,
    return_config: Literal[False] = False,
    **kwargs: Any,
) -> tuple[nn.Module, TokenizerWrapper]: ...


@overload
def load(
    path_or_hf_repo: str | Path,
    *,
    n_probes: int | None = None,
    dense: bool = False,
    exact: bool = True,
    verify_every: int | None = None,
    tune: bool = True,
    flashhead: str | Path | None = None,
    return_config: Literal[True],
    **kwargs: Any,
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]: ...


def load(
    path_or_hf_repo: str | Path,
    *,
    n_probes: int | None = None,
    dense: bool = False,
    exact: bool = True,
    verify_every: int | None = None,
    tune: bool = True,
    flashhead: str | Path | None = None,
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
          without a FlashHead is loaded as mlx-lm loads it, but for ``flashhead``.
        n_probes: Clusters probed per decoded token, instead of the stored number; from
          1 to the head's number of clusters.
        dense: Decode with the dense head. ``MLX_FLASHHEAD=0`` in the environment leaves
          the model to mlx-lm.
        exact: Draft with the FlashHead and verify with the dense head: the tokens are
          the model's own. Otherwise they are drawn among FlashHead's candidates.
        verify_every: Tokens that are verified at once where it is exact, instead of
          the stored number.
        tune: Whether the head is measured when it is first used, and decodes as is
          fastest here; ``MLX_FLASHHEAD_TUNE=0`` turns it off, too.
        flashhead: A FlashHead of this model, where the folder has none or another is
          wanted: its file, a folder that has one, or the Hugging Face id of either.
        return_config: Whether to return the config, too.
        **kwargs: What :func:`mlx_lm.load` takes (``lazy``, ``adapter_path``,
          ``tokenizer_config``, ``revision``, ...).
          ``trust_remote_code`` is the tokenizer's, too.

    Returns:
        ``(model, tokenizer)``, and the config where ``return_config`` is true.

    Raises:
        FormatError: The FlashHead is missing, damaged or another model's, a
          file changed since the conversion, or ``n_probes`` is out of range. It is a
          ``ValueError`` of one line.
        ValueError: The adapter changes the head; or the path is no folder and no
          Hugging Face id.
        FileNotFoundError: There is no model there, or the hub cannot be reached; other
          errors of the hub come as they are.
    """
    options = dict(kwargs)
    adapter_path = options.pop("adapter_path", None)
    return_config = options.pop("return_config", False)
    revision = options.pop("revision", None)
    # Left out, transformers asks on the terminal whether a tokenizer's code may run.
    trust = options.pop("trust_remote_code", False)
    tokenizer_config = {"trust_remote_code": trust}
    tokenizer_config |= options.pop("tokenizer_config", None) or {}
    folder = loading.download(stock_loader("_download"), str(path_or_hf_repo), revision)
    stock_load = stock_loader("load_model")
    model, config = loading.load_model(
        stock_load,
        folder,
        n_probes=n_probes,
        dense=dense,
        exact=exact,
        verify_every=verify_every,
        tune=tune,
        flashhead=flashhead,
        **loading.trusting(stock_load, folder, trust),
        **options,
    )
    if adapter_path is not None:
        stock = stock_loader("load_adapters")
        model = loading.load_adapters(stock, model, adapter_path)
        model.eval()
    tokenizer = loading.load_tokenizer(
        stock_loader("load_tokenizer"),
        folder,
        tokenizer_config,
        eos_token_ids=config.get("eos_token_id"),
    )
    patch_decoding()
    return (model, tokenizer, config) if return_config else (model, tokenizer)
