"""What is checked before a request is looked at: headers, host, origin, key."""

from __future__ import annotations

from engineroom.server.http.call import Call
from engineroom.server.http.errors import CHALLENGE, ApiError
from engineroom.server.http.key_failures import KeyFailure
from engineroom.server.keys import ANONYMOUS, Identity
from engineroom.server.settings import is_loopback

__all__ = ["check_admin", "check_front", "check_metrics", "identify"]


def check_front(call: Call) -> None:
    """Refuse headers that are too large, and web pages that have no business here.

    A page in a browser on this machine can send requests to a loopback address, under a name of
    its own (DNS rebinding) or from its own origin. Where no key keeps it out, this does.

    :raises ApiError: 431, 403 or 421.
    """
    settings = call.context.settings
    headers = call.scope["headers"]
    if sum(len(name) + len(value) for name, value in headers) > settings.max_header_bytes:
        raise ApiError(
            431,
            f"the headers are larger than {settings.max_header_bytes} bytes",
            "headers_too_large",
            headers={"connection": "close"},
        )
    host = _host(call.header(b"host"))
    if (
        settings.local
        and not settings.keys.needed
        and host
        and not is_loopback(host)
        and host not in settings.allowed_hosts
    ):
        raise ApiError(
            421,
            f"this server is not called {host[:200]!r}; name it with --allowed-host, or use keys",
            "unknown_host",
        )
    origin = call.header(b"origin")
    if origin and call.scope["method"] not in ("GET", "HEAD", "OPTIONS"):
        own = origin.partition("://")[2] == call.header(b"host")
        if not own and not {"*", origin}.intersection(settings.cors_origins):
            raise ApiError(
                403,
                "pages of other origins may not use this server; allow theirs with --cors-origin",
                "origin_not_allowed",
            )


def identify(call: Call) -> Identity:
    """Whose request it is.

    :raises ApiError: 401: a key is needed, and it has none or a wrong one.
    """
    keys = call.context.settings.keys
    if not keys.needed:
        return ANONYMOUS
    scheme, _, token = call.header(b"authorization").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else call.header(b"x-api-key").strip()
    if not key:
        _failed(call, "missing")
        raise ApiError(
            401,
            "this server needs a key; send it as 'Authorization: Bearer …'",
            "missing_api_key",
            headers=CHALLENGE,
        )
    identity = keys.find(key)
    if identity is None:
        _failed(call, "unknown")
        raise ApiError(401, "the key is not known here", "invalid_api_key", headers=CHALLENGE)
    return identity


def _failed(call: Call, kind: KeyFailure) -> None:
    client = call.scope.get("client")
    call.context.key_failures.add(kind, str(client[0]) if client else "an unknown place", call.id)
    call.logged = True


def check_metrics(call: Call) -> str | None:
    """Whose metrics may be read: those of one key, by its name, or everybody's (``None``)."""
    return None if call.identity.all_metrics else call.identity.name


def check_admin(call: Call) -> None:
    """Let only admin keys, or a local user of a server without keys, use the admin routes.

    :raises ApiError: 403.
    """
    settings = call.context.settings
    if call.identity.admin or (not settings.keys.needed and settings.local):
        return
    advice = (
        "use an admin key"
        if settings.keys.has_admin
        else "the server has none; give one with --admin-keys FILE or ENGINEROOM_ADMIN_KEYS"
    )
    raise ApiError(403, f"the admin routes need an admin key; {advice}", "admin_key_needed")


def _host(header: str) -> str:
    """The name in a ``Host`` header, without its port."""
    if header.startswith("["):
        return header.partition("]")[0] + "]"
    return header.rpartition(":")[0] or header
