"""``mlx_flashhead.generate``: mlx-lm's ``generate`` with FlashHead.

The options are mlx-lm's own, read from the installed version's parser, and its
command does the work; what is added here is the FlashHead.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import click
from click.core import ParameterSource
from mlx_lm.generate import main as mlx_lm_main
from mlx_lm.generate import setup_arg_parser

from . import demo_model
from .cli import HELP, check_exists, one_line_errors
from .compute.device import blas_hint
from .integration.decode import acceptance
from .integration.patch import patched
from .run import OPTIONS


def options_of(parser: argparse.ArgumentParser) -> list[click.Option]:
    """An argparse parser's options as click options of the same names."""
    options = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or not action.option_strings:
            continue
        kind: dict[str, Any] = {"help": action.help, "default": None}
        if isinstance(action, argparse._StoreTrueAction):
            kind["is_flag"] = True
        elif action.nargs == "+":
            kind["multiple"] = True
            kind["help"] = f"{action.help} Repeat the option for several."
        elif action.choices:
            kind["type"] = click.Choice([str(c) for c in action.choices])
        elif action.type in (int, float):
            kind["type"] = action.type
        options.append(click.Option([*action.option_strings, action.dest], **kind))
    return options


def words_given(ctx: click.Context, params: list[click.Option]) -> list[str]:
    """The command line's words for those options that the user gave."""
    words: list[str] = []
    for param in params:
        if ctx.get_parameter_source(param.name) is not ParameterSource.COMMANDLINE:
            continue
        flag, value = max(param.opts, key=len), ctx.params[param.name]
        if param.is_flag:
            words.append(flag)
        elif param.multiple:
            words += [flag, *value]
        elif flag.startswith("--"):
            # One word, so that a value may start with a dash.
            words.append(f"{flag}={value}")
    return words


_mlx_lm_options = options_of(setup_arg_parser())
next(
    o for o in _mlx_lm_options if o.name == "model"
).help = "A converted folder, or a Hugging Face id.  [default: the demo model]"


@click.pass_context
def _run(ctx: click.Context, /, **params: Any) -> None:
    """Generate text with a converted model.

    Takes what mlx_lm.generate takes. Without --model, uses the demo model, Gemma 3
    270M, converted on first use.
    """
    if message := blas_hint():
        click.echo(message, err=True)
    with one_line_errors():
        argv = words_given(ctx, _mlx_lm_options)
        for option in ("model", "draft_model", "adapter_path"):
            check_exists(option, ctx.params.get(option))
        if (
            ctx.params.get("model") is None
            and ctx.params.get("prompt_cache_file") is None
        ):
            model, what = demo_model.default()
            click.echo(f"Model: {what}", err=True)
            argv.append(f"--model={model}")
        before = sys.argv
        sys.argv = ["mlx_flashhead.generate", *argv]
        try:
            options = {str(o.name): params[str(o.name)] for o in OPTIONS}
            with acceptance() as drafts, patched(**options):
                mlx_lm_main()
        finally:
            sys.argv = before
        if ctx.params.get("draft_model") is not None:
            click.echo(
                f"Draft tokens accepted: {drafts.accepted} of {drafts.proposed} "
                f"({drafts.rate:.0%})",
                err=True,
            )


main = click.Command(
    "mlx_flashhead.generate",
    callback=_run,
    help=_run.__doc__,
    context_settings=HELP,
    params=[*_mlx_lm_options, *OPTIONS],
)

if __name__ == "__main__":
    main(prog_name="mlx_flashhead.generate")
