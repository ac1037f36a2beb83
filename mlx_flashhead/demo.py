"""The demo: one prompt with the dense head and with FlashHead, side by side."""

from __future__ import annotations

from pathlib import Path

import click
import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler

from . import demo_model
from .cli import one_line_errors
from .compute.device import blas_hint
from .folder.section import Section, read_section
from .integration.locate import flash_heads
from .load import load

PROMPT = "The history of the steam engine begins"


@click.command(context_settings={"show_default": True})
@click.option("--model", help="A converted folder.  [default: Gemma 3 270M from PyPI]")
@click.option("--prompt", default=PROMPT)
@click.option("--max-tokens", default=48)
def main(model: str | None, prompt: str, max_tokens: int) -> None:
    """Continue a prompt with the dense head and with FlashHead."""
    if message := blas_hint():
        click.echo(message, err=True)
    with one_line_errors():
        compare(model or demo_model.demo(), prompt, max_tokens)


def compare(folder: str | Path, prompt: str, max_tokens: int) -> None:
    """Print what both heads of a converted folder make of a prompt, and how fast.

    Raises:
        ValueError: The folder has no FlashHead.
    """
    section = read_section(folder)
    if section is None:
        raise ValueError(
            f"{folder} has no FlashHead; make one with mlx_flashhead.convert"
        )
    speeds = {}
    for name, dense in (("Dense head", True), ("FlashHead", False)):
        loaded, tokenizer = load(folder, dense=dense)
        what = f"{name}: {_describe(loaded, section, dense)}"
        click.echo(f"\n{what}\n{'-' * len(what)}\n{prompt}", nl=False)
        # A first short run leaves compilation and first reads out of the timing.
        for _ in stream_generate(loaded, tokenizer, prompt, max_tokens=2):
            pass
        for response in stream_generate(
            loaded, tokenizer, prompt, max_tokens=max_tokens, sampler=make_sampler(0.0)
        ):
            click.echo(response.text, nl=False)
        speeds[name] = response.generation_tps
        click.echo(f"\n[{speeds[name]:.1f} tokens per second]")
    dense_tps, flash_tps = speeds.values()
    click.echo(
        f"\nFlashHead ran at {flash_tps / dense_tps:.2f} times the dense head's speed."
    )
    if measured := section.measured:
        click.echo(
            f"Recall {100 * measured.recall:.2f} % and KL {measured.kl:.4f} nats on "
            f"{measured.held_out_tokens:,} held-out tokens, as measured when "
            f"{folder} was converted."
        )


def _describe(model: nn.Module, section: Section, dense: bool) -> str:
    if dense:
        return f"reads all {section.vocab_size:,} rows"
    head = next(flash_heads(model))
    share = 100 * head.rows_read() / head.vocab_size
    return f"reads {share:.1f} % of them, in {head.rows.bits} bits"


if __name__ == "__main__":
    main(prog_name="mlx_flashhead.demo")
