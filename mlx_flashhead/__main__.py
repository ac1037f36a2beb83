"""``mlx_flashhead COMMAND``: the commands by their short names."""

from __future__ import annotations

from importlib.metadata import EntryPoint, distribution

import click

from . import __version__
from .cli import HELP


def _commands() -> dict[str, EntryPoint]:
    """The package's commands ``mlx_flashhead.NAME``, by name."""
    scripts = distribution("mlx-flashhead").entry_points.select(group="console_scripts")
    return {
        e.name.partition(".")[2]: e
        for e in sorted(scripts, key=lambda e: e.name)
        if e.name.startswith("mlx_flashhead.")
    }


class _Commands(click.Group):
    """Each is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_commands())

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        entry = _commands().get(name.removeprefix("mlx_flashhead."))
        if entry is None:
            names = ", ".join(_commands())
            raise click.UsageError(f"there is no command {name!r}; there are {names}")
        command: click.Command = entry.load()
        return command


main = _Commands(
    "mlx_flashhead",
    help="FlashHead for mlx-lm's models. Each command is also mlx_flashhead.COMMAND, "
    "and says with --help what it takes.",
    context_settings=HELP,
    subcommand_metavar="COMMAND [ARGS]...",
)
click.version_option(__version__, message="%(version)s")(main)

if __name__ == "__main__":
    main(prog_name="mlx_flashhead")
