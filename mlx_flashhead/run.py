"""``python -m mlx_flashhead.run mlx_lm.SOMETHING ...``: any command of mlx-lm or
mlx-vlm, patched."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import click

from .cli import check_exists, one_line_errors
from .compute.device import blas_hint
from .integration.patch import patched

# Of every command that loads a converted model.
OPTIONS = [
    click.Option(
        ["--n-probes"],
        type=click.IntRange(min=1),
        help="Clusters probed per token; fewer are faster, and where decoding is "
        "approximate less faithful."
        "  [default: the converted number]",
    ),
    click.Option(["--dense"], is_flag=True, help="Use the dense head."),
    click.Option(
        ["--exact/--approximate"],
        default=True,
        help="Whether the dense head verifies what FlashHead drafts: the tokens are "
        "then the model's own.  [default: exact]",
    ),
    click.Option(
        ["--verify-every"],
        type=click.IntRange(min=1),
        help="Tokens that --exact verifies at once.  [default: the converted number]",
    ),
    click.Option(
        ["--tune/--no-tune"],
        default=True,
        help="Whether to measure the head when it is first used, and to decode as is "
        "fastest here.  [default: tune]",
    ),
    click.Option(
        ["--flashhead"],
        help="A FlashHead of the model: its file, a folder or a Hugging Face id."
        "  [default: the one in the model's folder]",
    ),
]


def run(module: str, argv: list[str], **options: Any) -> None:
    """Call ``main()`` of a module of mlx-lm or mlx-vlm with these arguments, the patch
    on.

    Imported, not run as a script: a script's functions would be copies of those that
    the patch replaces.

    Raises:
        ValueError: There is no such command, it lacks a package, or the model that it
          is given is no folder of one.
    """
    main, package = None, module.split(".")[0]
    if package == "mlx_vlm" and find_spec(package) is None:
        raise ValueError(f"{module} needs pip install 'mlx-flashhead[vlm]'")
    if package in ("mlx_lm", "mlx_vlm"):
        try:
            main = getattr(importlib.import_module(module), "main", None)
        except ModuleNotFoundError as e:
            if not (e.name or "").startswith(package):
                raise ValueError(f"{module} needs a package: {e}") from None
    if main is None:
        raise ValueError(
            f"{module} is no command of mlx-lm or mlx-vlm; try mlx_lm.generate"
        )
    _check_models(argv)
    before = sys.argv
    sys.argv = [module, *argv]
    try:
        with patched(**options):
            main()
    except ModuleNotFoundError as e:  # some are asked for only when they are needed
        raise ValueError(f"{module} needs a package: {e}") from None
    finally:
        sys.argv = before


def _check_models(argv: list[str]) -> None:
    """Check the models that arguments name. mlx-lm's server would open its own in a
    thread, and go on without it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("model", "draft-model", "revision"):
        parser.add_argument(f"--{option}", nargs="?")
    given = parser.parse_known_args(argv)[0]
    check_exists("model", given.model, given.revision)
    check_exists("draft_model", given.draft_model)


def command(
    name: str,
    module: str | None,
    text: str,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> click.Command:
    """A command that hands its arguments to an mlx-lm module, or to the one that its
    first argument names, which runs in the context ``around()``."""

    @click.pass_context
    def callback(ctx: click.Context, /, words: tuple[str, ...], **options: Any) -> None:
        target, *argv = words if module is None else (module, *words)
        if module is not None and {"-h", "--help"} & set(words):
            click.echo(f"{ctx.get_help()}\n\n{module} takes:\n")
            argv = ["--help"]
        if not {"-h", "--help"} & set(argv) and (message := blas_hint()):
            click.echo(message, err=True)
        with one_line_errors(), around():
            run(target, argv, **options)

    return click.Command(
        name,
        callback=callback,
        help=text,
        # Theirs are not known here.
        context_settings={
            "ignore_unknown_options": True,
            "allow_interspersed_args": module is not None,
            "help_option_names": [] if module else ["-h", "--help"],
        },
        params=[
            *OPTIONS,
            click.Argument(
                ["words"],
                nargs=-1,
                required=module is None,
                type=click.UNPROCESSED,
                metavar="[OPTIONS OF MLX-LM]..."
                if module
                else "mlx_lm.COMMAND|mlx_vlm.COMMAND [ARGS]...",
            ),
        ],
    )


main = command(
    "mlx_flashhead.run",
    None,
    "Run any command of mlx-lm or mlx-vlm with FlashHead: what follows is its name and "
    "its own arguments, as in mlx_lm.chat --model FOLDER.",
)

if __name__ == "__main__":
    main(prog_name="mlx_flashhead.run")
