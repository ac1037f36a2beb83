"""``mlx_flashhead.convert``: the converter's command line."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click
from click.core import ParameterSource
from mlx_lm.convert import MODEL_CONVERSION_DTYPES

from mlx_flashhead.cli import HELP, one_line_errors
from mlx_flashhead.compute.device import blas_hint, disable_tf32

from .pipeline import GROUP_SIZES, HEAD_BITS, Q_MODES, ConvertError, convert
from .recipes import RECIPES
from .report import report_json
from .upgrade import upgrade as upgraded

_bits = click.Choice([str(b) for b in HEAD_BITS])
_groups = click.Choice([str(g) for g in GROUP_SIZES])


def _int(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else int(value)


@contextlib.contextmanager
def _leaving_clean() -> Iterator[None]:
    """On SIGTERM, leave as on an error: the unfinished folder goes along."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _upgrade(ctx: click.Context, folder: str, options: dict[str, Any]) -> str:
    """What ``--upgrade`` does, which takes few of the other options."""
    for param in ctx.command.params:
        source = ctx.get_parameter_source(str(param.name))
        given = source not in (None, ParameterSource.DEFAULT)
        if given and param.name not in ("upgrade", "sidecar", "overwrite"):
            raise ConvertError(f"--upgrade does not go with {param.opts[-1]}")
    return upgraded(folder, options["sidecar"], options["overwrite"])


@click.command(context_settings={"show_default": True, **HELP})
@click.option("--hf-path", "--model", help="Hugging Face id, or a local folder.")
@click.option("--gguf-path", help="A GGUF file: llama, gemma3, qwen2 or qwen3.")
@click.option("--mlx-path", help="Folder to make.  [default: mlx_model]")
@click.option(
    "--sidecar",
    help="Make the FlashHead alone, here: a folder, or a file.safetensors.",
)
@click.option(
    "--upgrade",
    help="Instead: a folder of an older format, to bring to the present one; with"
    " --sidecar, to take its FlashHead from.",
)
@click.option(
    "-q", "--quantize", is_flag=True, help="Quantize the body (not the head)."
)
@click.option("--q-group-size", type=int, help="Group size for quantization.")
@click.option("--q-bits", type=int, help="Bits per weight for quantization.")
@click.option(
    "--q-mode",
    default="affine",
    type=click.Choice(Q_MODES),
    help="The quantization mode.",
)
@click.option(
    "--dtype",
    type=click.Choice(MODEL_CONVERSION_DTYPES),
    help="Type of what is not quantized.  [default: the model's own]",
)
@click.option("--revision", help="Branch, tag or commit on the Hugging Face hub.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run code that the model brings."
)
@click.option(
    "--head-bits",
    type=_bits,
    callback=_int,
    help="Bits of the head's rows.  [default: 8, or those of a quantized head]",
)
@click.option(
    "--centroid-bits", type=_bits, callback=_int, default="4", help="Bits of centroids."
)
@click.option(
    "--group-size",
    type=_groups,
    callback=_int,
    help="Weights per scale in rows and centroids.  [default: 64, or 32 if it must"
    " and for a GGUF file's Q8_0]",
)
@click.option("--cluster-size", type=click.IntRange(2, 128), default=16)
@click.option(
    "--n-probes",
    type=click.IntRange(min=1),
    help="Clusters probed per token.  [default: n_clusters / 16]",
)
@click.option(
    "--calibration-data", help="Text file.  [default: one that ships with the package]"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Clustering seed.")
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="default")
@click.option(
    "--quick", is_flag=True, help="Look at a quarter: faster, and a little less exact."
)
@click.option(
    "--clusters",
    help="Published clusters: a folder or Hugging Face id with flash_head_assets."
    "  [default: cluster here]",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace a model at --mlx-path, at the end."
)
@click.option("--upload-repo", help="Hugging Face id to upload the result to.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def main(
    ctx: click.Context, /, as_json: bool, upgrade: str | None, **options: Any
) -> None:
    """Convert a model into an mlx-lm folder with a FlashHead, or make its FlashHead
    alone.

    \b
    mlx_flashhead.convert --hf-path google/gemma-3-1b-it
    mlx_flashhead.convert --gguf-path model.gguf --mlx-path my_model -q
    mlx_flashhead.convert --hf-path ORG/NAME --sidecar my_flashhead
    """
    with one_line_errors(), _leaving_clean():
        if upgrade is not None:
            click.echo(_upgrade(ctx, upgrade, options))
            return
        if message := blas_hint():
            click.echo(message, err=True)
        disable_tf32()
        report = convert(**options)
    click.echo(report_json(report) if as_json else str(report))
