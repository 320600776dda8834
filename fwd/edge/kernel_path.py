"""The kernel's side of the fast path: elements in the maps of fwd's own nft tables (see ruleset.py).

An element's key is `iif . oif . source . destination [. UDP ports] . SPI`, its verdict is to accept or to drop, its
counter counts, and its comment names the session to whoever lists the table.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Iterable, Iterator, Sequence

from ..core.fast_path import Found, Outcome, Reading, Work
from ..core.policy import Verdict
from ..core.session import Element, ElementKey
from . import nftables as nft
from .nftables import Kind, Message, NftError, NftSocket
from .ruleset import TABLE, Backend, RulesetError, maps

log = logging.getLogger(__name__)

_INTERFACES = struct.Struct("=II")

# Attributes of an element (linux/netfilter/nf_tables.h, NFTA_SET_ELEM_*), and of the list that it stands in.
_KEY, _DATA, _USERDATA, _EXPRESSION = 1, 2, 6, 7
_SET_TABLE, _SET_NAME, _SET_ELEMENTS = 1, 2, 3
_LIST_ELEMENT = 1

#: Elements in one message: its list of them has room for 64 KiB.
_PER_MESSAGE = 256
#: Elements in one transaction: what they weigh, and what the kernel echoes, has room in any socket buffer.
_PER_TRANSACTION = 512


class KernelPath:
    """Writes and reads the elements. The tables must be there."""

    def __init__(self, backend: Backend) -> None:
        self._socket = NftSocket()
        self._maps = maps()
        self._verdicts = {
            Verdict.ACCEPT: nft.verdict_data(_DATA, backend.accepts),
            Verdict.DROP: nft.verdict_data(_DATA, nft.NF_DROP),
        }

    def close(self) -> None:
        """Give the socket back; the elements stay."""
        self._socket.close()

    def carry_out(self, work: Work) -> Outcome:
        """Remove, install, read, in transactions of a bounded size. What could not be done shows in the outcome."""
        outcome = Outcome()
        changes = [(element, False) for element in work.removals] + [(element, True) for element in work.installs]
        for start in range(0, len(changes), _PER_TRANSACTION):
            part = changes[start : start + _PER_TRANSACTION]
            try:
                self._change(part, outcome)
            except OSError as error:  # it may have been done or not; what was still to do is not
                log.error("the kernel's fast path does not answer: %s", error)
                outcome.unknown.update(element.key for element, _ in part)
                rest = changes[start + _PER_TRANSACTION :]
                outcome.unknown.update(element.key for element, is_new in rest if not is_new)
                outcome.refused.update(element.key for element, is_new in rest if is_new)
                break
        self._read([element.key for element in work.reads], outcome)
        return outcome

    def remove(self, keys: Iterable[ElementKey]) -> dict[ElementKey, Reading]:
        """Take out elements that nobody knows; gives their last counts."""
        removed: dict[ElementKey, Reading] = {}
        for key in keys:
            try:
                answers = self._socket.transact(list(self._messages(Kind.DELSETELEM, [(key, _element(key))])))
                removed.update(_readings(answers))
            except NftError as error:
                log.warning("the kernel kept an element of the fast path: %s", error)
        return removed

    def find_all(self) -> list[Found]:
        """All elements that a former daemon left there. A map that cannot be read is emptied: nobody would count.

        Raises RulesetError if even that cannot be done.
        """
        found = []
        for size, (family, name) in self._maps.items():
            body = nft.string(_SET_TABLE, TABLE) + nft.string(_SET_NAME, name)
            try:
                answers = self._socket.ask(Message(Kind.GETSETELEM, family, body, nft.NLM_F_DUMP))
            except (NftError, OSError) as error:
                log.error("the fast path of a former fwd cannot be read, and is begun anew: %s", error)
                self._empty(family, body)
                continue
            for key, attributes in _elements_in(answers):
                assert 8 + len(key[2]) == size
                verdict = Verdict.DROP if nft.verdict_in(attributes[_DATA]) == nft.NF_DROP else Verdict.ACCEPT
                found.append(Found(key, verdict, _reading(attributes)))
        return found

    def _empty(self, family: int, body: bytes) -> None:
        try:
            self._socket.transact([Message(Kind.DELSETELEM, family, body)])
        except (NftError, OSError) as error:
            if isinstance(error, NftError) and error.number == errno.ENOENT:
                return  # nor is there a table
            raise RulesetError(f"cannot empty a former fwd's fast path ({error}): see `fwd --remove-rules`") from None

    def _change(self, changes: Sequence[tuple[Element, bool]], outcome: Outcome) -> None:
        """One transaction of removals (False), whose last counts it gives, and of installs (True). Raises OSError."""
        removals = ((element.key, _element(element.key)) for element, is_new in changes if not is_new)
        installs = ((element.key, self._new_element(element)) for element, is_new in changes if is_new)
        messages = [*self._messages(Kind.DELSETELEM, removals), *self._messages(Kind.NEWSETELEM, installs)]
        try:
            outcome.removed.update(_readings(self._socket.transact(messages)))
        except NftError as error:
            if len(changes) > 1:  # the kernel did nothing, because one is not there, say: each on its own tells which
                for change in changes:
                    self._change([change], outcome)
                return
            ((element, is_new),) = changes
            if is_new:
                outcome.refused.add(element.key)
            elif error.number != errno.ENOENT:
                outcome.unknown.add(element.key)
            if error.number != errno.ENOENT:
                log.warning("the fast path cannot be changed: %s", error)

    def _read(self, keys: Sequence[ElementKey], outcome: Outcome) -> None:
        missing: list[ElementKey] = []
        for start in range(0, len(keys), _PER_MESSAGE):
            part = keys[start : start + _PER_MESSAGE]
            try:
                for message in self._messages(Kind.GETSETELEM, ((key, _element(key)) for key in part)):
                    outcome.read.update(_readings(self._socket.ask(message)))
            except NftError as error:
                if error.number != errno.ENOENT:
                    log.warning("the fast path cannot be read: %s", error)
                    outcome.unknown.update(key for key in part if key not in outcome.read)
                elif len(part) > 1:  # the kernel stops at one that is not there: each on its own tells which
                    missing += [key for key in part if key not in outcome.read]
            except OSError as error:
                log.error("the kernel's fast path does not answer: %s", error)
                outcome.unknown.update(key for key in keys[start:] if key not in outcome.read)
                break
        for key in missing:
            self._read([key], outcome)

    def _new_element(self, element: Element) -> bytes:
        session = element.flow.session
        side = "c2s" if element.flow is session.c2s else "s2c"
        return _element(
            element.key,
            self._verdicts[element.verdict]
            + nft.comment(_USERDATA, f"session {session.id} {side}, SPI {element.use.spi}")
            + _new_counter(element.kernel_packets, element.kernel_bytes),
        )

    def _messages(self, kind: Kind, elements: Iterable[tuple[ElementKey, bytes]]) -> Iterator[Message]:
        """As many messages as it takes: one is about one map, and not too long."""
        by_size: dict[int, list[bytes]] = {}
        for key, octets in elements:
            by_size.setdefault(_INTERFACES.size + len(key[2]), []).append(octets)
        flags = {Kind.DELSETELEM: nft.NLM_F_ECHO, Kind.NEWSETELEM: nft.NLM_F_CREATE}.get(kind, 0)
        for size, encoded in by_size.items():
            family, name = self._maps[size]
            head = nft.string(_SET_TABLE, TABLE) + nft.string(_SET_NAME, name)
            for start in range(0, len(encoded), _PER_MESSAGE):
                part = encoded[start : start + _PER_MESSAGE]
                yield Message(kind, family, head + nft.nested(_SET_ELEMENTS, *part), flags)


# Built once, for they are sent by the thousand: an element's key with its length to be filled in, and its counter,
# which ends in two attributes of eight bytes: the bytes and the packets counted.
_KEY_HEAD = struct.Struct("=HHHHHHII")
_COUNTER = nft.counter(_EXPRESSION)
_COUNT = struct.Struct("!Q").pack


def _element(key: ElementKey, attributes: bytes = b"") -> bytes:
    """NFTA_LIST_ELEM { NFTA_SET_ELEM_KEY { NFTA_DATA_VALUE }, attributes }. Keys are whole words: nothing is padded."""
    indev, outdev, outer = key
    value = 4 + _INTERFACES.size + len(outer)
    head = _KEY_HEAD.pack(
        8 + value + len(attributes), _LIST_ELEMENT | nft.NESTED, 4 + value, _KEY | nft.NESTED, value, 1, indev, outdev
    )
    return head + outer + attributes


def _new_counter(packets: int, octets: int) -> bytes:
    return _COUNTER[:-20] + _COUNT(octets) + _COUNTER[-12:-8] + _COUNT(packets)


def _elements_in(answers: Iterable[bytes]) -> Iterator[tuple[ElementKey, dict[int, bytes]]]:
    """The elements that the kernel told of: the key of each, and its attributes."""
    for answer in answers:
        for kind, listed in nft.attributes(answer):
            if kind != _SET_ELEMENTS:
                continue
            for _, element in nft.attributes(listed):
                attributes = dict(nft.attributes(element))
                octets = attributes[_KEY][4:]  # behind the header of NFTA_DATA_VALUE
                yield (*_INTERFACES.unpack_from(octets), octets[_INTERFACES.size :]), attributes


def _readings(answers: Iterable[bytes]) -> dict[ElementKey, Reading]:
    return {key: _reading(attributes) for key, attributes in _elements_in(answers)}


def _reading(attributes: dict[int, bytes]) -> Reading:
    return nft.counter_in(attributes[_EXPRESSION])
