"""Load a model with its FlashHead, of its own folder or of a file, in place before
anything of the dense head is read from disk.

``mlx_flashhead.load`` and the patched loaders of mlx-lm are these functions.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..compute.device import for_device, on_gpu
from ..compute.table import Table
from ..folder import integrity
from ..folder.format import form_of, load_head, read_tensors
from ..folder.hub import from_hub
from ..folder.section import (
    HEAD_FILE,
    FormatError,
    Section,
    has_section,
    head_file,
    read_config,
    read_section,
)
from ..head import FlashHead
from .alone import let_measure
from .locate import (
    HeadNotFound,
    find_transform,
    flash_heads,
    flash_slots,
    get_module,
    head_table,
    place,
    resolve_path,
    twins,
)
from .slots import Decoding, FlashLinear

# What mlx-lm downloads of a model, where no constant of its own says so (before 0.32).
_PATTERNS = [
    *("*.json", "*.jsonl", "*.jinja", "*.txt", "*.py", "*.tiktoken"),
    *("model*.safetensors", "tokenizer.model", "tiktoken.model"),
]


def download_patterns() -> list[str]:
    """Names of the files that a model consists of on the hub, its FlashHead's too."""
    return [*getattr(utils, "DEFAULT_ALLOW_PATTERNS", _PATTERNS), HEAD_FILE]


def download(
    stock: Callable[..., Path],
    path_or_hf_repo: str,
    revision: str | None = None,
    allow_patterns: list[str] | None = None,
) -> Path:
    """``mlx_lm.utils._download``, a FlashHead included where it is to be all that a
    model has."""
    return stock(path_or_hf_repo, revision, allow_patterns or download_patterns())


def trusting(
    stock: Callable[..., Any], folder: str | Path, trust_remote_code: bool
) -> dict[str, Any]:
    """The argument ``trust_remote_code`` for a loader of mlx-lm's, where it takes one.

    Raises:
        FormatError: It takes none, and would run the model's own code unasked (before
          0.32).
    """
    if "trust_remote_code" in inspect.signature(stock).parameters:
        return {"trust_remote_code": trust_remote_code}
    own = None if trust_remote_code else read_config(folder).get("model_file")
    if own is not None:
        raise FormatError(
            f"{folder}: the model brings code of its own, {own!r:.80}; "
            "trust_remote_code=True (--trust-remote-code) lets it run"
        )
    return {}


def switched_off() -> bool:
    """Whether the environment says ``MLX_FLASHHEAD=0``."""
    return os.environ.get("MLX_FLASHHEAD", "1").lower() in ("0", "false", "off")


