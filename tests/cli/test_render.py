import time

import click
import pytest
from wcwidth import wcswidth

from fwd.cli import render
from fwd.times import time_of_day

SAMPLE = {
    "id": 791,
    "vsys": "vsys1",
    "application": "ipsec-esp",
    "state": "ACTIVE",
    "type": "FLOW",
    "start_time": 0.0,
    "timeout_s": 3600,
    "time_to_live_s": 3142,
    "c2s": {
        "source": "192.168.0.11",
        "source_zone": "trust",
        "destination": "129.187.7.11",
        "destination_zone": "untrust",
        "protocol": 50,
        "sport": 20033,
        "dport": 20033,
        "state": "ACTIVE",
        "type": "FLOW",
        "packets": 8,
        "bytes": 1080,
    },
    "s2c": {
        "source": "129.187.7.11",
        "source_zone": "untrust",
        "destination": "192.168.0.11",
        "destination_zone": "trust",
        "protocol": 50,
        "sport": 20033,
        "dport": 20033,
        "state": "ACTIVE",
        "type": "FLOW",
        "packets": 5,
        "bytes": 1014,
    },
    "rule": "any-any",
    "log_at_end": True,
    "in_ager": True,
    "terminated_on_host": False,
    "ingress_interface": "ethernet1/2",
    "egress_interface": "ethernet1/1",
    "end_reason": "unknown",
    "ipsec": None,
}

DETAIL = """\
Session             791

        c2s flow:
                source:      192.168.0.11 [trust]
                dst:         129.187.7.11
                proto:       50
                sport:       20033           dport:      20033
                state:       ACTIVE          type:       FLOW
                src user:    unknown
                dst user:    unknown

        s2c flow:
                source:      129.187.7.11 [untrust]
                dst:         192.168.0.11
                proto:       50
                sport:       20033           dport:      20033
                state:       ACTIVE          type:       FLOW
                src user:    unknown
                dst user:    unknown

        start time                           : Thu Jun 11 11:58:59 2015
        timeout                              : 3600 sec
        time to live                         : 3142 sec
        total byte count(c2s)                : 1080
        total byte count(s2c)                : 1014
        layer7 packet count(c2s)             : 8
        layer7 packet count(s2c)             : 5
        vsys                                 : vsys1
        application                          : ipsec-esp
        rule                                 : any-any
        session to be logged at end          : True
        session in session ager              : True
        session updated by HA peer           : False
        layer7 processing                    : completed
        URL filtering enabled                : False
        URL category                         : any
        session via syn-cookies              : False
        session terminated on host           : False
        session traverses tunnel             : False
        captive portal session               : False
        ingress interface                    : ethernet1/2
        egress interface                     : ethernet1/1
        session QoS rule                     : N/A (class 4)
        tracker stage l7proc                 : ctd app has no decoder
        end-reason                           : unknown"""

ALL = """\
--------------------------------------------------------------------------------
ID          Application    State   Type Flag  Src[Sport]/Zone/Proto (translated IP[Port])
Vsys                                          Dst[Dport]/Zone (translated IP[Port])
--------------------------------------------------------------------------------
791          ipsec-esp      ACTIVE  FLOW       192.168.0.11[20033]/trust/50  (192.168.0.11[20033])
vsys1                                          129.187.7.11[20033]/untrust  (129.187.7.11[20033])"""


def today(hour, minute, second):
    """A time of today, in seconds since the epoch."""
    now = time.localtime()
    return time.mktime((now.tm_year, now.tm_mon, now.tm_mday, hour, minute, second, 0, 0, -1))


@pytest.fixture
def sample():
    started = time.mktime((2015, 6, 11, 11, 58, 59, 0, 0, -1))
    return {**SAMPLE, "start_time": started}


def test_one_session_is_pan_os_to_the_byte(sample):
    assert render.session_detail(sample) == DETAIL


def test_the_columns_are_those_measured_on_pan_os(sample):
    lines = render.session_detail(sample).splitlines()
    header, source, ports, footer = lines[2], lines[3], lines[6], lines[20]
    assert header.index("c2s flow:") == 8
    assert (source.index("source:"), source.index("192.")) == (16, 29)
    assert (ports.index("20033"), ports.index("dport:"), ports.rindex("20033")) == (29, 45, 57)
    assert (footer.index("start time"), footer.index(":")) == (8, 45)


