"""What the commands share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from huggingface_hub import snapshot_download

from .folder.hub import from_hub


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into a one-line error."""
    try:
        yield
    except (ValueError, OSError, KeyError, RuntimeError, MemoryError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise click.ClickException(reason[:600]) from e


def check_exists(option: str, path: str | None, revision: str | None = None) -> None:
    """Raise ValueError for what is neither a model's folder on this machine, or an
    adapter's, nor a model of the hub."""
    if path is None:
        return
    flag = f"--{option.replace('_', '-')}"
    if Path(path).exists():
        if option != "adapter_path" and not Path(path, "config.json").exists():
            raise ValueError(
                f"{flag} {path} is no model folder: it has no config.json; name the "
                "folder that has it, or a Hugging Face id"
            )
        return
    if option == "adapter_path" or path.count("/") != 1 or path[0] in "./~":
        hint = "" if option == "adapter_path" else " and no Hugging Face id"
        raise ValueError(f"{flag} {path}: no such folder{hint}")
    if os.environ.get("MLXLM_USE_MODELSCOPE", "").lower() == "true":
        return  # mlx-lm asks another hub
    # All else is downloaded when the model is loaded.
    files = ["config.json"]
    download = partial(snapshot_download, path, revision=revision, allow_patterns=files)
    from_hub(flag, path, download)


def check_outputs(paths: Mapping[str, str | None]) -> None:
    """Raise ValueError now for what could not be written after minutes.

    Args:
        paths: The file of each flag that was given; that of ``--plot`` is a plot.
    """
    for flag, path in paths.items():
        if path is None:
            continue
        folder = Path(path).absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{flag} {path}: {folder} is no folder to write to")
        if Path(path).is_dir():
            raise ValueError(f"{flag} {path} is a folder; give a file's name")
    if (plot := paths.get("--plot")) is not None:
        _check_plot(plot)


def _check_plot(path: str) -> None:
    if find_spec("matplotlib") is None:
        raise ValueError(
            "--plot needs matplotlib: pip install matplotlib, or 'mlx-flashhead[plot]'"
        )
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot {path}: the name must end in .png, .svg or .pdf")


def write_whole(path: str, save: Callable[[Path], object]) -> None:
    """Write a file whole: ``save(other)`` makes it aside."""
    target = Path(path)
    aside = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        save(aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


class Listed(click.ParamType):  # type: ignore[type-arg]  # generic in new versions
    """Values with commas between them."""

    name = "a,b,..."

    def __init__(self, read: Callable[[str], Any]):
        self._read = read

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        if not isinstance(value, str):
            return value
        try:
            values = [self._read(word.strip()) for word in value.split(",")]
        except ValueError as e:
            self.fail(f"{value!r}: {e}", param, ctx)
        return tuple(dict.fromkeys(values))


# Settings of every command of ours.
HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}

flashhead_option = click.option(
    "--flashhead",
    help="A FlashHead of the model: its file, a folder or a Hugging Face id."
    "  [default: the folder's own]",
)
