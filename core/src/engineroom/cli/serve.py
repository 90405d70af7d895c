"""``engineroom serve`` and ``engineroom new-key``."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from engineroom.cli.flags import CONFIG_OPTION, OPTION_FLAG, RUNTIME_FLAG, flag
from engineroom.cli.output import CommandError, error_line, say, write
from engineroom.cli.parameters import parse_options
from engineroom.cli.resolve import (
    NO_DEPLOYMENT,
    deployment_or_none,
    registry_for,
    resolve,
    warn_of_quarantined,
)
from engineroom.cli.server_flags import settings_of, with_server_flags
from engineroom.cli.settings import Settings
from engineroom.errors import ConfigurationError
from engineroom.handlers.markers import hookimpl
from engineroom.models.manager import LLMModelManager
from engineroom.schemas import PrefixCacheScope
from engineroom.service import LLMInferenceService
from engineroom.status import PreloadProgress, ReloadReport
from engineroom.telemetry import LOGGER_NAME

__all__ = ["NEW_KEY_EPILOG", "SERVE_EPILOG", "new_key", "serve"]

SERVE_EPILOG: Final = """\b
Examples:
  engineroom serve --model ./model.gguf
  engineroom serve -c deployment.yaml --port 8080
  engineroom serve -c deployment.yaml --host 0.0.0.0 --keys keys.txt
  engineroom serve --model hf:owner/name --runtime vllm -o max_model_len=8192

\b
Then:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"model": "default", "messages": [{"role": "user", "content": "Hello"}]}'

\b
Environment:
  ENGINEROOM_API_KEYS    keys, separated by commas, beside those of --keys
  ENGINEROOM_ADMIN_KEYS  the same for --admin-keys
  ENGINEROOM_TLS_KEY_PASSWORD  opens the key of --tls-key

SIGTERM and Ctrl-C drain the server; with a second one, requests that run are told at once that
it ends. SIGHUP has it read the deployment file and the key files anew.
"""

NEW_KEY_EPILOG: Final = """\b
Example:
  engineroom new-key ann >> keys.txt
  engineroom new-key batch --priority -10 >> keys.txt
