"""Keeps a test process on its machine: the environment of the Hub's client, and a guard on connections."""

import ipaddress
import os
import socket
from collections.abc import Callable
from typing import Any

from hub_server.state import Hub


def environment(hub: Hub, home: str) -> dict[str, str]:
    """Return what huggingface_hub must find in the environment when it is imported, to talk to this Hub alone."""
    switches = ('TELEMETRY', 'PROGRESS_BARS', 'UPDATE_CHECK', 'XET')
    settings = {f'HF_HUB_DISABLE_{name}': '1' for name in switches}
    settings |= {'HF_ENDPOINT': hub.url, 'HF_HOME': home, 'HF_TOKEN': hub.token}
    return {**settings, 'NO_PROXY': '127.0.0.1,localhost', 'no_proxy': '127.0.0.1,localhost'}


def replace_environment(settings: dict[str, str]):
    """Drop what the caller's own environment says of the Hub and of proxies, then set these."""
    for name in list(os.environ):
        if name.startswith(('HF_', 'HUGGING')) or name.lower().endswith('_proxy'):
            del os.environ[name]
    os.environ.update(settings)


def is_loopback(host: Any) -> bool:
    """Whether a host, as `socket` takes it, is this machine."""
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, '', 'localhost'):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class NetworkGuard:
    """Makes every connection and name look-up of this process that leaves the machine an error, and remembers it.

    Remembered, because a client may take the error for a server that is down and go on.
    """

    def __init__(self):
        self.attempts: list[str] = []

    def install(self):
        socket.socket.connect = self._guard_method(socket.socket.connect)
        socket.socket.connect_ex = self._guard_method(socket.socket.connect_ex)
        look_up = socket.getaddrinfo

        def getaddrinfo(host, *args, **kwargs):
            self.check(host)
            return look_up(host, *args, **kwargs)

        socket.getaddrinfo = getaddrinfo

    def _guard_method(self, method: Callable) -> Callable:
        def guarded(connection, address):
            if connection.family in (socket.AF_INET, socket.AF_INET6):  # Unix sockets stay here by nature
                self.check(address[0])
            return method(connection, address)

        return guarded

    def check(self, host: Any):
        """Raise unless the host is this machine.

        Raises:
            RuntimeError: the host is another one.
        """
        if not is_loopback(host):
            self.attempts.append(str(host))
            raise RuntimeError(f'a test wants to reach {host}: tests talk to this machine alone')

    def take_attempts(self) -> list[str]:
        """Return the hosts that were asked for and forget them."""
        attempts, self.attempts = self.attempts, []
        return attempts