def test_an_spi_fits_its_column(sample):
    sample["c2s"] = {**sample["c2s"], "sport": 4294967295, "dport": 4294967295}
    line = render.session_detail(sample).splitlines()[6]
    assert line == "                sport:       4294967295      dport:      4294967295"


def test_an_ended_session_has_no_time_to_live(sample):
    ended = {**sample, "state": "INIT", "in_ager": False, "time_to_live_s": None, "end_reason": "aged-out"}
    text = render.session_detail(ended)
    assert "time to live" not in text
    assert "        session in session ager              : False\n" in text
    assert text.endswith("        end-reason                           : aged-out")


def test_what_pan_os_has_no_field_for_follows_under_its_own_heading(sample):
    ipsec = {
        "spis_seen": {"c2s": [0x8AB38AB6], "s2c": []},
        "child_sa": "net",
        "ike_sa": "gw",
        "local_id": "a",
        "remote_id": "b",
        "reqid": 3,
        "rekeys": 2,
        "spis_in_kernel": 1,
        "nat_t_ports": [4500, 61000],
        "sa_stale_s": 65.0,
        "sa_removed": None,
        "sa_end": None,
        "fragments": {"c2s": 3, "s2c": 0},
    }
    text = render.session_detail({**sample, "ipsec": ipsec})
    assert text.startswith(DETAIL + "\n\n        IPsec, as seen by fwd:\n")
    for line in (
        "        CHILD_SA                             : net (reqid 3)",
        "        NAT-T UDP ports (c2s)                : 4500 to 61000",
        "        SPIs seen on the wire (c2s)          : 2327022262 (0x8ab38ab6)",
        "        SPIs seen on the wire (s2c)          : none yet",
        "        SA confirmed by strongSwan           : no, not for 1 min 5 s",
    ):
        assert line in text.splitlines()
    fresh = render.session_detail({**sample, "ipsec": {**ipsec, "sa_stale_s": None}})
    assert "        SA confirmed by strongSwan           : yes" in fresh.splitlines()
    gone = {**ipsec, "sa_stale_s": None, "sa_removed": today(14, 14, 35), "sa_end": "deleted"}
    text = render.session_detail({**sample, "ipsec": gone})
    assert "        SA confirmed by strongSwan           : no, deleted at 14:14:35" in text.splitlines()


def test_all_sessions_are_pan_os_to_the_byte(sample):
    lines = list(render.session_rows([sample]))
    assert "\n".join(lines) == ALL
    header, row = lines[1], lines[4]
    assert [header.index(word) for word in ("ID", "Application", "State", "Type", "Flag", "Src[")] == [
        0,
        12,
        27,
        35,
        40,
        46,
    ]
    assert [row.index(word) for word in ("ipsec-esp", "ACTIVE", "FLOW", "192.168")] == [13, 28, 36, 47]
    assert lines[5].index("129.") == 47


def test_long_values_keep_a_space_between_columns(sample):
    sample = {**sample, "id": 123456789012345, "state": "DISCARD", "application": "ipsec-esp-udp"}
    row = list(render.session_rows([sample]))[4]
    assert row.split()[:4] == ["123456789012345", "ipsec-esp-udp", "DISCARD", "FLOW"]


def test_no_session_and_counts():
    assert list(render.session_rows([])) == ["No Active Sessions"]
    assert render.session_count(7) == "Number of sessions that match filter: 7"
    assert render.session_count(0) == "No Active Sessions"


def test_counters_are_pan_os():
    counter = {
        "name": "pkt_recv",
        "value": 5387128,
        "rate": 2,
        "severity": "info",
        "category": "packet",
        "aspect": "pktproc",
        "description": "Packets received",
    }
    text = render.counters({"elapsed_s": 2.044, "counters": [counter, {**counter, "name": "quiet", "value": 0}]})
    assert text.splitlines()[1:] == [
        "Global counters:",
        "Elapsed time since last sampling: 2.044 seconds",
        "",
        "name                                   value     rate severity  category  aspect    description",
        "-" * 80,
        "pkt_recv                             5387128        2 info      packet    pktproc   Packets received",
        "-" * 80,
        "Total counters shown: 1",
        "-" * 80,
    ]


