"""The interfaces and addresses of this host, as the kernel reports them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class LinkPresent:
    """An interface exists under this name; a rename is the same with another name. `mtu` in bytes, 0: not told."""

    index: int
    name: str
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class LinkGone:
    """An interface is no more, and its addresses with it."""

    index: int


@dataclass(frozen=True, slots=True)
class AddressPresent:
    """An interface has this address, in network order."""

    index: int
    address: bytes


@dataclass(frozen=True, slots=True)
class AddressGone:
    """An interface has this address no more."""

    index: int
    address: bytes


@dataclass(frozen=True, slots=True)
class InterfaceSnapshot:
    """All that there is; what is not in it does not exist."""

    links: tuple[LinkPresent, ...]
    addresses: tuple[AddressPresent, ...]


InterfaceEvent: TypeAlias = LinkPresent | LinkGone | AddressPresent | AddressGone | InterfaceSnapshot


class InterfaceTable:
    """Names and MTUs by interface index, and which interface has which address."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._mtus: dict[int, int] = {}
        self._owners: dict[bytes, tuple[int, ...]] = {}
        self._by_name: dict[str, int] | None = {}  # None: to be made when somebody asks

    @property
    def names(self) -> Collection[str]:
        """The names of all interfaces."""
        return self._names.values()

    @property
    def indices(self) -> Collection[int]:
        """The indices of all interfaces."""
        return self._names.keys()

    def name_of(self, index: int) -> str:
        """The interface's name, or `if7` while the kernel has not told it."""
        return self._names.get(index) or f"if{index}"

    def index_of(self, name: str) -> int | None:
        """The index of the interface with this name; None if there is none."""
        if self._by_name is None:
            self._by_name = {known: index for index, known in self._names.items()}
        return self._by_name.get(name)

    def mtu_of(self, index: int) -> int:
        """The largest packet that the interface carries in one, in bytes; more than there can be if it is not known."""
        return self._mtus.get(index) or 0x1_0000

    def owner_of(self, address: bytes) -> int | None:
        """The index of the interface with this address (network order), None if this host has it not.

        Of several, as with fe80::1, the one that got it last.
        """
        owners = self._owners.get(address)
        return owners[-1] if owners else None

    def apply(self, event: InterfaceEvent) -> None:
        """Learn what the kernel said; saying it twice changes nothing."""
        if not isinstance(event, AddressPresent | AddressGone):
            self._by_name = None
        match event:
            case LinkPresent(index, name, mtu):
                self._names[index], self._mtus[index] = name, mtu
            case LinkGone(index):
                self._names.pop(index, None)
                self._mtus.pop(index, None)
                for address in list(self._owners):
                    self._lose(index, address)
            case AddressPresent(index, address):
                self._own(index, address)
            case AddressGone(index, address):
                self._lose(index, address)
            case InterfaceSnapshot(links, addresses):
                self._names = {link.index: link.name for link in links}
                self._mtus = {link.index: link.mtu for link in links}
                self._owners = {}
                for known in addresses:
                    self._own(known.index, known.address)

    def _own(self, index: int, address: bytes) -> None:
        owners = self._owners.get(address, ())
        if index not in owners:
            self._owners[address] = (*owners, index)

    def _lose(self, index: int, address: bytes) -> None:
        left = tuple(owner for owner in self._owners.get(address, ()) if owner != index)
        if left:
            self._owners[address] = left
        else:
            self._owners.pop(address, None)
