"""Whether a converted folder, or a FlashHead's file, is whole and fits its model.

Two checks, of which the first costs nothing and comes before anything is allocated:

- *Sizes*: the headers of the weight files fit the files, no other file is larger than
  what it is for, and the config asks for no more layers or modules than the weights
  can fill.
- *Bytes*: the SHA-256 of every weight file is the one that the converter stored. It is
  computed once per state of a file and remembered (see ``cache.py``): after the
  first, loading costs what it costs without. Folders of versions 1 and 2 have the
  digest of the dense head only, and that is compared. So it is where a FlashHead is
  used with a model that does not lie in its folder.

Both tell damage and change, not malice: who can write the folder can write the digests.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from safetensors import SafetensorError, safe_open

from ..compute.table import Table
from .cache import file_sha256, remembered
from .format import check_shape, read_tensors, table_sha256, tensors_sha256
from .section import HEAD_FILE, FormatError, Section, head_file, read_config, unique

# As mlx-lm finds them.
_WEIGHTS = "model*.safetensors"
# What loaders read whole: configs, tokenizers, chat templates.
_TEXTS = {".json", ".jsonl", ".jinja", ".txt", ".model", ".tiktoken"}
_MAX_TEXT = 1 << 27
# Those of safetensors that MLX has.
_DTYPES = {
    "BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U16", "I16", "F16", "BF16",
    "U32", "I32", "F32", "U64", "I64", "F64", "C64",
}  # fmt: skip
# Under these names, configs say for how many layers a model is to be built.
_LAYER_COUNTS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks"}
_DENSE = "or load it with the dense head (MLX_FLASHHEAD=0)"


def weight_files(folder: Path) -> list[Path]:
    """The files of the plain model, as mlx-lm finds them."""
    return sorted(folder.glob(_WEIGHTS))


def check_sizes(folder: str | Path, head: bool = True) -> int:
    """Check a model's folder before any of it is loaded.

    Args:
        head: Whether the FlashHead's file is checked, too.

    Returns:
        Number of tensors that the plain model's files hold.

    Raises:
        FormatError: A file is damaged or far too large, or the config asks for what the
          files do not hold or for a file elsewhere.
    """
    folder = Path(folder)
    for file in sorted(folder.iterdir()):
        if file.suffix in _TEXTS and _size(file) > _MAX_TEXT:
            raise FormatError(f"{file} is too large for what it is; get it again")
    config = read_config(folder)
    model_file = config.get("model_file")
    if model_file is not None and not _inside(folder, model_file):
        raise FormatError(
            f"{folder}: model_file {model_file!r:.80} is not in the folder"
        )
    weights = weight_files(folder)
    n_tensors = sum(map(check_safetensors, weights))
    if head and (folder / HEAD_FILE).exists():
        check_safetensors(folder / HEAD_FILE)
    # Where there are none, mlx-lm says so.
    for key, value in _items(config) if weights else ():
        if key not in _LAYER_COUNTS or not isinstance(value, (int, float)):
            continue
        if value > n_tensors:
            raise FormatError(
                f"{folder}: config.json asks for {key} = {value!r:.20}, the files hold "
                f"{n_tensors} tensors; get or convert the model again"
            )
    return n_tensors


@contextlib.contextmanager
def bounded(folder: str | Path, n_tensors: int) -> Iterator[None]:
    """Refuse, while a model is built, far more modules than there are tensors for them:
    configs ask for layers, experts or branches under many names, and each takes memory
    before a weight is looked at.

    Raises:
        FormatError: There are.
    """
    # Models have up to two modules a tensor.
    limit: float = 1000 + 10 * n_tensors
    count = 0
    init, thread = nn.Module.__init__, threading.get_ident()

    def counted(self: nn.Module) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > limit:
            raise FormatError(
                f"{folder}: config.json asks for more than {limit} modules, the files "
                f"hold {n_tensors} tensors; get or convert the model again"
            )
        init(self)

    nn.Module.__init__ = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__init__ = init  # type: ignore[method-assign]
        limit = math.inf


def _size(file: Path) -> int:
    """Bytes of a file.

    Raises:
        FormatError: It is none, such as a folder or a device, or cannot be read.
    """
    try:
        state = file.stat()
    except OSError as e:
        raise FormatError(f"{file} cannot be read: {e.strerror}") from None
    if not stat.S_ISREG(state.st_mode):
        raise FormatError(f"{file} is not a file; get it again")
    return state.st_size


def _inside(folder: Path, name: Any) -> bool:
    """Whether a path stays in the folder by its words; links are the owner's."""
    if not isinstance(name, str) or os.path.isabs(name) or "\x00" in name:
        return False
    return not os.path.normpath(name).startswith("..")


