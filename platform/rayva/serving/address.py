"""Checks of the address to serve at. Quick to import, so that a port in use is told at once."""

from __future__ import annotations

import ipaddress
import socket

from rayva.errors import ServingError
from rayva.serving.keys import ENVIRONMENT, key_digests


def check_port(host: str, port: int) -> None:
    """Proves that the address is free by taking it for a moment.

    Raises:
        ServingError: it is in use, or this machine has no such address; names the override.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Connections of an earlier server that linger must not count as one that listens.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except (OSError, OverflowError) as error:
            raise ServingError(
                f"The endpoint cannot listen on port {port} of {host}: {error}",
                "stop what listens there, or choose another one with serving.port=PORT",
            ) from error


def check_exposure(host: str) -> None:
    """An address that others can reach needs keys.

    Raises:
        ServingError: `host` is not this machine's own, and no key is set.
    """
    if _is_loopback(host) or key_digests():
        return
    raise ServingError(
        f"The endpoint would be open to everyone who can reach {host}.",
        f"set {ENVIRONMENT} to one or more keys (separated by commas), or serve on 127.0.0.1",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
