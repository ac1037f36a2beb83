"""The demo: one prompt with the dense head and with FlashHead, side by side."""

from __future__ import annotations

from pathlib import Path

import click
import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler

from . import demo_model
from .cli import HELP, check_exists, flashhead_option, one_line_errors
from .compute.device import blas_hint
from .folder.section import Section, read_section
from .integration.exact import verification
from .integration.loading import find_flashhead
from .integration.locate import flash_heads
from .load import load

PROMPT = "The history of the steam engine begins"


@click.command(context_settings={"show_default": True, **HELP})
@click.option("--model", help="A converted folder.  [default: Gemma 3 270M from PyPI]")
@click.option("--prompt", default=PROMPT)
@click.option("--max-tokens", default=64)
@click.option(
    "--exact/--approximate",
    default=True,
    help="Whether the dense head verifies what FlashHead drafts.",
)
@flashhead_option
def main(
    model: str | None, prompt: str, max_tokens: int, exact: bool, flashhead: str | None
) -> None:
    """Continue a prompt with the dense head and with FlashHead."""
    if message := blas_hint():
        click.echo(message, err=True)
    with one_line_errors():
        check_exists("model", model)
        compare(model or demo_model.demo(), prompt, max_tokens, exact, flashhead)


def compare(
    folder: str | Path,
    prompt: str,
    max_tokens: int,
    exact: bool,
    flashhead: str | None = None,
) -> None:
    """Print what both heads of a converted folder, or of a model and a FlashHead that
    is given, make of a prompt, and how fast.

    Raises:
        ValueError: The folder has no FlashHead.
    """
    section = read_section(folder if flashhead is None else find_flashhead(flashhead))
    if section is None:
        raise ValueError(
            f"{folder} has no FlashHead; make one with mlx_flashhead.convert"
        )
    speeds, texts = [], []
    for dense in (True, False):
        loaded, tokenizer = load(folder, dense=dense, exact=exact, flashhead=flashhead)
        what = _describe(loaded, section, dense, exact)
        click.echo(f"\n{what}\n{'-' * len(what)}")
        # A first short run leaves compilation and first reads out of the timing.
        for _ in stream_generate(loaded, tokenizer, prompt, max_tokens=20):
            pass
        click.echo(prompt, nl=False)
        tokens = []
        with verification() as count:
            for response in stream_generate(
                loaded,
                tokenizer,
                prompt,
                max_tokens=max_tokens,
                sampler=make_sampler(0.0),
            ):
                click.echo(response.text, nl=False)
                tokens.append(response.token)
        speeds.append(response.generation_tps)
        texts.append(tokens)
        click.echo(f"\n[{speeds[-1]:.1f} tokens per second]")
    times = f"{speeds[1] / speeds[0]:.2f} times the dense head's speed"
    n = len(texts[0])
    same = next((i for i, (a, b) in enumerate(zip(*texts)) if a != b), n)
    click.echo(
        f"\nThe texts are the same, all {n} tokens, at {times}."
        if same == n == len(texts[1])
        else f"\nThe texts are the same up to token {same}, at {times}."
    )
    if exact and count.drafted:
        click.echo(
            f"{count.acceptance:.1%} of the drafted tokens stood; {count.waste:.1%} of "
            "the model's steps were thrown away."
        )
    if (measured := section.measured) and not exact:
        click.echo(
            f"Recall {100 * measured.recall:.2f} % and KL {measured.kl:.4f} nats on "
            f"{measured.held_out_tokens:,} held-out tokens, as measured when "
            "it was converted."
        )


def _describe(model: nn.Module, section: Section, dense: bool, exact: bool) -> str:
    if dense:
        return f"Dense head: reads all {section.vocab_size:,} rows"
    head = next(flash_heads(model))
    share = 100 * head.rows_read() / head.vocab_size
    if exact:
        return (
            f"FlashHead, exact: drafts with {share:.1f} % of the rows, and the dense "
            "head verifies"
        )
    return f"FlashHead, approximate: reads {share:.1f} % of the rows"


if __name__ == "__main__":
    main(prog_name="mlx_flashhead.demo")
