import time

import pytest

from fwd.cli import render

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
