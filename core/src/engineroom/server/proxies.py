"""Proxies that are believed whose request they hand on."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import Any, Final

from engineroom.errors import ConfigurationError

__all__ = ["UNIX", "TrustedProxies"]

UNIX: Final = "unix"
"""Whoever comes through a unix socket: it has no address."""
_MOST_HOPS: Final = 32
"""Addresses of a header that are looked at, from the last one on."""
_MAPPED: Final = "::ffff:"


class TrustedProxies:
    """Says who a request is from, by what the named proxies say of it.

    :param named: their addresses and networks, and ``unix``.
    :raises ConfigurationError: one of them is none.
    """

    def __init__(self, named: Collection[str]) -> None:
        self._unix = UNIX in named
        try:
            self._networks = [
                ipaddress.ip_network(name, strict=False) for name in named if name != UNIX
            ]
        except ValueError as error:
            raise ConfigurationError(
                f"forwarded_allow_ips: {error}; give addresses or networks of proxies, or {UNIX!r}"
            ) from error

    def __bool__(self) -> bool:
        return self._unix or bool(self._networks)

    def client_of(self, scope: Any) -> tuple[str, int] | None:
        """Address and port of who sent a request; the port is 0 where a proxy tells of it.

        That is the last address of the header that is no proxy's own: what stands before it, the
        client may have written itself.
        """
        client: tuple[str, int] | None = scope.get("client")
        if not (self._unix if client is None else self._is_proxy(client[0])):
            return client
        values = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        hops = b",".join(values).decode("latin-1").split(",")[-_MOST_HOPS:]
        for hop in reversed(hops):
            address = _address_of(hop)
            if address is None:
                break
            client = (address, 0)
            if not self._is_proxy(address):
                break
        return client

    def _is_proxy(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host.removeprefix(_MAPPED))
        except ValueError:
            return False
        return any(address in network for network in self._networks)


def _address_of(hop: str) -> str | None:
    """An address of the header, without its port; ``None``: it is none."""
    text = hop.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(ipaddress.ip_address(text.removeprefix(_MAPPED)))
    except ValueError:
        return None