def load_model(
    stock: Callable[..., tuple[nn.Module, dict[str, Any]]],
    model_path: Path,
    lazy: bool = False,
    *args: Any,
    n_probes: int | None = None,
    dense: bool = False,
    exact: bool = True,
    verify_every: int | None = None,
    tune: bool = True,
    flashhead: str | Path | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model's folder, with its FlashHead if it has one, or another.

    Args:
        stock: ``mlx_lm.utils.load_model``, which loads the plain model.
        model_path: The folder.
        lazy: Leave the weights on disk until they are used.
        n_probes: Clusters probed per decoded token, instead of the stored number.
        dense: Decode with the dense head. ``MLX_FLASHHEAD=0`` leaves the folder to
            mlx-lm.
        exact: Whether FlashHead drafts and the dense head verifies.
        verify_every: Tokens that are verified at once, instead of the stored number.
        tune: Whether the head may be measured when it is first used, and decode as is
            fastest here.
        flashhead: As :func:`find_flashhead` takes it, instead of the folder's own.
        args, kwargs: For ``stock``.

    Raises:
        FormatError: The folder is damaged, or changed since its conversion, or the
          FlashHead is another model's.
    """
    where: Path | None = None
    if flashhead is not None and not switched_off():
        where = find_flashhead(flashhead)
    with refusing(model_path):
        if where is None and has_section(model_path):
            where = model_path
        if not integrity.weight_files(model_path):
            where = None  # mlx-lm's sharded_load asks for a model before its weights
        decoding = None if where is None else _decoding(where, dense, exact)
        guard: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if where is not None:
            in_place = decoding is not None and where == model_path
            n_tensors = integrity.check_sizes(model_path, head=in_place)
            guard = integrity.bounded(model_path, n_tensors)
        with guard:
            model, config = stock(model_path, True, *args, **kwargs)
        if where is not None and decoding is not None:
            install(
                model,
                where,
                decoding,
                n_probes=n_probes,
                verify_every=verify_every,
                tune=tune,
                stop_tokens=stop_tokens_of(config),
                model_folder=model_path,
            )
        elif where is not None:
            for_device(model)
    if not lazy:
        mx.eval(model.parameters())
    return model, config


def find_flashhead(name: str | Path, what: str = "--flashhead") -> Path:
    """Where a FlashHead is that was named by its file, a folder that has one, or the
    Hugging Face id of either, which is downloaded: its file or folder.

    Raises:
        FormatError: There is none, or the hub does not give it.
    """
    path = Path(name)
    if not path.exists():
        if path.suffix == ".safetensors" or str(name).count("/") != 1:
            raise FormatError(
                f"{what} {name}: no such file or folder, and no Hugging Face id"
            )
        files = [HEAD_FILE, "config.json"]
        download = partial(utils._download, str(name), allow_patterns=files)
        path = from_hub(what, str(name), download, FormatError)
    if not head_file(path).is_file():
        raise FormatError(
            f"{what} {name} has no {HEAD_FILE}; make one: "
            "mlx_flashhead.convert --hf-path MODEL --sidecar PATH"
        )
    return path


def _decoding(where: Path, dense: bool, exact: bool) -> Decoding | None:
    """How a model with this FlashHead is to decode; ``None`` for the plain model's
    own head."""
    if switched_off():
        return None
    if not dense:
        return "exact" if exact else "approximate"
    # The plain model has the rows of the dense head, unless the stored ones decide. It
    # can be loaded even where the FlashHead is damaged.
    with contextlib.suppress(FormatError):
        section = read_section(where)
        if section is not None and section.draft and section.draft.rows == "stored":
            return "dense"
    return None


def stop_tokens_of(config: dict[str, Any]) -> frozenset[int]:
    """Ids that end a text, as a config has them."""
    ids = config.get("eos_token_id")
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])


def head_path(model: nn.Module, folder: str | Path, section: Section) -> str:
    """Path of the model's head that a folder's FlashHead stands for.

    Raises:
        FormatError: The model has no such head.
    """
    try:
        return resolve_path(model, section.head_path)
    except HeadNotFound as e:
        raise FormatError(f"{folder}: {e}; convert the model again") from None


def install(
    model: nn.Module,
    where: str | Path,
    decoding: Decoding = "approximate",
    *,
    n_probes: int | None = None,
    verify_every: int | None = None,
    tune: bool = False,
    stop_tokens: frozenset[int] = frozenset(),
    model_folder: str | Path | None = None,
) -> nn.Module:
    """Put a FlashHead into a model that has its own head yet, best while it is lazy.

    Args:
        model: The model.
        where: The FlashHead's file, or a folder that has one.
        decoding: How the model is to decode. But for ``"approximate"``, the rows are
            those that the section's draft names, so that what is decoded is what the
            model itself decodes.
        n_probes, verify_every: Instead of the stored numbers.
        tune: Whether it may be measured.
        stop_tokens: Tokens that end a text.
        model_folder: Where the model lies, if that is known: what is found of its
            files is remembered.

    Raises:
        FormatError: The FlashHead is damaged, or not this model's. The model is as it
            was.
    """
    if head_file(where).is_file():
        integrity.check_safetensors(head_file(where))
    section = read_section(where)
    if section is None:
        raise FormatError(f"{where} has no FlashHead; make one: mlx_flashhead.convert")
    path = head_path(model, where, section)
    module, paths = get_module(model, path), [path, *twins(model, path)]
    table = head_table(module)
    draft = section.drafting
    approximate = decoding == "approximate"
    own = not approximate and draft.rows == "model"
    tensors = read_tensors(where, section)
    if own and form_of(table) != section.rows:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("rows.")}
    integrity.check_finite(where, tensors)
    del tensors  # what of it was read goes
    integrity.check_unchanged(where, section, table, model_folder)
    head = load_head(where, section, find_transform(model, path), table, own=own)
    if not _same_bias(head, module.get("bias")):
        raise FormatError(f"{where}: the head's bias is another; convert this model")
    if n_probes is not None or not approximate:
        head.n_probes = draft.n_probes if n_probes is None else n_probes
    unpacked = draft.rows == "stored" and not approximate and not table.quantized
    if unpacked and head.rows.quantized and not on_gpu():
        # On a CPU MLX's product of 16 states with packed rows takes 20 times as long,
        # and the plain model's rows would be float32, too.
        head.rows = Table(head.rows.dequantize(mx.float32), bits=32)
    for_device(model)
    for path in paths:
        place(model, path, head)
    for slot in flash_slots(model):
        slot.decoding, slot.stop_tokens = decoding, stop_tokens
        slot.verify_every = verify_every or draft.verify_every
    if tune:
        let_measure(model, section)
    return for_device(model)


def _same_bias(head: FlashHead, bias: mx.array | None) -> bool:
    """Whether a FlashHead has the bias ``[V]`` of a model's head, or none either."""
    own: mx.array | None = head.get("bias")
    if own is None or bias is None:
        return own is bias
    index = mx.where(head.token_ids < head.vocab_size, head.token_ids, 0)
    return bool(mx.array_equal(bias.astype(own.dtype)[index], own).item())


def load_tokenizer(
    stock: Callable[..., TokenizerWrapper], model_path: Path, *args: Any, **kwargs: Any
) -> TokenizerWrapper:
    """``mlx_lm.utils.load_tokenizer``, whose errors for a converted folder are one
    line."""
    with refusing(model_path):
        return stock(model_path, *args, **kwargs)


def load_adapters(
    stock: Callable[..., nn.Module], model: nn.Module, adapter_path: str
) -> nn.Module:
    """``mlx_lm.utils.load_adapters``, but for adapters of the head itself."""
    check_adapter(model, Path(adapter_path))
    return stock(model, adapter_path)


def save_model(
    stock: Callable[..., None], save_path: str | Path, model: nn.Module, **kwargs: Any
) -> None:
    """``mlx_lm.utils.save_model``, but for models with a FlashHead."""
    if next(flash_heads(model), None) is not None:
        raise ValueError(
            "a model with a FlashHead cannot be saved as a plain one: load it with "
            "the dense head (MLX_FLASHHEAD=0)"
        )
    stock(save_path, model, **kwargs)


@contextlib.contextmanager
def refusing(folder: str | Path) -> Iterator[None]:
    """Context in which whatever a damaged converted folder makes mlx-lm or transformers
    raise becomes a FormatError of one line."""
    try:
        yield
    except FormatError:
        raise
    except Exception as e:
        with contextlib.suppress(FormatError):
            if not has_section(folder):
                raise e from e.__cause__
        reason = " ".join(str(e).split()) or type(e).__name__
        raise FormatError(
            f"{folder}: mlx-lm cannot load this model: {reason[:400]}"
        ) from e


def check_adapter(model: nn.Module, adapter: Path) -> None:
    """Raise ValueError for an adapter of the head, where that is a FlashHead: its rows
    are clustered as they are."""
    file = adapter / "adapters.safetensors"
    heads = [n for n, m in model.named_modules() if isinstance(m, FlashLinear)]
    for head in heads if file.exists() else ():
        tensors = cast(dict[str, mx.array], mx.load(str(file)))
        if any(name.startswith(f"{head}.") for name in tensors):
            raise ValueError(
                f"the adapter {adapter} changes the head {head}, whose clusters are "
                "fixed: fuse it with mlx_lm.fuse and convert the result, or load the "
                "model with the dense head (MLX_FLASHHEAD=0)"
            )
