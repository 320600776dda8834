"""Interfaces and addresses of this host, live from rtnetlink: subscribe, dump, then the changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.rtnl import RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR, RTMGRP_LINK

from ..core.interfaces import (
    AddressGone,
    AddressPresent,
    InterfaceEvent,
    InterfaceSnapshot,
    LinkGone,
    LinkPresent,
)

log = logging.getLogger(__name__)

_AGAIN_S = 0.5


def parse_message(message: Any) -> InterfaceEvent | None:
    """What one rtnetlink message says; None for one that concerns neither a link's name nor an address."""
    kind = message["event"]
    if kind in ("RTM_NEWLINK", "RTM_DELLINK"):
        # An IFLA_WIRELESS or bridge message about a link that stays has the same type, but not family 0.
        if message["family"] != 0:
            return None
        name = message.get_attr("IFLA_IFNAME")
        if kind == "RTM_DELLINK":
            return LinkGone(message["index"])
        return LinkPresent(message["index"], name, message.get_attr("IFLA_MTU") or 0) if name else None
    if kind in ("RTM_NEWADDR", "RTM_DELADDR"):
        # On point-to-point links IFA_ADDRESS is the other end's.
        text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        if text is None:
            return None
        change = AddressPresent if kind == "RTM_NEWADDR" else AddressGone
        return change(message["index"], ip_address(text).packed)
    return None


class InterfaceError(Exception):
    """The kernel does not tell of its interfaces; the message says what to do."""


class InterfaceWatcher:
    """Keeps the core told; lives in the event loop. `ready` is set when the first snapshot was handed over."""

    def __init__(self, deliver: Callable[[InterfaceEvent], None]) -> None:
        self._deliver = deliver
        self.ready = asyncio.Event()

    async def run(self) -> None:
        """Watch until cancelled; after a loss (the socket overran) all is read anew."""
        while True:
            try:
                async with AsyncIPRoute() as route:
                    await route.bind(groups=RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR)
                    self._deliver(await self._snapshot(route))
                    self.ready.set()
                    while True:
                        async for message in route.get():  # one batch of what the kernel told
                            event = parse_message(message)
                            if event is not None:
                                self._deliver(event)
            except Exception as error:  # whatever rtnetlink said: the next socket begins with a dump
                log.warning("interface changes were lost (%r): reading all interfaces again", error)
            await asyncio.sleep(_AGAIN_S)

    async def _snapshot(self, route: AsyncIPRoute) -> InterfaceSnapshot:
        links = [parse_message(message) async for message in await route.get_links()]
        addresses = [parse_message(message) async for message in await route.get_addr()]
        return InterfaceSnapshot(
            tuple(link for link in links if isinstance(link, LinkPresent)),
            tuple(address for address in addresses if isinstance(address, AddressPresent)),
        )