def test_tunnels_at_eighty_columns():
    tunnel = {
        "ike_sa": "gw",
        "child_sa": "net",
        "local": "2001:db8:c::1",
        "remote": "2001:db8:c::2",
        "spi_in": 0xFFFFFFFF,
        "spi_out": 1,
        "nat_t_ports": None,
        "session": 7,
        "age_s": 3700,
        "stale_s": None,
    }
    source = {"connected": True, "socket": "/run/charon.vici", "last_answer_age_s": 3, "reason": ""}
    text = render.tunnels({"source": source, "tunnels": [tunnel]}, 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "4294967295 (0xffffffff)" in text and "1 h 1 min" in text and "fresh" in text
    gone = {"connected": False, "socket": "/x", "last_answer_age_s": None, "reason": "no such socket"}
    assert "AWAY (no such socket), never answered" in render.tunnels({"source": gone, "tunnels": []}, 80)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3661, "1 h 1 min"), (90000, "1 d 1 h")],
)
def test_durations(seconds, text):
    assert render.duration(seconds) == text


def test_a_time_has_its_date_if_that_is_not_todays():
    assert time_of_day(today(0, 0, 0)) == "00:00:00"
    assert time_of_day(time.mktime((2025, 11, 4, 14, 14, 35, 0, 0, -1))) == "Nov 04 14:14:35"


# --- tables of SPIs ---------------------------------------------------------------------------------------------

SEQUENCE = {"lost": 0, "late": 0, "depth": 0, "duplicates": 0, "resets": 0, "wraps": 0, "outliers": 0}


def use(spi, packets=63, **changes):
    return {
        "spi": spi,
        "first_seen": today(14, 14, 35),
        "last_seen": today(14, 14, 37),
        "packets": packets,
        "bytes": packets * 156,
        "sequence": {**SEQUENCE, **changes},
    }


def pair(spi_in, spi_out, removed=None, overlap=None, **changes):
    return {
        "spi_in": spi_in,
        "spi_out": spi_out,
        "esn": False,
        "installed": today(14, 14, 35),
        "removed": removed,
        "end": removed and "rekeyed",
        "in": use(spi_in),
        "out": use(spi_out),
        "overlap_s": {"in": overlap, "out": overlap},
        "strongswan": None,
        **changes,
    }


PAIRS = [
    pair(0xD2A3D896, 0x044D222B, today(14, 14, 39)),
    pair(0x72DA46C8, 0x3C80788E, overlap=0.4, esn=True, out=use(0x3C80788E, late=2, depth=3, wraps=1, outliers=2)),
]


def test_generations_on_a_wide_page():
    lines = render.generation_table(PAIRS, 120)
    assert max(map(len, lines)) == len(lines[1]) == len(lines[3]) <= 120 and set(lines[1]) == {"-"}
    assert lines[4] == (
        "1  in   3533953174 (0xd2a3d896)  14:14:35    14:14:37        63   9828     0     0    0"
        "  14:14:35, rekeyed 14:14:39"
    )
    assert lines[6].endswith("  14:14:35, in use") and lines[7].endswith("  ESN, 0.4 s beside #1")
    assert lines[8] == "SPI 0x3c80788e: late by up to 3 numbers, 1 wrap, 2 outliers" and len(lines) == 9


def test_generations_at_eighty_columns():
    lines = render.generation_table(PAIRS, 80)
    assert all(len(line) <= 80 for line in lines)
    assert lines[4:10] == [
        "1 in  0xd2a3d896 14:14:35   14:14:37       63  9828    0    0   0",
        "  out 0x044d222b 14:14:35   14:14:37       63  9828    0    0   0",
        "      installed, end: 14:14:35, rekeyed 14:14:39",
        "2 in  0x72da46c8 14:14:35   14:14:37       63  9828    0    0   0",
        "  out 0x3c80788e 14:14:35   14:14:37       63  9828    0    2   0",
        "      installed, end: 14:14:35, in use; ESN, 0.4 s beside #1",
    ]


