"""The ``engineroom`` command.

:func:`main` is the border to the shell: whatever happens inside ends as an exit status and, if
it went wrong, as ``error: …`` on standard error. The commands themselves are in
:mod:`engineroom.cli.app`, which is imported when a command runs, not when this package is. How
requests and models are treated is not decided here: the command only calls the library.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_OUTPUT_CLOSED",
    "EXIT_USAGE",
    "main",
]

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
"""128 and the number of SIGINT, as shells have it."""
EXIT_OUTPUT_CLOSED: Final = 141
"""128 and the number of SIGPIPE: whoever read the output went away (``| head``)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    :param argv: the arguments after the program's name; ``None``: the process's own.
    """
    from engineroom.border import words
    from engineroom.cli.output import (
        CommandError,
        OutputClosedError,
        error_line,
        prepare_streams,
    )
    from engineroom.cli.settings import Settings
    from engineroom.errors import EngineRoomError

    prepare_streams()
    settings = Settings()
    if "serve" in (sys.argv[1:] if argv is None else argv):
        settings.sigterm.note()
    try:
        return _run(argv, settings)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OutputClosedError:
        return EXIT_OUTPUT_CLOSED
    except CommandError as error:
        error_line(str(error))
        return error.status
    except EngineRoomError as error:
        settings.show_traceback()
        error_line(error)
    except SystemExit:
        raise  # the parser's own, after it has completed a word for a shell
    except BaseException as error:  # noqa: BLE001 - the last border; --debug shows all of it
        if not settings.show_traceback():
            error_line(
                f"{words(error)}; this is a defect of engineroom or of a plugin: "
                "run it again with `engineroom --debug …` and report what it prints"
            )
    finally:
        settings.stop_logging()
        settings.sigterm.forget()
    return EXIT_FAILED


def _run(argv: Sequence[str] | None, settings: object) -> int:
    """Parse and run; the parser's own exceptions become exit statuses here."""
    import typer

    from engineroom.cli.app import app
    from engineroom.cli.compat_typer import parser_error
    from engineroom.cli.output import write

    command = typer.main.get_command(app)
    try:
        status = command.main(
            args=None if argv is None else list(argv),
            prog_name="engineroom",
            standalone_mode=False,
            obj=settings,
        )
        return status if isinstance(status, int) else 0
    except typer.Abort:
        return EXIT_INTERRUPTED
    except parser_error() as error:
        return _refused(error)
    except OSError:
        write("")  # says so where it was the parser's own help that could not be written
        raise


def _refused(error: Exception) -> int:
    """One line for arguments that the parser does not take."""
    from engineroom.cli.compat_typer import help_alone, refusal
    from engineroom.cli.output import error_line, write

    if (help_text := help_alone(error)) is not None:
        write(help_text + "\n")
        return EXIT_USAGE
    text, path, status = refusal(error)
    error_line(f"{text}; `{path} --help` shows what it takes")
    return status


if __name__ == "__main__":
    sys.exit(main())
