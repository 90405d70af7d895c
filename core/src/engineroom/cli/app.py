"""The command's tree. A new command is a module of its own, added here."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from engineroom.cli.chat import CHAT_EPILOG, chat
from engineroom.cli.conformance import CONFORMANCE_EPILOG, conformance
from engineroom.cli.doctor import DOCTOR_EPILOG, doctor
from engineroom.cli.models import models_app
from engineroom.cli.new_plugin import NEW_PLUGIN_EPILOG, new_plugin
from engineroom.cli.output import write
from engineroom.cli.plugins import PLUGINS_EPILOG, plugins
from engineroom.cli.run import RUN_EPILOG, run
from engineroom.cli.serve import NEW_KEY_EPILOG, SERVE_EPILOG, new_key, serve
from engineroom.cli.settings import LogLevel, Settings

__all__ = ["app"]

_EPILOG: Final = """\b
Examples:
  engineroom run ./model.gguf "Why is the sky blue?"
  engineroom serve --model ./model.gguf
  engineroom models --config deployment.yaml
  engineroom plugins --why ./model.gguf
  engineroom doctor

\b
Environment:
  ENGINEROOM_CONFIG             the deployment file
  ENGINEROOM_HANDLERS           handlers to use, in this order, separated by commas
  ENGINEROOM_DISABLED_HANDLERS  handlers never to use

\b
Exit status: 0 done, 1 it failed, 2 wrong arguments, 130 interrupted.
"""

# Plain help: it reads the same in a terminal, a pipe and a log.
app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)


def _show_version(value: bool) -> None:
    if value:
        from engineroom import __version__

        write(f"engineroom {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and the whole log on standard error.")
    ] = False,
    log_level: Annotated[
        LogLevel | None,
        typer.Option(
            "--log-level",
            help="Log to standard error from this level on.",
            case_sensitive=False,
            show_default=False,
        ),
    ] = None,
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """One LLM inference service in front of any runtime."""
    settings: Settings = ctx.obj
    if ctx.invoked_subcommand != "serve":
        settings.sigterm.forget()
    settings.debug = debug
    settings.log_level = log_level
    settings.start_logging()


app.command("run", epilog=RUN_EPILOG)(run)
app.command("chat", short_help="Talk with a model.", epilog=CHAT_EPILOG)(chat)
app.command("serve", short_help="Serve models over HTTP.", epilog=SERVE_EPILOG)(serve)
app.command("new-key", short_help="Make a key for a server.", epilog=NEW_KEY_EPILOG)(new_key)
app.add_typer(models_app, name="models", short_help="List, plan, load and unload models.")
app.command(
    "plugins", short_help="List the installed plugins, in their order.", epilog=PLUGINS_EPILOG
)(plugins)
app.command(
    "doctor", short_help="Look over the installation and the machine.", epilog=DOCTOR_EPILOG
)(doctor)
app.command(
    "new-plugin", short_help="Write a plugin package for a runtime.", epilog=NEW_PLUGIN_EPILOG
)(new_plugin)
app.command(
    "conformance", short_help="Check that a handler keeps the contract.", epilog=CONFORMANCE_EPILOG
)(conformance)
