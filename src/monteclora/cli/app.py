"""The verbs, and how everything that goes wrong ends: one line on standard error, and an exit status."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App, CycloptsError, Parameter

from monteclora.cli import (
    calibrate,
    check,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    harness,
    importing,
    listing,
    new,
    predict,
    push,
    recipes,
    report,
    study,
    train,
)
from monteclora.cli.overrides import RECIPE_USAGE
from monteclora.errors import MonteCLoRAError
from monteclora.system.version import VERSION

__all__ = ["app", "main"]

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

app = App(
    name="monteclora",
    help="Bayesian low-rank adaptation of language models: fine-tune, predict, and know what the model does not know.",
    help_epilogue="Results go to standard output, progress and log to standard error. --debug shows the traceback "
    "of an error. Start with monteclora demo.",
    version=VERSION,
    version_flags=["--version"],
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)
app.command(demo.demo)
app.command(recipes.app)
app.command(new.new)
app.command(check.check, usage=f"Usage: monteclora check {RECIPE_USAGE}")
app.command(train.train, usage=f"Usage: monteclora train {RECIPE_USAGE}")
app.command(evaluate.evaluate)
app.command(study.study)
app.command(predict.predict)
app.command(generate.generate)
app.command(harness.harness)
app.command(calibrate.calibrate)
app.command(report.report)
app.command(export.export)
app.command(importing.import_adapter, name="import")
app.command(push.push)
app.command(listing.app)
app.command(doctor.doctor)


app.register_install_completion_command(help="Complete commands and options in this shell; a new shell has it.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: by default those of the process.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong usage or input, 3 diverged, 130 interrupted.
    """
    words = _at_home(sys.argv[1:] if arguments is None else arguments)
    _write_anything()
    debug = "--debug" in words
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at import that 4-bit layers could be faster
    try:
        words = [word for word in words if word != "--debug"]
        if words[:1] in (["train"], ["check"]) and not {"--help", "-h"}.isdisjoint(words):
            return _help_with_keys(words)
        status = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return status if isinstance(status, int) else DONE
    except BrokenPipeError:
        # the reader of the results, such as `head`, has enough; Python would complain when it closes them at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            import traceback

            traceback.print_exc()
        return _tell(error, keep_traceback=not debug)


def _at_home(words: Sequence[str]) -> list[str]:
    """Paths in ``~``, also those that shells leave as they are, as in ``--out=~/x``; texts stay."""
    found = []
    for before, word in zip(("", *words), words, strict=False):
        option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        is_path = value.startswith("~/") and "--text" not in (before, option)
        found.append(f"{option}{equals}{os.path.expanduser(value)}" if is_path else word)
    return found


def _write_anything() -> None:
    """Have streams escape what their encoding does not have, in place of failing when the work is done."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="backslashreplace")


def _help_with_keys(words: Sequence[str]) -> int:
    from monteclora.cli.recipes import key_lines

    app(words, exit_on_error=False, print_error=False, result_action="return_value")
    print("\nKeys of a recipe, to be given as --KEY VALUE (monteclora recipes keys explains them):\n")
    print("\n".join(key_lines()))
    return DONE


def _tell(error: BaseException, keep_traceback: bool) -> int:
    """Say what went wrong in one line; gives the exit status."""
    if isinstance(error, KeyboardInterrupt):
        _line(f"interrupted: {error}" if str(error) else "interrupted")
        return INTERRUPTED
    if isinstance(error, CycloptsError):
        verb = " ".join(error.command_chain or ())
        _line(f"error: {error} See `{' '.join(['monteclora', verb]).strip()} --help`.")
        return WRONG_USAGE
    if isinstance(error, MonteCLoRAError):
        _line(f"error: {error}")
        return error.exit_code
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        _line(f"error: {where}{error.strerror}")
        return FAILED
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for its name alone
        _line("error: the device is out of memory. Lower training.micro_batch_size or training.eval_batch_size.")
        return FAILED
    what = f"error: unexpected {type(error).__name__}: {error}"
    _line(f"{what} (the traceback is in {_write_traceback(error)})" if keep_traceback else what)
    return FAILED


def _line(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)


def _write_traceback(error: BaseException) -> Path:
    import tempfile
    import traceback

    handle, name = tempfile.mkstemp(prefix="monteclora-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    return Path(name)
