"""The page's server: Voilà, for hosts that it knows, and for as many visitors at once as the machine has memory for.

    python notebooks/app/serve.py notebooks/app/playground.ipynb [options of Voilà]    # what `make app` does

Voilà alone answers to any name. A page elsewhere, whose name is made to point to this machine (DNS rebinding), could
then use it through a visitor's browser; so only addresses and this machine's names are accepted. It also starts a
kernel for every visit, without an end; here, the next visitor is told to come back later.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any

from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.web import HTTPError
from traitlets import Integer, List, Unicode
from voila.app import Voila

KERNEL = 1.2e9  # bytes of a visitor's kernel that has searched
FULL = "As many visitors as there is room for are here already. Please come back in a few minutes."
ELSEWHERE = "This page answers to its own address only: open the one that you were given."
PLAIN = '<!doctype html><html lang="en"><meta charset="utf-8"><title>{0}</title><h1>{0}</h1><p>{1}</p></html>'


class Refused(HTTPError):
    """A visit that is refused with a plain page of its own."""

    def __init__(self, status: int, title: str, text: str, reason: str) -> None:
        super().__init__(status, reason.replace("%", "%%"))
        self.page = PLAIN.format(title, text)


class Kernels(AsyncMappingKernelManager):
    """Starts no more kernels than `limit`."""

    limit = Integer(min=1, config=True, help="Visitors at once (default: as many as have room in 80 % of the memory)")
    _starting = 0

    def _limit_default(self) -> int:
        try:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # not on every system
            return 8
        return max(1, int(0.8 * memory / KERNEL))

    async def start_kernel(self, **options: Any) -> str:
        if len(self) + self._starting >= self.limit:
            raise Refused(503, "Full", FULL, f"{self.limit} visitors are here already")
        self._starting += 1
        try:
            return await super().start_kernel(**options)
        finally:
            self._starting -= 1


class Guard:
    """What every handler does first: see which host was asked for."""

    request: Any
    application: Any

    async def prepare(self, *arguments: Any, **options: Any) -> None:
        host = self.request.host_name
        if not self.application.settings["page"].knows(host):
            raise Refused(403, "Not here", ELSEWHERE, f"the host {host!r} is not known here")
        waiting = super().prepare(*arguments, **options)  # type: ignore[misc]
        if waiting is not None:
            await waiting

    def write_error(self, status_code: int, **facts: Any) -> None:
        error = facts.get("exc_info", (None, None))[1]
        if not isinstance(error, Refused):
            return super().write_error(status_code, **facts)  # type: ignore[misc]
        self.set_header("Content-Type", "text/html; charset=utf-8")  # type: ignore[attr-defined]
        if status_code == 503:
            self.set_header("Retry-After", "120")  # type: ignore[attr-defined]
        self.finish(error.page)  # type: ignore[attr-defined]


class Page(Voila):
    """Voilà with `Kernels`, and with `Guard` before every handler."""

    hosts = List(Unicode(), config=True, help="Further names of this machine, as visitors write them in the address")

    def knows(self, host: str) -> bool:
        """Whether a request is for this machine: nobody else can make an address, or its own names, point here."""
        host = host.strip("[]").rstrip(".").lower()
        try:
            ipaddress.ip_address(host)
        except ValueError:
            name = socket.gethostname()
            own = (name, f"{name}.local", socket.getfqdn(), *self.hosts)
            return host == "localhost" or host.endswith(".localhost") or host in map(str.lower, own)
        return True

    def init_settings(self) -> dict[str, Any]:
        self.voila_configuration.multi_kernel_manager_class = Kernels
        return {**super().init_settings(), "page": self}

    def init_handlers(self) -> list[tuple]:
        guarded = []
        for pattern, handler, *options in super().init_handlers():
            guarded.append((pattern, type(handler.__name__, (Guard, handler), {}), *options))
        return guarded


if __name__ == "__main__":
    Page.launch_instance()
