"""What an entry of the traffic log looks like from outside."""

from __future__ import annotations

import csv
import time

import pytest

from fwd.cli.when import when
from fwd.core.filter_value import FilterError
from fwd.log_entry import COLUMNS, entry_of, panos_line
from fwd.log_filter import KEYS, build_log_filter
from fwd.rpc import LOG_FILTER_KEYS
from tests.edge.test_traffic_log import EPOCH, record

#: PAN-OS 9.1, "Traffic Log Fields", in the order of its manual.
_MANUAL = (
    "FUTURE_USE, Receive Time, Serial Number, Type, Subtype, FUTURE_USE, Generated Time, Source Address, "
    "Destination Address, NAT Source IP, NAT Destination IP, Rule Name, Source User, Destination User, Application, "
    "Virtual System, Source Zone, Destination Zone, Inbound Interface, Outbound Interface, Log Action, FUTURE_USE, "
    "Session ID, Repeat Count, Source Port, Destination Port, NAT Source Port, NAT Destination Port, Flags, Protocol, "
    "Action, Bytes, Bytes Sent, Bytes Received, Packets, Start Time, Elapsed Time, Category, FUTURE_USE, "
    "Sequence Number, Action Flags, Source Country, Destination Country, FUTURE_USE, Packets Sent, Packets Received, "
    "Session End Reason, Device Group Hierarchy Level 1, Device Group Hierarchy Level 2, "
    "Device Group Hierarchy Level 3, Device Group Hierarchy Level 4, Virtual System Name, Device Name, Action Source, "
    "Source VM UUID, Destination VM UUID, Tunnel ID/IMSI, Monitor Tag/IMEI, Parent Session ID, Parent Start Time, "
    "Tunnel Type, SCTP Association ID, SCTP Chunks, SCTP Chunks Sent, SCTP Chunks Received, Rule UUID, "
    "HTTP/2 Connection, App Flap Count, Policy ID, Link Switches, SD-WAN Cluster, SD-WAN Device Type, "
    "SD-WAN Cluster Type, SD-WAN Site, Dynamic User Group Name"
)
PANOS_FIELDS = _MANUAL.split(", ")


def test_the_fields_stand_where_panos_has_them():
    (values,) = csv.reader([panos_line(entry_of(record(9), EPOCH), "fw1")])
    assert len(values) == len(PANOS_FIELDS)
    line = dict(zip(PANOS_FIELDS, values, strict=True))
    assert line["Type"] == "TRAFFIC" and line["Subtype"] == "end" and line["Serial Number"] == "fw1"
    assert (line["Source Address"], line["Destination Address"]) == ("192.0.2.2", "192.0.2.1")
    assert (line["Source Port"], line["Destination Port"]) == ("4055664155", "1693871936")
    assert (line["Source Zone"], line["Inbound Interface"], line["Rule Name"]) == ("untrust", "wan", "our-tunnels")
    assert (line["Bytes"], line["Bytes Sent"], line["Bytes Received"]) == ("2094", "1080", "1014")
    assert (line["Packets"], line["Packets Sent"], line["Packets Received"]) == ("13", "8", "5")
    assert (line["Session ID"], line["Sequence Number"], line["Elapsed Time"]) == ("9", "9", "60")
    assert (line["Session End Reason"], line["Action"], line["Protocol"]) == ("tunnel-down", "allow", "esp")
    assert line["Start Time"] == time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(EPOCH + 40))
    assert (line["Virtual System"], line["Application"], line["Device Name"]) == ("vsys1", "ipsec-udp", "fw1")


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        ({}, True),
        ({"source": "192.0.2.0/30"}, True),
        ({"source": "198.51.100.0/24,2001:db8::/32"}, False),
        ({"source": "not 198.51.100.0/24"}, True),
        ({"destination-port": "0x64f66f40"}, True),
        ({"spi": "2"}, True),
        ({"spi": "3"}, False),
        ({"tunnel": "gw/net"}, True),
        ({"tunnel": "other"}, False),
        ({"end-reason": "aged-out,TUNNEL-DOWN", "action": "allow"}, True),
        ({"action": "deny"}, False),
        ({"min-kb": "2"}, True),
        ({"min-kb": "2.1"}, False),
        ({"min-age": "60", "session": "9", "subtype": "end"}, True),
    ],
)
def test_filters(words, fits):
    assert build_log_filter(words)(entry_of(record(9), EPOCH)) is fits


def test_every_key_is_known_to_both_sides_and_is_about_a_column():
    assert LOG_FILTER_KEYS.keys() == KEYS.keys()
    entry = entry_of(record(9), EPOCH)
    assert entry.keys() == COLUMNS.keys()
    for key in KEYS.values():
        key.value(entry)
    with pytest.raises(FilterError, match="no filter key 'state'"):
        build_log_filter({"state": "active"})


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("90s", "2026-11-25 19:58:30"),
        ("3d", "2026-11-22 20:00:00"),
        ("03:15", "2026-11-25 03:15:00"),
        ("2026-11-24", "2026-11-24 00:00:00"),
        ("2026-11-24T03:15", "2026-11-24 03:15:00"),
        ("2026/11/24@03:15:20", "2026-11-24 03:15:20"),
    ],
)
def test_times_as_people_write_them(text, meant):
    now = time.mktime(time.strptime("2026-11-25 20:00:00", "%Y-%m-%d %H:%M:%S"))
    assert time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when(text, now))) == meant


@pytest.mark.parametrize("text", ["", "yesterday", "25:00", "2026-13-01", "-1h", "9999999h", "h"])
def test_times_that_are_none(text):
    with pytest.raises(ValueError, match="want a time such as"):
        when(text, 0.0)
