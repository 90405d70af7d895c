"""``engineroom serve`` and ``engineroom new-key``."""

from __future__ import annotations

import dataclasses
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from engineroom.cli.output import CommandError, say, write
from engineroom.cli.parameters import parse_options
from engineroom.cli.resolve import (
    NO_DEPLOYMENT,
    deployment_or_none,
    registry_for,
    resolve,
    warn_of_quarantined,
)
from engineroom.cli.run import CONFIG_OPTION
from engineroom.cli.settings import Settings
from engineroom.errors import ConfigurationError
from engineroom.handlers.markers import hookimpl
from engineroom.models.manager import LLMModelManager
from engineroom.service import LLMInferenceService
from engineroom.status import PreloadProgress, ReloadReport
from engineroom.telemetry import LOGGER_NAME, LoggingObserver

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

SIGTERM and Ctrl-C drain the server; a second one ends it at once. SIGHUP has it read the
deployment file anew.
"""

NEW_KEY_EPILOG: Final = """\b
Example:
  engineroom new-key ann >> keys.txt
"""


class UnknownFields(StrEnum):
    """What to do about fields that an API does not know."""

    IGNORE = "ignore"
    REFUSE = "refuse"


def _flag(text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


def serve(  # one parameter a flag: that is how typer is told of them
    ctx: typer.Context,
    model: Annotated[
        str | None,
        _flag(
            "Serve this model only: one of the deployment, or a source. It is also called "
            "'default'.",
            "--model",
            "-m",
            metavar="MODEL",
        ),
    ] = None,
    config: Annotated[Path | None, CONFIG_OPTION] = None,
    runtime: Annotated[
        str | None, _flag("Load the source with this runtime.", "--runtime", metavar="NAME")
    ] = None,
    option: Annotated[
        list[str] | None,
        _flag(
            "An option of the runtime for a source; may be repeated.",
            "--option",
            "-o",
            metavar="KEY=VALUE",
        ),
    ] = None,
    host: Annotated[
        str | None,
        _flag("Listen on this address.  [default: 127.0.0.1]", "--host", metavar="ADDRESS"),
    ] = None,
    port: Annotated[
        int | None, _flag("Listen on this port; 0: a free one.  [default: 8000]", "--port")
    ] = None,
    insecure: Annotated[
        bool, _flag("Listen for others without keys: whoever reaches it may use it.", "--insecure")
    ] = False,
    keys: Annotated[
        Path | None, _flag("API keys, a NAME and a KEY a line.", "--keys", metavar="FILE")
    ] = None,
    admin_keys: Annotated[
        Path | None, _flag("The same for the admin routes.", "--admin-keys", metavar="FILE")
    ] = None,
    max_running: Annotated[
        int | None, _flag("Answer so many requests at a time; more wait.", "--max-running")
    ] = None,
    max_queued: Annotated[
        int | None,
        _flag("Let so many wait; more are refused.  [default: 256]", "--max-queued"),
    ] = None,
    key_max_running: Annotated[
        int | None, _flag("As --max-running, for each key.", "--key-max-running")
    ] = None,
    key_max_queued: Annotated[
        int | None, _flag("As --max-queued, for each key.", "--key-max-queued")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, _flag("Tokens, read and written, a minute.", "--tokens-per-minute")
    ] = None,
    key_tokens_per_minute: Annotated[
        int | None, _flag("The same for each key.", "--key-tokens-per-minute")
    ] = None,
    max_body: Annotated[
        int | None,
        _flag("Largest body of a request, in bytes.  [default: 4194304]", "--max-body"),
    ] = None,
    max_connections: Annotated[
        int | None, _flag("Connections at one time.  [default: 2048]", "--max-connections")
    ] = None,
    request_timeout: Annotated[
        float | None,
        _flag(
            "Give a request so long, waiting included.  [default: 600]",
            "--request-timeout",
            metavar="SECONDS",
        ),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        _flag(
            "Give running requests so long when the server stops.  [default: 30]",
            "--drain-timeout",
            metavar="SECONDS",
        ),
    ] = None,
    heartbeat: Annotated[
        float | None,
        _flag(
            "Send a comment on streams that are silent for so long; 0: never.  [default: 15]",
            "--heartbeat",
            metavar="SECONDS",
        ),
    ] = None,
    unknown_fields: Annotated[
        UnknownFields | None,
        _flag(
            "What to do about fields that an API does not know.  [default: ignore]",
            "--unknown-fields",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        _flag(
            "Let pages of this origin use the server; may be repeated.",
            "--cors-origin",
            metavar="ORIGIN",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        _flag(
            "A further name that the server is reached by; may be repeated.",
            "--allowed-host",
            metavar="NAME",
        ),
    ] = None,
    preload: Annotated[
        bool,
        typer.Option("--preload/--no-preload", help="Load the models at once.", show_default=True),
    ] = True,
    watch: Annotated[
        bool,
        _flag("Read the deployment file anew when it changes, too; SIGHUP always does.", "--watch"),
    ] = False,
    otel: Annotated[
        bool, _flag("Trace and measure with OpenTelemetry (OTEL_* variables).", "--otel")
    ] = False,
    log_prompts: Annotated[bool, _flag("Write prompts to the log.", "--log-prompts")] = False,
) -> None:
    """Serve models over HTTP: OpenAI's API, Anthropic's messages, and engineroom's own.

    Serves all models of the deployment file, or --model. It listens on this machine only, unless
    --host says otherwise; then it wants keys. GET /openapi.json describes every route.
    """
    if model is None and (runtime is not None or option):
        raise CommandError("--runtime and --option say how to load --model; give that, too")
    if model is not None and watch:
        raise CommandError("--watch is for a whole deployment; leave --model out")
    server = _server()
    settings = server.ServerSettings(
        **_given(
            host=host,
            port=port,
            max_running=max_running,
            max_queued=max_queued,
            key_max_running=key_max_running,
            key_max_queued=key_max_queued,
            tokens_per_minute=tokens_per_minute,
            key_tokens_per_minute=key_tokens_per_minute,
            max_body_bytes=max_body,
            max_connections=max_connections,
            request_timeout_s=request_timeout,
            drain_timeout_s=drain_timeout,
            heartbeat_s=heartbeat,
            unknown_fields=unknown_fields.value if unknown_fields is not None else None,
        ),
        insecure=insecure,
        keys=server.KeyRing.read(keys, admin_keys),
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        log_prompts=log_prompts,
    )
    manager = _manager(model, config, runtime, parse_options(option or []))
    service = LLMInferenceService(manager)
    told: Settings = ctx.obj
    if told.logging:
        service.registry.register_plugin(LoggingObserver(), name="cli-log")
    if otel:
        service.registry.register_plugin(_observer(), name="opentelemetry")
    service.registry.register_plugin(_Reloads(), name="cli-reloads")
    errors = _Errors()
    if not told.logging:
        logging.getLogger(LOGGER_NAME).addHandler(errors)
    names = ", ".join(entry.model_id for entry in manager.config.models) or "no models"
    try:
        server.serve(
            service,
            settings,
            preload=preload,
            started=lambda url: say(f"engineroom serves {names} on {url} (Ctrl-C stops it)"),
            watch=watch,
            progress=_tell,
        )
    finally:
        logging.getLogger(LOGGER_NAME).removeHandler(errors)


def new_key(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Whose key it is: letters, digits, . _ @ -")
    ],
) -> None:
    """Make a key. Its line for the key file goes to standard output, the key to standard error.

    The file holds a hash of the key only: the key is shown once.
    """
    keys = _server()
    from engineroom.server.keys import new_key as make

    key, hashed = make()
    keys.KeyRing([(name, hashed)])  # is it a name?
    say(f"key of {name}: {key}")
    write(f"{name} {hashed}\n")


def _server() -> Any:
    """The server's package, whole.

    :raises ConfigurationError: its extra is not installed.
    """
    from engineroom import server

    _ = server.serve, server.ServerSettings
    return server


def _observer() -> Any:
    try:
        from engineroom.otel import OpenTelemetryObserver, configure
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"--otel needs {error.name}, which is not installed; pip install 'engineroom[otel]'"
        ) from error
    configure()
    return OpenTelemetryObserver()


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _manager(
    model: str | None, config: Path | None, runtime: str | None, options: dict[str, Any]
) -> LLMModelManager:
    if model is None:
        deployment = deployment_or_none(config)
        if deployment is None:
            raise ConfigurationError(f"--model was not given, and {NO_DEPLOYMENT}")
        registry = registry_for(deployment)
        warn_of_quarantined(registry)
        # From the file, and not from what was read: so it can be read anew.
        return LLMModelManager(config_path=config, registry=registry)
    target = resolve(model, config, runtime, options)
    warn_of_quarantined(target.registry)
    (entry,) = [
        each
        for each in target.deployment.models
        if target.model_id in (each.model_id, *each.aliases)
    ]
    names = [entry.model_id, *entry.aliases]
    if "default" not in names:
        entry = entry.model_copy(update={"aliases": [*entry.aliases, "default"]})
    if not entry.preload:
        entry = entry.model_copy(update={"preload": True})
    deployment = target.deployment.model_copy(update={"models": [entry]})
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
    """Says what a reload of the deployment changed."""

    @hookimpl
    def engineroom_deployment_reloaded(self, report: ReloadReport) -> None:
        """A line for each."""
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
        print(f"error: {message}", file=sys.stderr, flush=True)