"""


@with_server_flags(
    {
        "insecure": ("keys", "admin_keys", "prefix_cache_scope"),
        "allowed_hosts": ("preload", "watch", "otel"),
    }
)
def serve(  # one parameter a flag: that is how typer is told of them
    ctx: typer.Context,
    model: Annotated[
        str | None,
        flag(
            "Serve this model only: one of the deployment, or a source. It is also called "
            "'default'.",
            "--model",
            "-m",
            metavar="MODEL",
        ),
    ] = None,
    config: Annotated[Path | None, CONFIG_OPTION] = None,
    runtime: Annotated[str | None, RUNTIME_FLAG] = None,
    option: Annotated[list[str] | None, OPTION_FLAG] = None,
    keys: Annotated[
        Path | None,
        flag("API keys, a NAME and a KEY a line; read anew at SIGHUP.", "--keys", metavar="FILE"),
    ] = None,
    admin_keys: Annotated[
        Path | None, flag("The same for the admin routes.", "--admin-keys", metavar="FILE")
    ] = None,
    prefix_cache_scope: Annotated[
        PrefixCacheScope | None,
        flag(
            "Who finds again what was computed of a prompt: requests of the same key, or all; of "
            "models that do not say so themselves.  [default: as the deployment says, else key]",
            "--prefix-cache-scope",
        ),
    ] = None,
    preload: Annotated[
        bool,
        typer.Option("--preload/--no-preload", help="Load the models at once.", show_default=True),
    ] = True,
    watch: Annotated[
        bool,
        flag("Read the deployment file anew when it changes, too; SIGHUP always does.", "--watch"),
    ] = False,
    otel: Annotated[
        bool, flag("Trace and measure with OpenTelemetry (OTEL_* variables).", "--otel")
    ] = False,
    **flags: Any,
) -> None:
    """Serve models over HTTP: OpenAI's API, Anthropic's messages, and engineroom's own.

    Serves all models of the deployment file, or --model. It listens on this machine only, unless
    --host says otherwise; then it wants keys. GET /openapi.json describes every route.
    """
    if model is None and (runtime is not None or option):
        raise CommandError("--runtime and --option say how to load --model; give that, too")
    if model is not None and watch:
        raise CommandError("--watch is for a whole deployment; leave --model out")
    _tell_crashes()
    from engineroom.server import KeyRing, ServerSettings, serve as run

    settings = ServerSettings(keys=KeyRing.read(keys, admin_keys), **settings_of(flags))
    manager = _manager(model, config, runtime, parse_options(option or []), prefix_cache_scope)
    service = LLMInferenceService(manager)
    options: Settings = ctx.obj
    if otel:
        service.registry.register_plugin(_observer(), name="opentelemetry")
    service.registry.register_plugin(_Reloads(), name="cli-reloads")
    errors = _Errors()
    if not options.logging:
        logging.getLogger(LOGGER_NAME).addHandler(errors)
    names = ", ".join(entry.model_id for entry in manager.config.models) or "no models"
    if options.sigterm.came:
        return
    try:
        run(
            service,
            settings,
            preload=preload,
            started=lambda url: say(f"engineroom serves {names} on {url} (Ctrl-C stops it)"),
            watch=watch,
            progress=_tell,
            stopped=lambda: options.sigterm.came,
        )
    finally:
        logging.getLogger(LOGGER_NAME).removeHandler(errors)


def new_key(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Whose key it is: letters, digits, . _ @ -")
    ],
    priority: Annotated[
        int | None,
        typer.Option(
            "--priority",
            help="Let its requests ask for so much, whatever --max-priority of the server says.",
            min=-100,
            max=100,
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Let it read the metrics of all keys.")
    ] = False,
) -> None:
    """Make a key. Its line for the key file goes to standard output, the key to standard error.

    The file holds a hash of the key only: the key is shown once.
    """
    from engineroom.server.keys import KeyRing, new_key as make

    key, hashed = make()
    KeyRing([(name, hashed)])  # is it a name?
    say(f"key of {name}: {key}")
    more = "" if priority is None else f" priority={priority}"
    write(f"{name} {hashed}{more}{' metrics=all' if metrics else ''}\n")


def _observer() -> Any:
    try:
        from engineroom.otel import OpenTelemetryObserver, configure
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"--otel needs {error.name}, which is not installed; pip install 'engineroom[otel]'"
        ) from error
    configure()
    return OpenTelemetryObserver()


def _tell_crashes() -> None:
    """Let a crash of native code say where it was: a mapped file that was truncated is one."""
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError):  # standard error is no file
            faulthandler.enable(sys.stderr)


def _manager(
    model: str | None,
    config: Path | None,
    runtime: str | None,
    options: dict[str, Any],
    prefix_cache_scope: PrefixCacheScope | None,
) -> LLMModelManager:
    if model is None:
        deployment = deployment_or_none(config)
        if deployment is None:
            raise ConfigurationError(f"--model was not given, and {NO_DEPLOYMENT}")
        registry = registry_for(deployment)
        warn_of_quarantined(registry)
        # From the file, and not from what was read: so it can be read anew.
        return LLMModelManager(
            config_path=config, registry=registry, prefix_cache_scope=prefix_cache_scope
        )
    target = resolve(model, config, runtime, options)
    warn_of_quarantined(target.registry)
    (entry,) = [
        configured
        for configured in target.deployment.models
        if target.model_id in (configured.model_id, *configured.aliases)
    ]
    names = [entry.model_id, *entry.aliases]
    if "default" not in names:
        entry = entry.model_copy(update={"aliases": [*entry.aliases, "default"]})
    if not entry.preload:
        entry = entry.model_copy(update={"preload": True})
    scope = prefix_cache_scope or target.deployment.prefix_cache_scope
    update = {"models": [entry], "prefix_cache_scope": scope}
    deployment = target.deployment.model_copy(update=update)
    return dataclasses.replace(target, deployment=deployment).manager()


def _tell(progress: PreloadProgress) -> None:
    """A line for each step of preloading."""
    place = f" ({progress.number} of {progress.total})" if progress.total > 1 else ""
    if progress.step == "loading":
        say(f"loading {progress.model_id}{place}")
    elif progress.step == "ready":
        say(f"{progress.model_id} is ready after {progress.seconds:.1f} s{place}")
    elif progress.step == "skipped":
        say(f"{progress.model_id} is loaded when it is asked for{place}: {progress.detail}")
    # What failed, the log says.


class _Reloads:
    """Says what a reload of the deployment changed, where the log does not."""

    @hookimpl
    def engineroom_deployment_reloaded(self, report: ReloadReport) -> None:
        """A line for each."""
        if not logging.getLogger(LOGGER_NAME).isEnabledFor(logging.INFO):
            say(f"the deployment was reloaded: {report}")


class _Errors(logging.Handler):
    """What goes wrong in a server nobody watches is said on standard error, a line each."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            message = f"{message} ({type(error).__name__}: {error})"
        error_line(message)
