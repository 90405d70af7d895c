"""A running server's model manager, over its admin routes."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Final

from engineroom.cli.output import CommandError
from engineroom.errors import EngineRoomError, ResourceNotAvailableError, error_class

__all__ = ["KEY_VARIABLE", "URL_VARIABLE", "RemoteManager"]

URL_VARIABLE: Final = "ENGINEROOM_URL"
KEY_VARIABLE: Final = "ENGINEROOM_ADMIN_KEY"
_DEFAULT_URL: Final = "http://127.0.0.1:8000"
_MOST_BYTES: Final = 16 << 20


class RemoteManager:
    """Asks a server.

    :param url: where it listens; ``None``: what ``ENGINEROOM_URL`` says, or port 8000 of this
        machine. An admin key is taken from ``ENGINEROOM_ADMIN_KEY``: others can read a command
        line.
    """

    def __init__(self, url: str | None = None) -> None:
        url = url or os.environ.get(URL_VARIABLE) or _DEFAULT_URL
        parsed = urllib.parse.urlsplit(url)
        if parsed.scheme not in ("http", "https") or not parsed.netloc:
            raise CommandError(f"--url {url!r} is no address; write http://host:port")
        self.url = url.rstrip("/").removesuffix("/v1")

    def models(self) -> list[dict[str, Any]]:
        """Every model and how it is."""
        models = self._ask("GET", "/v1/admin/models").get("models")
        return models if isinstance(models, list) else []

    def load(self, model_id: str) -> dict[str, Any]:
        """Load a model; returns when it is ready."""
        return self._ask("POST", f"/v1/admin/models/{urllib.parse.quote(model_id, safe='')}/load")

    def unload(self, model_id: str) -> dict[str, Any]:
        """Unload a model as soon as nobody holds it."""
        return self._ask("POST", f"/v1/admin/models/{urllib.parse.quote(model_id, safe='')}/unload")

    def plan(self) -> dict[str, Any]:
        """What would be loaded, where, and what would have to go."""
        return _part(self._ask("GET", "/v1/admin/plan"), "plan")

    def reload(self) -> dict[str, Any]:
        """Read the deployment file anew."""
        return _part(self._ask("POST", "/v1/admin/reload"), "reload")

    def _ask(self, method: str, path: str) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310 - the scheme was looked at
            self.url + path, method=method, headers={"Accept": "application/json"}
        )
        if key := os.environ.get(KEY_VARIABLE):
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request) as response:  # noqa: S310
                body = response.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, error.read(_MOST_BYTES)) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ResourceNotAvailableError(
                f"no server answers at {self.url}: {reason}; start one with `engineroom serve`, "
                f"or say where it is with --url or {URL_VARIABLE}"
            ) from error
        answer = _json(body)
        if not isinstance(answer, dict):
            raise ResourceNotAvailableError(
                f"what answers at {self.url} is no server of engineroom; check --url"
            )
        return answer

    def _refused(self, status: int, body: bytes) -> EngineRoomError:
        answer = _json(body)
        problem = answer.get("error") if isinstance(answer, dict) else None
        message = problem.get("message") if isinstance(problem, dict) else None
        if status in (401, 403):
            message = f"{message or 'the key is not taken'}; set {KEY_VARIABLE} to an admin key"
        kind = error_class("ModelNotFoundError" if status == 404 else "ResourceNotAvailableError")
        return kind(f"{self.url} answers {status}: {message or 'it does not say why'}")


def _part(answer: dict[str, Any], name: str) -> dict[str, Any]:
    part = answer.get(name, answer)
    return part if isinstance(part, dict) else {}


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