def _items(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries of a config, and of the objects in it."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from value.items()


def check_safetensors(file: Path) -> int:
    """Number of tensors in a safetensors file whose header fits the file.

    The ``safetensors`` library says whether it does, without reading a weight: that the
    header is no longer than the file, and that the tensors fill the rest, one after the
    other. Left to say is what MLX would read in another way than the library.

    Raises:
        FormatError: It does not, or the file cannot be read.
    """
    _size(file)
    try:
        with safe_open(file, "numpy"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length), object_pairs_hook=unique)
    except OSError as e:
        reason = e.strerror or " ".join(str(e).split())
        raise FormatError(f"{file} cannot be read: {reason}") from None
    except (SafetensorError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise FormatError(
            f"{file} is damaged, cut off or no safetensors file ({reason}); get or "
            "convert it again"
        ) from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES or not _fits_mlx(entry["shape"]):
            raise FormatError(
                f"{file}: MLX has no arrays as {name!r:.60}, of type {entry['dtype']} "
                f"and shape {entry['shape']!r:.80}; get or convert it again"
            )
    return len(header)


def _fits_mlx(shape: list[int]) -> bool:
    # A factor of zero hides others that overflow MLX's 32 bits.
    return len(shape) <= 16 and max(shape, default=0) <= 2**31 - 1


def check_unchanged(
    where: str | Path,
    section: Section,
    table: Table,
    model_folder: str | Path | None = None,
) -> None:
    """Check that a FlashHead is as the converter wrote it, and for this model.

    Args:
        where: The FlashHead's file or folder.
        section: Its section.
        table: The dense head as the plain model has it, lazy.
        model_folder: Where the model lies, if that is known.

    Raises:
        FormatError: The model is another one, was fine-tuned, quantized or updated
          since, or a file is damaged. The message names it.
    """
    where = Path(where)
    check_shape(where, section, table)
    in_place = model_folder is not None and Path(model_folder) == where
    if in_place and section.format_version < 3:
        digest = section.head_sha256
        if digest is not None and digest != remembered(
            weight_files(where), "head_sha256", lambda: table_sha256(table)
        ):
            raise FormatError(_changed(where, section.head_path))
        return
    if section.format_version >= 3 and not section.intact:
        source = where / "config.json" if section.files else head_file(where)
        raise FormatError(
            f"{source}: the 'flashhead' section was edited or damaged; "
            "convert the model again (for another number of probes, load it with "
            "n_probes or --n-probes)"
        )
    if in_place and (section.files or section.format_version < 4):
        _check_folder(where, section)
        return
    file = head_file(where)
    if section.format_version >= 3 and not _is_whole(file, section):
        raise FormatError(
            f"{file} is damaged: its tensors are not those that its section names; get "
            f"or convert it again, {_DENSE}"
        )
    digest = section.head_sha256
    if digest is None or digest not in _digests(table, model_folder):
        raise FormatError(
            f"{file}: this FlashHead is not of {model_folder or 'this model'}, but of "
            "another model, revision or quantization: the rows of the head are others; "
            "make its own: mlx_flashhead.convert --hf-path MODEL --sidecar PATH"
        )


def _is_whole(file: Path, section: Section) -> bool:
    """Whether the tensors of a FlashHead's file are those that were written."""
    if section.files:
        return section.files.get(HEAD_FILE) == file_sha256(file)
    return section.tensors_sha256 == remembered(
        [file], "tensors_sha256", lambda: tensors_sha256(read_tensors(file, section))
    )


def _digests(table: Table, model_folder: str | Path | None) -> Iterator[str]:
    """Digests by which a head's rows may be known, computed as they are asked for."""
    files = [] if model_folder is None else weight_files(Path(model_folder))
    if files:
        yield remembered(files, "head_sha256", lambda: table_sha256(table))
        return
    yield table_sha256(table)
    # On a CPU models in memory may have been cast to float32, which loses nothing.
    for dtype in (mx.bfloat16, mx.float16) if table.dtype == mx.float32 else ():
        yield table_sha256(table.map(partial(_cast, dtype=dtype)))


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    floating = mx.issubdtype(array.dtype, mx.floating)
    return array.astype(dtype) if floating else array


def _check_folder(folder: Path, section: Section) -> None:
    """That a converted folder's weight files are those that its config names."""
    expected = section.files
    if HEAD_FILE not in expected:
        raise FormatError(
            f"{folder}/config.json does not list the weight files; convert again"
        )
    names = [file.name for file in weight_files(folder)]
    if odd := sorted(set(names) ^ (expected.keys() - {HEAD_FILE})):
        raise FormatError(_changed(folder, odd[0]))
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_sha256, (folder / name for name in expected))
    for (name, digest), actual in zip(expected.items(), digests, strict=True):
        if digest == actual:
            continue
        if name == HEAD_FILE:
            raise FormatError(
                f"{folder / name} is damaged or belongs to another model: its SHA-256 "
                f"is not the stored one; convert the model again, {_DENSE}"
            )
        raise FormatError(_changed(folder, name))


def _changed(folder: Path, what: str) -> str:
    return (
        f"{folder}: {what} is not what was converted: the model was fine-tuned, "
        "quantized, updated or damaged since; delete flashhead.safetensors and convert "
        f"it again, {_DENSE}"
    )


def check_finite(where: str | Path, tensors: Mapping[str, mx.array]) -> None:
    """Check that tensors of a FlashHead's file have no NaN and no infinity, once per
    file and choice of tensors.

    Raises:
        FormatError: One has; the message names it.
    """
    file = head_file(where)

    def compute() -> str:
        for name, array in tensors.items():
            floating = mx.issubdtype(array.dtype, mx.floating)
            if floating and not mx.isfinite(array).all().item():
                return name
        return ""

    what = "not_finite" if "rows.weight" in tensors else "not_finite_but_rows"
    if name := remembered([file], what, compute):
        raise FormatError(
            f"{file}: {name} has NaN or infinite values; convert the model again"
        )
