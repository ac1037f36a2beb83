"""``mlx_flashhead.evaluate``: how faithful FlashHead and dense quantized heads are.

:mod:`mlx_flashhead.evaluation.evaluate` says what the figures are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .cli import (
    HELP,
    Listed,
    check_exists,
    check_outputs,
    flashhead_option,
    one_line_errors,
    write_whole,
)
from .compute.device import blas_hint, disable_tf32
from .evaluation.evaluate import MAX_TOKENS, TOKENS, evaluate, read_prompts
from .evaluation.report import plot, table


@click.command(context_settings={"show_default": True, **HELP})
@click.option("--model", "folder", required=True, help="A converted folder.")
@click.option("--text", "texts", multiple=True, required=True, help="A text file.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=TOKENS,
    help="Tokens of each text, at most.",
)
@click.option(
    "--reference",
    help="Where the unquantized head is: a Hugging Face id, a folder or a GGUF file."
    "  [default: the folder's own dense head]",
)
@click.option(
    "--n-probes",
    type=Listed(int),
    help="Numbers of probes beside the stored one.  [default: 1/4 to 4 times it]",
)
@click.option(
    "--generate", "prompts_path", help='Continue prompts: JSON lines with "prompt".'
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=MAX_TOKENS,
    help="Longest continuation.",
)
@click.option(
    "--exact/--approximate",
    default=True,
    help="Whether exact decoding is among what is compared.",
)
@click.option(
    "--verify-every",
    type=click.IntRange(min=1),
    help="Tokens that it verifies at once.  [default: the converted number]",
)
@flashhead_option
@click.option("--json", "json_path", help="Write the figures here, too.")
@click.option("--plot", "plot_path", help="Draw recall and KL against bytes here.")
def main(
    folder: str,
    texts: tuple[str, ...],
    prompts_path: str | None,
    json_path: str | None,
    plot_path: str | None,
    **options: Any,
) -> None:
    """Compare FlashHead and dense quantized heads with the unquantized head.

    \b
    mlx_flashhead.evaluate --model FOLDER --text a.txt --text b.txt
    """
    if message := blas_hint():
        click.echo(message, err=True)
    disable_tf32()
    with one_line_errors():
        check_exists("model", folder)
        check_outputs({"--json": json_path, "--plot": plot_path})
        prompts = [] if prompts_path is None else read_prompts(prompts_path)
        result = evaluate(folder, texts, prompts=prompts, **options)
        click.echo(table(result))
        if json_path:
            text = json.dumps(result, indent=2) + "\n"
            write_whole(json_path, lambda p: p.write_text(text, encoding="utf-8"))
        if plot_path:
            write_whole(plot_path, lambda p: plot(result, p, Path(folder).name))


if __name__ == "__main__":
    main(prog_name="mlx_flashhead.evaluate")
