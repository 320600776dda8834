"""An entry of the traffic log as the outside sees it: columns, JSON, PAN-OS's comma-separated line, journal fields.

No I/O: from the core's records to text.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Any, Final, TypeAlias

from .core.traffic_log import LogRecord
from .views import VSYS

Entry: TypeAlias = dict[str, Any]

#: An entry's fields in their order, and what SQLite calls their types. Times are seconds since the epoch.
COLUMNS: Final[Mapping[str, str]] = {
    "number": "INTEGER PRIMARY KEY",
    "time": "REAL NOT NULL",
    "subtype": "TEXT NOT NULL",
    "session": "INTEGER NOT NULL",
    "application": "TEXT NOT NULL",
    "protocol": "INTEGER NOT NULL",
    "source": "TEXT NOT NULL",
    "source_port": "INTEGER NOT NULL",
    "source_zone": "TEXT NOT NULL",
    "destination": "TEXT NOT NULL",
    "destination_port": "INTEGER NOT NULL",
    "destination_zone": "TEXT NOT NULL",
    "ingress": "TEXT NOT NULL",
    "egress": "TEXT NOT NULL",
    "rule": "TEXT NOT NULL",
    "action": "TEXT NOT NULL",
    "end_reason": "TEXT NOT NULL",
    "start": "REAL NOT NULL",
    "elapsed_s": "REAL NOT NULL",
    "packets_c2s": "INTEGER NOT NULL",
    "packets_s2c": "INTEGER NOT NULL",
    "bytes_c2s": "INTEGER NOT NULL",
    "bytes_s2c": "INTEGER NOT NULL",
    "terminated_on_host": "INTEGER NOT NULL",
    "ike_sa": "TEXT",
    "child_sa": "TEXT",
    "rekeys": "INTEGER NOT NULL",
    "nat_t_ports": "TEXT",
    "spis_c2s": "TEXT NOT NULL",
    "spis_s2c": "TEXT NOT NULL",
}


def row_of(record: LogRecord, epoch: float) -> tuple[Any, ...]:
    """A record as values of the COLUMNS; `epoch` is when the monotonic clock stood at 0, in seconds since the epoch.

    NAT-T ports and SPIs are decimal numbers with a space between them, client's port and oldest SPI first.
    """
    return (
        record.number,
        record.at + epoch,
        record.subtype.value,
        record.session_id,
        record.application,
        record.protocol,
        _address(record.source),
        record.source_port,
        record.source_zone,
        _address(record.destination),
        record.destination_port,
        record.destination_zone,
        record.ingress,
        record.egress,
        record.rule,
        record.action.value,
        record.end_reason.value,
        record.started_at + epoch,
        record.at - record.started_at,
        record.packets_c2s,
        record.packets_s2c,
        record.bytes_c2s,
        record.bytes_s2c,
        int(record.is_terminated),
        record.ike_sa,
        record.child_sa,
        record.rekeys,
        None if record.udp_ports is None else _joined(record.udp_ports),
        _joined(record.spis_c2s),
        _joined(record.spis_s2c),
    )


def entry_of(record: LogRecord, epoch: float) -> Entry:
    """The same by the columns' names."""
    return dict(zip(COLUMNS, row_of(record, epoch), strict=True))


def _address(octets: bytes) -> str:
    return inet_ntop(AF_INET if len(octets) == 4 else AF_INET6, octets)


def _joined(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


def journal_fields(entry: Entry) -> dict[str, str]:
    """An entry as fields of the journal (systemd.journal-fields(7)): a line to read, and FWD_ before each name."""
    fields = {f"FWD_{name.upper()}": str(value) for name, value in entry.items() if value is not None}
    text = (
        f"traffic {entry['subtype']}: session {entry['session']}, {entry['application']}"
        f" {entry['source']}[{entry['source_port']}] > {entry['destination']}[{entry['destination_port']}],"
        f" rule {entry['rule']}, {entry['action']}, {entry['end_reason']}"
    )
    return {"MESSAGE": text, "PRIORITY": "6", "SYSLOG_IDENTIFIER": "fwd"} | fields


#: None of PAN-OS's flags (NAT, a packet capture, decryption ...) is ever true of fwd's sessions.
_NO_FLAGS = "0x0"

#: What is one column each in PAN-OS's order and what fwd has no value for.
_NONE: Final = ""


def panos_line(entry: Entry, hostname: str) -> str:
    """An entry in the order of PAN-OS 9.1's traffic log, comma-separated.

    Source: PAN-OS administrator's guide, "Traffic Log Fields". What fwd does not do is empty or 0, as on PAN-OS: users,
    NAT, countries, categories, SD-WAN. The serial number is the host's name. Bytes sent are the client's.
    """
    at, started = _panos_time(entry["time"]), _panos_time(entry["start"])
    packets, octets = entry["packets_c2s"] + entry["packets_s2c"], entry["bytes_c2s"] + entry["bytes_s2c"]
    no_address = "0.0.0.0" if "." in entry["source"] else "::"
    fields = (
        *("1", at, hostname, "TRAFFIC", entry["subtype"], "2305", at),
        *(entry["source"], entry["destination"], no_address, no_address, entry["rule"], _NONE, _NONE),
        *(entry["application"], VSYS, entry["source_zone"], entry["destination_zone"]),
        *(entry["ingress"], entry["egress"], _NONE, at, entry["session"], 1),
        *(entry["source_port"], entry["destination_port"], 0, 0, _NO_FLAGS, _protocol(entry["protocol"])),
        *(entry["action"], octets, entry["bytes_c2s"], entry["bytes_s2c"], packets, started),
        *(int(entry["elapsed_s"]), "any", 0, entry["number"], "0x0", _NONE, _NONE, 0),
        *(entry["packets_c2s"], entry["packets_s2c"], entry["end_reason"], 0, 0, 0, 0, _NONE, hostname),
        *("from-policy", _NONE, _NONE, 0, _NONE, 0, _NONE, "N/A", 0, 0, 0, 0, _NONE, 0),
        *(0, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE),
    )
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()


def _protocol(number: int) -> str:
    """As PAN-OS names them (IANA's keyword in lower case)."""
    return {17: "udp", 50: "esp"}.get(number, str(number))


def _panos_time(epoch: float) -> str:
    return time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(epoch))


#: Facilities of RFC 5424 section 6.2.1; the severity is informational, 6.
_FACILITIES: Final = {"user": 1} | {f"local{number}": 16 + number for number in range(8)}
_INFORMATIONAL: Final = 6


def syslog_message(entry: Entry, hostname: str, facility: str, is_ietf: bool) -> bytes:
    """An entry as one message, without a frame: as RFC 5424 has it, or as RFC 3164 has it."""
    priority = f"<{_FACILITIES[facility] * 8 + _INFORMATIONAL}>"
    at = entry["time"]
    if is_ietf:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03}Z"
        header = f"{priority}1 {stamp} {hostname} fwd - TRAFFIC - "
    else:
        then = time.localtime(at)  # the day has a space instead of a leading 0 (RFC 3164 section 4.1.2)
        header = f"{priority}{time.strftime('%b', then)} {then.tm_mday:2} {time.strftime('%H:%M:%S', then)} {hostname} "
    return (header + panos_line(entry, hostname)).encode()
