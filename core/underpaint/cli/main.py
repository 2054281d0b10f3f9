"""The ``underpaint`` command: its groups, the plugin switches, and how errors end."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import warnings
from typing import Any

import click

import underpaint
from underpaint.errors import UnderpaintError, suggest

__all__ = ["main", "run"]

# Help lines stand here, so that `underpaint --help` imports no command.
_COMMANDS = {
    "quickstart": (
        "underpaint.cli.train:quickstart",
        "Run the main job end to end: on rendered scenes, or your images.",
    ),
    "train": ("underpaint.cli.train:train", "Run a recipe, or a part of it. Resumes by itself."),
    "encode": ("underpaint.cli.models:encode", "Encode a data set into a latent cache."),
    "reconstruct": ("underpaint.cli.models:reconstruct", "Encode and decode images, and measure the difference."),
    "sample": ("underpaint.cli.models:sample", "Draw images from a generator."),
    "evaluate": ("underpaint.cli.models:evaluate", "Measure a tokenizer or a generator."),
    "report": ("underpaint.cli.models:report", "Write the HTML report of a run folder again."),
    "bench": ("underpaint.cli.bench:bench", "Run a matrix of recipes, and compare them in one report."),
    "import": ("underpaint.cli.importing:import_", "Read published weights of other projects."),
    "recipes": ("underpaint.cli.recipes:recipes", "List and show the recipes that plugins ship."),
    "plugins": ("underpaint.cli.plugins:plugins_group", "List, show, check and create plugins."),
    "doctor": ("underpaint.cli.doctor:doctor", "Say what works on this machine."),
}

_INTERRUPTED = "Interrupted. What was committed before is intact; the same command goes on from there."


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"There is no command '{args[0]}'. {suggest(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(underpaint.__version__, prog_name="underpaint")
@click.option("-p", "--plugin", multiple=True, metavar="FILE|MODULE", help="Load a plugin from a .py file or module.")
@click.option("--no-plugin", multiple=True, metavar="NAME", help="Leave a plugin out; NAME@DISTRIBUTION if ambiguous.")
@click.option("--only-plugins", metavar="NAMES", help="Load only these plugins, separated by commas; '' for none.")
@click.option("--strict-plugins", is_flag=True, help="Make every plugin failure fatal.")
# The DeepSpeed launcher puts it before the command; the same number is in the environment, where `Ranks` reads it.
@click.option("--local_rank", type=int, hidden=True, expose_value=False)
def main(plugin: tuple[str, ...], no_plugin: tuple[str, ...], only_plugins: str | None, strict_plugins: bool) -> None:
    """Turn pretrained vision encoders into image tokenizers, and train latent diffusion on them.

    Start with: underpaint quickstart
    """
    # The environment is the one place where switches live, so that worker processes and ranks agree.
    _extend("UNDERPAINT_LOAD_PLUGINS", plugin)
    _extend("UNDERPAINT_NO_PLUGINS", no_plugin)
    if only_plugins is not None:
        os.environ["UNDERPAINT_PLUGINS"] = only_plugins
    if strict_plugins:
        os.environ["UNDERPAINT_STRICT_PLUGINS"] = "1"


def _extend(variable: str, values: tuple[str, ...]) -> None:
    if values:
        present = [part for part in os.environ.get(variable, "").split(",") if part]
        os.environ[variable] = ",".join([*present, *values])


def run() -> None:
    """Run the command line and exit: 0 done, 1 a check failed, 2 a mistake to mend, 128+n on a signal."""
    warnings.showwarning = _show_warning
    try:
        code = main(standalone_mode=False, prog_name="underpaint")
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except UnderpaintError as error:
        _say(str(error))
        code = 2
    except (KeyboardInterrupt, click.Abort):
        _say(_INTERRUPTED)
        code = 128 + signal.SIGINT
    except SystemExit as stop:
        # Of a second signal, which does not wait for the checkpoint of the first.
        if isinstance(stop.code, int) and stop.code > 128:
            _say(_INTERRUPTED)
        raise
    except BrokenPipeError:
        # The reader of our output has left, as in `underpaint plugins list | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" '{error.filename}'" if error.filename is not None else ""
        _say(f"The system refused{where}: {error.strerror or error}. What was committed before is intact.")
        code = 2
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        said = (str(error).splitlines() or ["Python could not allocate an object"])[0].rstrip(".")
        _say(
            f"Memory ran out: {said}. What was committed before is intact; train with a higher engine.accumulation, "
            "which the same command goes on with, or sample and measure in smaller batches."
        )
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _is_memory(error: Exception) -> bool:
    # By what they say: torch has an error of its own for GPUs alone, and this module does not import torch.
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )


def _say(message: str) -> None:
    click.echo(f"Error: {message}", err=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    click.echo(f"{category.__name__}: {message}", err=True)
