"""A running server's model manager, over its admin routes."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Final

from engineroom.cli.output import CommandError
from engineroom.errors import EngineRoomError, ResourceNotAvailableError, error_class

__all__ = ["KEY_VARIABLE", "URL_VARIABLE", "RemoteManager", "bearer", "server_at"]

URL_VARIABLE: Final = "ENGINEROOM_URL"
KEY_VARIABLE: Final = "ENGINEROOM_ADMIN_KEY"
_DEFAULT_URL: Final = "http://127.0.0.1:8000"
_MOST_BYTES: Final = 16 << 20
_VISIBLE: Final = re.compile(r"[!-~]+")
"""What an address, and a key, are made of."""


def server_at(url: str) -> str:
    """The address of a server, given with or without ``/v1``.

    :raises CommandError: it is no address.
    """
    try:
        parsed = urllib.parse.urlsplit(url)
        known = parsed.scheme in ("http", "https") and parsed.hostname and parsed.port != 0
    except ValueError:  # half of an IPv6 address; a port that is no number, or too large
        known = False
    if not known or not _VISIBLE.fullmatch(url):
        raise CommandError(f"--url {url!r} is no http:// or https:// URL; write http://host:port")
    return url.rstrip("/").removesuffix("/v1")


def bearer(key: str, origin: str) -> str:
    """The header that a key is sent in.

    :param origin: where it was given.
    :raises CommandError: no header may have it.
    """
    if not _VISIBLE.fullmatch(key):
        raise CommandError(f"{origin} is no key: it has spaces, line breaks or no ASCII letters")
    return f"Bearer {key}"


class RemoteManager:
    """Asks a server.

    :param url: where it listens; ``None``: what ``ENGINEROOM_URL`` says, or port 8000 of this
        machine. An admin key is taken from ``ENGINEROOM_ADMIN_KEY``: others can read a command
        line.
    """

    def __init__(self, url: str | None = None) -> None:
        url = url or os.environ.get(URL_VARIABLE) or _DEFAULT_URL
        self.url = server_at(url)

    def models(self) -> list[dict[str, Any]]:
        """Every model and how it is."""
        models = self._ask("GET", "/v1/admin/models").get("models")
        return models if isinstance(models, list) else []

    def load(self, model_id: str) -> dict[str, Any]:
        """Load a model; returns when it is ready."""
        return self._ask("POST", f"/v1/admin/models/{_part_of_path(model_id)}/load")

    def unload(self, model_id: str) -> dict[str, Any]:
        """Unload a model as soon as nobody holds it."""
        return self._ask("POST", f"/v1/admin/models/{_part_of_path(model_id)}/unload")

    def plan(self) -> dict[str, Any]:
        """What would be loaded, where, and what would have to go."""
        return _part(self._ask("GET", "/v1/admin/plan"), "plan")

    def reload(self) -> dict[str, Any]:
        """Read the deployment file anew, and the key files."""
        answer = self._ask("POST", "/v1/admin/reload")
        keys = answer.get("keys") or {}
        changes = {f"keys_{what}": names for what, names in keys.items() if names}
        return {**_part(answer, "reload"), **changes}

    def _ask(self, method: str, path: str) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310 - the scheme was looked at
            self.url + path, method=method, headers={"Accept": "application/json"}
        )
        if key := os.environ.get(KEY_VARIABLE):
            request.add_header("Authorization", bearer(key, KEY_VARIABLE))
        try:
            with urllib.request.urlopen(request) as response:  # noqa: S310
                body = response.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, error.read(_MOST_BYTES)) from error
        except http.client.HTTPException as error:
            raise ResourceNotAvailableError(
                f"what answers at {self.url} does not speak HTTP; check --url"
            ) from error
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


def _part_of_path(model_id: str) -> str:
    if not model_id:
        raise CommandError("MODEL is empty; give an id or an alias of the server's")
    return urllib.parse.quote(model_id, safe="", errors="surrogateescape")


def _part(answer: dict[str, Any], name: str) -> dict[str, Any]:
    part = answer.get(name, answer)
    return part if isinstance(part, dict) else {}


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