def test_spis_in_transit_at_eighty_columns(sample):
    seen = {"relation": "takes-over", "before": 0x11111111, "evidence": "observed-unique", "partner": 0x22222222}
    spis = {"c2s": [{**use(0xFFFFFFFF, 10**9), **seen}], "s2c": [use(7)]}
    ipsec = {
        "spis_seen": {"c2s": [0xFFFFFFFF], "s2c": [7]},
        "child_sa": None,
        "spis_in_kernel": 0,
        "nat_t_ports": None,
        "fragments": {"c2s": 0, "s2c": 0},
        "findings": [{"trouble": "fragments", "text": "some long text about fragments that wants more than a line"}],
        "spis": spis,
    }
    lines = render.session_detail({**sample, "ipsec": ipsec}, 80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    row = next(number for number, line in enumerate(lines) if line.startswith("c2s 0xffffffff"))
    assert lines[row + 1] == "      pair, story: with 0x22222222 (observed-unique); takes over from 0x11111111"
    assert lines[row + 2].startswith("s2c 0x00000007")


def tunnel_of(**changes):
    tunnel = {
        "ike_sa": "gw",
        "child_sa": "net",
        "reqid": 1,
        "mode": "TUNNEL",
        "local": "2001:db8:c::1",
        "remote": "2001:db8:c::2",
        "local_id": "fwd.lab",
        "remote_id": "peer.lab",
        "session": 2,
        "state": "ACTIVE",
        "ended": None,
        "end_reason": "unknown",
        "rekeys": 1,
        "nat_t_ports": [4500, 4500],
        "generations": PAIRS,
        "findings": [],
    }
    return {**tunnel, **changes}


SOURCE = {"connected": True, "socket": "/run/charon.vici", "last_answer_age_s": 3, "reason": ""}


def test_a_tunnel_in_detail_at_eighty_columns():
    compared = {"packets_in": 26, "packets_out": 27, "fwd_more_in": 0, "fwd_more_out": -1, "age_s": 12.3}
    pairs = [PAIRS[0], {**PAIRS[1], "strongswan": compared}]
    tunnel = tunnel_of(generations=pairs, findings=[{"trouble": "one-way", "text": "word " * 40}])
    lines = render.tunnel_detail({"source": SOURCE, "tunnels": [tunnel], "strangers": []}, 80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "  packets  SPI 0x72da46c8, 12 s ago: strongSwan 26 in, 27 out; fwd +0 in, -1 out" in lines


def test_a_tunnel_that_ended_is_marked_as_such():
    ended = tunnel_of(ended=today(14, 20, 0), end_reason="tunnel-down", state="INIT")
    text = render.tunnel_detail({"source": SOURCE, "tunnels": [ended], "strangers": []})
    assert "  session  2 (ended at 14:20:00: tunnel-down), 1 rekey" in text and "trouble" not in text


def test_many_long_tunnels_keep_their_titles_between_the_rules():
    tunnel = {
        "ike_sa": "a-connection-with-a-long-name-to-東京",
        "child_sa": "a-child-with-a-long-name",
        "local": "2001:db8:aaaa:bbbb:cccc:dddd:eeee:1",
        "remote": "2001:db8:aaaa:bbbb:cccc:dddd:eeee:2",
        "spi_in": 0xFFFFFFFF,
        "spi_out": 1,
        "nat_t_ports": [4500, 4500],
        "session": 7,
        "age_s": 3700,
        "stale_s": 3700,
    }
    lines = render.tunnels({"source": SOURCE, "tunnels": [tunnel]}, 80).splitlines()
    assert all(wcswidth(line) <= 80 for line in lines)
    assert lines[5].index("2001:") == lines[3].index("Remote")
    assert [number for number, line in enumerate(lines) if set(line) == {"-"}] == [1, 4]
    assert lines[3].split() == ["CHILD_SA", "Remote", "SPI", "out", "Session", "Age", "SA"]


# --- session id: IKE, and what is beside it ---------------------------------------------------------------------


def test_each_ike_sa_has_its_block_and_sessions_beside_have_theirs(sample):
    sa = {
        "initiator_spi": "01" * 8,
        "responder_spi": "02" * 8,
        "version": "2.0",
        "messages": 4,
        "retransmits": 0,
        "last_exchange": "IKE_AUTH",
        "last_seen": today(9, 0, 0),
        "completed": None,
        "floated": None,
    }
    linked = [
        {"id": 3, "application": "ike", "state": "INIT", "end_reason": "aged-out"},
        {"id": 4, "application": "ipsec-esp", "state": "ACTIVE", "end_reason": "unknown"},
    ]
    lines = render.session_detail(
        {**sample, "ike": [sa, {**sa, "initiator_spi": "03" * 8}], "linked": linked, "nat_keepalives": 5}
    ).splitlines()
    assert [line for line in lines if "IKE_SA" in line] == [
        "        IKE_SA 0101010101010101_i 0202020202020202_r, as seen on the wire:",
        "        IKE_SA 0303030303030303_i 0202020202020202_r, as seen on the wire:",
    ]
    assert lines[-4:] == [
        "        Beside it, of the same tunnel or peers:",
        "        session 3                            : ike, ended (aged-out)",
        "        session 4                            : ipsec-esp, ACTIVE",
        "        NAT keepalives                       : 5",
    ]


# --- monitor ----------------------------------------------------------------------------------------------------


def happened(name, **changes):
    return {
        "number": 1,
        "time": today(14, 17, 24) + 0.717,
        "event": name,
        "id": 2,
        "application": "ipsec-udp",
        "tunnel": "gw/net",
        "source": "2001:db8:c::2",
        "sport": 0x468636A7,
        "destination": "2001:db8:c::1",
        "dport": 0x5D7FD6C6,
        "rule": "any-any",
        "packets": 1,
        "bytes": 156,
        "end_reason": "tunnel-down",
        **changes,
    }


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            happened("rekeyed", spi_in=0x5D7FD6C6, spi_out=0x468636A7),
            "rekeyed   session 2 gw/net: in 0x5d7fd6c6, out 0x468636a7",
        ),
        (
            happened("created"),
            "created   session 2 gw/net 2001:db8:c::2[0x468636a7] -> 2001:db8:c::1[0x5d7fd6c6], rule any-any",
        ),
        (happened("ended"), "ended     session 2 gw/net: tunnel-down, 1 packet, 156 bytes"),
        (
            happened("absorbed", tunnel=None, application="ipsec-esp", sport=20033, dport=20033, into=7),
            "absorbed  session 2 ipsec-esp 2001:db8:c::2[20033] -> 2001:db8:c::1[20033]: absorbed into session 7",
        ),
        (
            happened("trouble", trouble="silent", text="no packet", over=True),
            "trouble   session 2 gw/net: no more silent",
        ),
        (
            {**happened("counter"), "counter": "tunnel_silent", "amount": 1, "value": 2, "description": "Tunnels"},
            "counter   tunnel_silent +1 = 2",
        ),
        (
            {**happened("counter"), "counter": "pkt_x", "amount": 1, "value": 2, "description": "Packets"},
            "counter   pkt_x +1 = 2 (Packets)",
        ),
        (happened("missed", count=3), "missed    3 events were forgotten before they were read"),
        (happened("stale", over=False, reason="gone"), "stale     strongSwan is away: gone"),
    ],
)
def test_events_fit_the_page(event, text):
    assert render.event(event, 10_000) == f"14:17:24.717 {text}"
    lines = render.event(event, 80).splitlines()
    assert all(len(line) <= 80 for line in lines) and all(line.startswith(" " * 23) for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == f"14:17:24.717 {text}"


def test_findings_stand_by_area_and_commands_on_one_line():
    def finding(area, level, text, action=""):
        return {"area": area, "check": "clock", "level": level, "text": text, "action": action}

    findings = [
        finding("kernel", "ok", "right"),
        finding("kernel", "warning", "warning " * 12 + "end", "a command that is longer than the page is wide " * 2),
        finding("strongSwan", "unknown", "could not look: dark"),
    ]
    page = render.diagnosis({"hostname": "gw", "user": "ann", "findings": findings}, 60)
    lines = click.unstyle(page).splitlines()
    assert lines[:4] == ["fwd on gw, as ann sees it", "", "Kernel", "  ok       right"]
    assert lines[4].startswith("  warning  warning warning") and lines[5].startswith(" " * 11 + "warning")
    assert lines[7] == f"{'':11}-> {findings[1]['action']}" and all(len(line) <= 60 for line in lines[:7])
    assert lines[8:11] == ["", "strongSwan", "  unknown  clock: could not look: dark"]
    assert lines[11:] == ["", "1 ok, 0 notes, 1 warning, 0 problems, 1 unknown"]
    assert "\x1b[33mwarning\x1b[0m" in page
