"""The command line. Only click is imported until a command runs: `--help` must start at once."""

from __future__ import annotations

import importlib
import sys

import click

import onnxcompress

# command -> (module, one line for `--help`); the module holds a click command called `command`.
COMMANDS = {
    "compress": "run a recipe of passes over a model and save the result",
    "prune": "set the weights of least magnitude to zero",
    "quantize": "8-bit integers for weights and activations",
    "share": "a small codebook and packed codes for every weight",
    "distill": "heal a compressed model: train it to give the original's outputs",
    "train": "train a model on labels, from where it stands or from scratch",
    "validate": "compare a compressed model with its original",
    "verify": "prove from the file alone what its weights have become of the parent's",
    "diagnose": "which layer of a compressed model is to blame",
    "lint": "what a deployment target would refuse, run slowly or compute differently",
    "doctor": "what this machine can run, what is missing, and what mends it",
    "bench": "latency, throughput, load time and memory of models, side by side",
    "inspect": "what a model is, where its bytes are, what each pass could touch",
    "passes": "every installed pass, its parameters and defaults",
}


class _Lazy(click.Group):
    """Imports a command's module when it is called, not when it is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"onnxcompress.cli.{cmd_name}_command")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Commands: {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Lazy,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(onnxcompress.__version__, "-V", "--version", prog_name="onnxcompress")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Make an ONNX model smaller and faster, and prove that it is still right.

    \b
    onnxcompress inspect model.onnx
    onnxcompress compress model.onnx -o small.onnx
    onnxcompress validate model.onnx small.onnx --data eval.npz --metric accuracy --max-drop 0.01

    Exit status: 0 done (and within the budget, if one was given); 1 done, but not shown to hold; 2 bad input or usage,
    nothing written.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def _stand_in() -> None:
    """Put /dev/null where a caller closed a standard stream (`>&-`), and say so of stdout.

    Else the next file that is opened, a model perhaps, would become the stdout that ONNX Runtime writes to.
    """
    import os

    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None and not {"-q", "--quiet"} & set(sys.argv):
        click.echo("note: stdout is closed, so that what is found cannot be shown; --json FILE keeps it", err=True)


def main() -> None:
    """Entry point: a user's mistake is one line and exit status 2; an interrupt is 130."""
    _stand_in()
    try:
        code = group.main(prog_name="onnxcompress", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.ClickException as error:
        click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
    except MemoryError:
        click.echo("error: out of memory; close other programs or use a machine with more", err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that went away: the machine's, not a bug
        name = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {name}{error.strerror or error}", err=True)
        sys.exit(2)
    except Exception as error:
        from onnxcompress.errors import OnnxCompressError

        if not isinstance(error, OnnxCompressError):
            raise
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
