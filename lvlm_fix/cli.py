"""The command line. Every command prints results on stdout and nothing else there; errors are one sentence."""

from __future__ import annotations

import os
import sys
import warnings

import typer

from lvlm_fix.commands import bench, build, demo, describe, diagnose, evaluate, methods, report, score, tune

app = typer.Typer(
    name="lvlm-fix",
    help="Make vision-language models hallucinate less and run faster, with no training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # or "[default: ...]" in a help text would be taken for markup and not be shown
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)
app.command("describe")(describe.describe)
app.command("diagnose")(diagnose.diagnose)
app.command("methods")(methods.methods)
app.command("report")(report.report)
app.add_typer(score.app, name="score")
app.add_typer(build.app, name="build")
app.add_typer(evaluate.app, name="eval")
app.command("tune")(tune.tune)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        from lvlm_fix import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: what a user can cause is told in one line, with exit code 1."""
    warnings.formatwarning = _one_line_warning  # type: ignore[assignment]
    try:
        app(prog_name="lvlm-fix")
    except KeyboardInterrupt:
        print("lvlm-fix: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        raise SystemExit(1) from None
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        if os.environ.get("LVLM_FIX_DEBUG"):
            raise
        print(f"lvlm-fix: {_sentence(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def _one_line_warning(message: Warning | str, *where: object) -> str:
    """Warnings without the source line that raised them."""
    return f"lvlm-fix: {message}\n"


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno and error.filename:  # raised by Python, not by us
        if isinstance(error, FileNotFoundError):
            return f"there is no file {error.filename}: check the path"
        return f"cannot use {error.filename}: {(error.strerror or 'unknown reason').lower()}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()
