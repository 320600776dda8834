from itertools import count

import pytest

from fwd import api as api_module
from fwd import rpc
from fwd.api import EVENTS_KEPT, PAIRS_PER_PAGE, Api
from fwd.cli import render
from fwd.core import session_filter, session_order
from fwd.core.events import SessionCreated
from fwd.core.sa import SaDeleted, SaEstablished, SaRekeyed, SaSnapshot, SaSourceAlive, SaSourceLost
from fwd.rpc import RpcError
from tests.builders import DENY_ALL, HERE, LEFT, PEER, RIGHT, Bench, child_sa, esp, ike, settings, udp


@pytest.fixture
def bench():
    bench = Bench()
    bench.sas(SaEstablished(child_sa()))
    bench.receive(esp(PEER, HERE, 0x1001, size=2000))
    bench.forward(esp(LEFT, RIGHT, 5))
    bench.forward(ike(LEFT, RIGHT))
    bench.now += 10
    bench.firewall.reconfigure(settings(DENY_ALL))
    bench.forward(esp("10.0.0.1", RIGHT, 5))
    return bench


@pytest.fixture
def api(bench):
    return Api(
        bench.firewall,
        lambda: bench.now,
        "/run/charon.vici",
        lambda: {"hostname": "here"},
        lambda: None,
        lambda _: None,
        lambda: {"configuration": "fwd.toml", "rules": 1, "sessions": 2},
    )


def ids(api, **words):
    chosen = {key.rstrip("_").replace("_", "-"): value for key, value in words.items()}
    return [session["id"] for session in api.dispatch("session.list", {"filter": chosen})["sessions"]]


def test_client_and_core_know_the_same_filter_keys():
    assert list(rpc.FILTER_KEYS) == list(session_filter.KEYS)


def test_client_and_core_know_the_same_orders():
    assert list(rpc.SORT_KEYS) == list(session_order.KEYS) and rpc.RATE_KEYS == session_order.RATES


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ({}, [1, 2, 3, 4]),
        ({"application": "ipsec-udp"}, [1]),
        ({"application": "IKE"}, [3]),
        ({"source": "198.51.100.0/24"}, [2, 3]),
        ({"source": PEER}, [1]),
        ({"destination": "203.0.113.2"}, [2, 3, 4]),
        ({"destination": "::/0"}, []),
        ({"source_port": "20033"}, [2, 4]),
        ({"destination_port": "4097"}, [1]),
        ({"protocol": "17"}, [3]),
        ({"from_": "trust"}, [2, 3, 4]),
        ({"to": "untrust"}, [1, 2, 3, 4]),
        ({"state": "discard"}, [4]),
        ({"type": "flow"}, [1, 2, 3, 4]),
        ({"rule": "nothing"}, [4]),
        ({"min_age": "10"}, [1, 2, 3]),
        ({"min_kb": "1"}, [1]),
        ({"ingress_interface": "left"}, [2, 3, 4]),
        ({"egress_interface": "right", "application": "ike"}, [3]),
        ({"spi": "0x1001"}, [1]),
        ({"spi": "8193"}, [1]),  # of the other direction
        ({"spi": "5"}, [2, 4]),  # in transit, as it was seen
        ({"tunnel": "net"}, [1]),
        ({"tunnel": "gw/net"}, [1]),
        ({"ike_id": "there"}, [1]),
        ({"ike_id": "CN=there, O=there"}, []),
        ({"state": "Active,DISCARD"}, [1, 2, 3, 4]),
        ({"state": "not active,opening"}, [4]),
        ({"source": "192.0.2.0/25,10.0.0.1,2001:db8::/32"}, [1, 4]),
        ({"source": "not 192.0.2.0/25,10.0.0.1"}, [2, 3]),
        ({"destination_port": "0x1001,500"}, [1, 3]),
        ({"min_age": "not 10"}, [4]),
        ({"tunnel": "not net,home"}, [2, 3, 4]),
        ({"from_": "trust", "rule": "not nothing", "protocol": "50,17", "spi": "not 5"}, [3]),
    ],
)
def test_every_filter_key(api, words, found):
    assert ids(api, **words) == found


def test_an_spi_finds_its_session_after_a_rekey_too(api, bench):
    bench.sas(SaRekeyed(child_sa(), child_sa(0x1002, 0x2002)))
    bench.sas(SaDeleted(child_sa()))
    bench.receive(esp(PEER, HERE, 0x1002))
    assert ids(api, spi="0x1001") == ids(api, spi="0x2002") == [1]
    assert ids(api, source_port="0x1001,0x2001") == [], "a port is what is shown now"


def test_prefixes_of_both_ip_versions(api, bench):
    bench.forward(esp("2001:db8::5", "2001:db8:1::5", 5))
    assert ids(api, source="2001:db8::/48") == ids(api, destination="2001:db8:1::5") == [5]
    assert ids(api, source="::/0,0.0.0.0/0") == [1, 2, 3, 4, 5] and ids(api, source="not ::/0") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("method", "params", "code", "message"),
    [
        ("session.steal", {}, rpc.METHOD_NOT_FOUND, "no method 'session.steal'"),
        ("session.get", {"id": 99}, rpc.NO_SUCH_SESSION, "no session 99"),
        ("session.get", {"id": "1"}, rpc.INVALID_PARAMS, "session.get: id: found '1'; want a valid integer"),
        ("session.get", {}, rpc.INVALID_PARAMS, "id: missing"),
        ("session.get", {"id": True}, rpc.INVALID_PARAMS, "id: found true"),
        ("session.list", {"limit": 10**9}, rpc.INVALID_PARAMS, "limit"),
        ("session.list", {"filter": {"colour": "red"}}, rpc.INVALID_PARAMS, "no filter key 'colour'"),
        ("session.list", {"filter": {"source": "x/99"}}, rpc.INVALID_PARAMS, "filter source: 'x/99' will not do"),
        ("session.list", {"filter": {"state": "drunk"}}, rpc.INVALID_PARAMS, "want one of init, opening"),
        *(
            (
                "session.list",
                {"filter": {key: value}},
                rpc.INVALID_PARAMS,
                f"filter {key}: '{value}' will not do: want a",
            )
            for key in ("min-kb", "min-age", "source-port", "destination-port", "protocol")
            for value in ("much", "nan", "inf", "-1", "1_0", "\u0661", "1e3", "", " 1", "9" * 5000)
        ),
        ("session.list", {"filter": {"spi": "5,0x100000000"}}, rpc.INVALID_PARAMS, "in decimal or, behind 0x, in hex"),
        ("session.list", {"filter": {"state": "active,"}}, rpc.INVALID_PARAMS, "filter state: 'active,' will not do"),
        ("session.list", {"filter": {"rule": "not "}}, rpc.INVALID_PARAMS, "filter rule: 'not ' will not do: want a"),
        ("session.list", {"filter": {"min-age": "1,2"}}, rpc.INVALID_PARAMS, "want a number such as"),
        ("session.list", {"filter": {"spi": "1," * 64 + "1"}}, rpc.INVALID_PARAMS, "65 values, want at most 64"),
        ("session.list", {"filter": {"source-port": "4294967296"}}, rpc.INVALID_PARAMS, "number from 0 to 4294967295"),
        (
            "session.list",
            {"filter": {"destination": "1.2.3"}},
            rpc.INVALID_PARAMS,
            "want an address or a prefix such as",
        ),
        ("session.clear", {}, rpc.INVALID_PARAMS, "either an id or a filter"),
        ("session.clear", {"id": 1, "filter": {}}, rpc.INVALID_PARAMS, "either an id or a filter"),
        ("session.info", {"what": 1}, rpc.INVALID_PARAMS, "what: no such key"),
    ],
)
def test_refusals_say_what_is_wrong(api, method, params, code, message):
    with pytest.raises(RpcError) as caught:
        api.dispatch(method, params)
    assert caught.value.code == code and message in caught.value.message


def test_pages_hold_every_session_once(api, bench):
    for host in range(1, 30):
        bench.forward(esp(f"10.9.0.{host}", RIGHT, 1))
    found, after = [], 0
    while after is not None:
        page = api.dispatch("session.list", {"after": after, "limit": 7})
        found += [session["id"] for session in page["sessions"]]
        after = page["next"]
    assert found == ids(api) == sorted(set(found)) and len(found) == 33


def test_a_page_looks_at_so_many_sessions_and_no_more(api, bench, monkeypatch):
    monkeypatch.setattr(api_module, "LOOKED_AT_ONCE", 3)
    first = api.dispatch("session.list", {"filter": {"state": "discard"}})
    assert first == {"sessions": [], "next": 3}
    last = api.dispatch("session.list", {"filter": {"state": "discard"}, "after": first["next"]})
    assert ([session["id"] for session in last["sessions"]], last["next"]) == ([4], None)
    assert api.dispatch("session.list", {"limit": 4, "after": 1})["next"] is None


@pytest.mark.parametrize(
    ("sort", "found"),
    [
        ("id", [1, 2, 3, 4]),
        ("age", [4, 1, 2, 3]),
        ("idle", [4, 1, 2, 3]),
        ("ttl", [3, 4, 1, 2]),
        ("packets", [1, 2, 3, 4]),
        ("bytes", [3, 2, 4, 1]),
        ("packet-rate", [1, 2, 3, 4]),
        ("bit-rate", [1, 2, 3, 4]),
        ("source", [4, 1, 2, 3]),
        ("destination", [1, 2, 3, 4]),
        ("from", [2, 3, 4, 1]),
        ("to", [1, 2, 3, 4]),
        ("application", [3, 2, 4, 1]),
        ("state", [1, 2, 3, 4]),
        ("rule", [1, 2, 3, 4]),
    ],
)
def test_every_order(api, bench, sort, found):
    """Of equals the lower id comes first, either way."""
    value = session_order.value_of(sort)
    values = {session.id: value(bench.firewall, session, bench.now) for session in bench.firewall.table}
    for descending in (False, True):
        answer = api.dispatch("session.rank", {"sort": sort, "descending": descending})
        wanted = found if not descending else sorted(sorted(values), key=values.__getitem__, reverse=True)
        assert [number for _, number in answer["ranked"]] == wanted
        assert (answer["matched"], answer["next"]) == (4, None)


def test_in_brief_is_what_is_printed_of_the_whole(api):
    whole, brief = (api.dispatch("session.list", {"brief": is_brief})["sessions"] for is_brief in (False, True))
    assert list(render.session_rows(brief)) == list(render.session_rows(whole))
    for long, short in zip(whole, brief, strict=True):
        assert short["c2s"].items() <= long["c2s"].items() and short.keys() < long.keys()
    assert api.dispatch("session.list", {"ids": [3, 1], "brief": True})["sessions"] == [brief[2], brief[0]]


def test_a_ranking_in_pages_gives_what_comes_before_what_is_known(api, bench, monkeypatch):
    monkeypatch.setattr(api_module, "RANKED_AT_ONCE", 2)
    largest = {"sort": "bytes", "descending": True, "limit": 1}
    first = api.dispatch("session.rank", largest)
    assert (first["ranked"], first["matched"], first["next"]) == ([(2028, 1)], 2, 2)
    last = api.dispatch("session.rank", {**largest, "after": 2, "beyond": 2028})
    assert (last["ranked"], last["matched"], last["next"]) == ([], 2, None)
    assert api.dispatch("session.rank", {**largest, "after": 4})["next"] is None
    assert api.dispatch("session.rank", {"filter": {"state": "discard"}, "after": 2})["ranked"] == [(4, 4)]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sort": "colour"}, "cannot sort by 'colour': use one of id, age"),
        ({"sort": "bytes", "beyond": "x"}, "beyond: 'x' is no value of 'bytes'"),
        ({"sort": "rule", "beyond": 3}, "beyond: 3 is no value of 'rule'"),
        ({"limit": 0}, "limit"),
    ],
)
def test_rankings_that_cannot_be(api, params, message):
    with pytest.raises(RpcError) as caught:
        api.dispatch("session.rank", params)
    assert caught.value.code == rpc.INVALID_PARAMS and message in caught.value.message


def test_sessions_by_their_ids(api):
    page = api.dispatch("session.list", {"ids": [3, 99, 1, 2], "limit": 3})
    assert ([session["id"] for session in page["sessions"]], page["next"]) == ([3, 1], 3)
    page = api.dispatch("session.list", {"ids": [3, 99, 1, 2], "limit": 3, "after": 3, "filter": {"to": "untrust"}})
    assert ([session["id"] for session in page["sessions"]], page["next"]) == ([2], None)


def test_a_live_session_tells_its_rates_and_its_troubles(api, bench):
    def tunnel():
        return api.dispatch("session.list", {"ids": [1], "live": True})["sessions"][0]

    assert tunnel()["rates"] == {"c2s": None, "s2c": None} and tunnel()["ipsec"]["outbound"] == "s2c"
    for seq in (*range(2, 60), *range(200, 242)):
        bench.wait(0.05)
        bench.receive(esp(PEER, HERE, 0x1001, seq=seq, size=72))
    seen = tunnel()
    assert seen["rates"]["c2s"]["packets"] == pytest.approx(20, rel=0.1)
    assert seen["rates"]["c2s"]["bits"] == pytest.approx(20 * 100 * 8, rel=0.1)
    assert seen["rates"]["s2c"] == {"packets": 0, "bits": 0} and seen["idle_s"] < 1
    assert [finding["trouble"] for finding in seen["findings"]] == ["loss"]
    fastest = api.dispatch("session.rank", {"sort": "packet-rate", "descending": True, "limit": 1})
    assert fastest["ranked"][0][1] == 1 and fastest["measured_s"] == pytest.approx(5)


def test_a_terminated_session_in_full(api):
    session = api.dispatch("session.get", {"id": 1})
    assert session["c2s"]["sport"] == session["s2c"]["dport"] == 0x2001
    assert session["c2s"]["source_zone"] == session["s2c"]["destination_zone"] == "untrust"
    assert (session["c2s"]["packets"], session["c2s"]["bytes"]) == (1, 2028)
    assert (session["timeout_s"], session["time_to_live_s"], session["end_reason"]) == (3600, 3590, "unknown")
    assert (session["ipsec"]["child_sa"], session["ipsec"]["sa_stale_s"]) == ("net", 10.0)  # VICI never answered
    assert session["terminated_on_host"] and session["in_ager"]


def test_clearing_says_how_many(api):
    assert api.dispatch("session.clear", {"filter": {"application": "ipsec-esp"}})["cleared"] == 2
    ended = api.dispatch("session.get", {"id": 2})
    assert (ended["state"], ended["in_ager"], ended["time_to_live_s"], ended["end_reason"]) == (
        "INIT",
        False,
        None,
        "cleared",
    )
    with pytest.raises(RpcError, match="no session 2"):
        api.dispatch("session.clear", {"id": 2})
    assert api.dispatch("session.clear", {"filter": {}}) == {"cleared": 2, "next": None, "until": 4}


def test_what_takes_an_ended_ones_place_is_not_cleared(api, bench, monkeypatch):
    monkeypatch.setattr(api_module, "LOOKED_AT_ONCE", 2)
    first = api.dispatch("session.clear", {"filter": {}})
    assert first == {"cleared": 2, "next": 2, "until": 4}
    second = api.dispatch("session.clear", {"filter": {}, "after": 2, "until": 4})
    assert second == {"cleared": 2, "next": None, "until": 4}
    (left,) = bench.firewall.table
    assert left.id == 5 and left.sa == child_sa(), "the tunnel is still up: its next session waits"


def test_a_look_ends_when_it_has_taken_long(api, bench, monkeypatch):
    monkeypatch.setattr(api_module, "LOOKS_A_GLANCE", 2)
    ticks = count(int(bench.now))
    monkeypatch.setattr(api, "_now", lambda: next(ticks))
    pages = [api.dispatch("session.count", {"after": after}) for after in (0, 1, 3)]
    assert pages == [{"count": 1, "next": 1}, {"count": 1, "next": 2}, {"count": 1, "next": None}]


def test_session_info_says_it_in_pan_oss_words(api, bench):
    bench.wait(70)
    bench.sas(SaEstablished(child_sa(7, 8, reqid=2, child_name="other")))
    bench.forward(esp(LEFT, RIGHT, 6))
    lines = render.session_info(api.dispatch("session.info", {})).splitlines()
    for label, value in {
        "Number of sessions supported:": "65536",
        "Number of allocated sessions:": "3",
        "Number of active ipsec-esp sessions:": "0",
        "Number of active predict sessions:": "2",
        "Number of discard sessions:": "1",
        "Session table utilization:": "0%",
        "Number of sessions created since bootup:": "7",
        "  ike default timeout:": "30 secs",
        "  Session timeout in discard state:": "60 secs",
        "Session accelerated aging:": "True",
        "  Accelerated aging threshold:": "80% of utilization",
        "  Scaling factor:": "2 X",
        "Number of ended sessions still readable:": "4",
        "  Next session to be looked at:": "in 60 secs",
        "  IPv6 firewalling:": "True",
        "Session behavior when resource limit is reached:": "drop",
    }.items():
        assert f"{label:<49}{value}" in lines


def test_counts_and_tunnels_and_info(api, bench):
    assert api.dispatch("session.count", {"filter": {"state": "active"}}) == {"count": 3, "next": None}
    info = api.dispatch("session.info", {})
    assert (info["sessions_allocated"], info["discard"], info["active"]["ike"]) == (4, 1, 1)
    assert info["limits"] == {
        "source": {"limit": 0, "most": 2},
        "peers": {"limit": 0, "most": 2},
        "half_open": {"limit": 0, "now": 3},
        "dropped": 0,
    }
    bench.sas(SaSourceLost("away"))
    bench.now += 5
    tunnels = api.dispatch("tunnel.list", {})
    assert tunnels["source"]["reason"] == "away" and not tunnels["source"]["connected"]
    (tunnel,) = tunnels["tunnels"]
    assert (tunnel["session"], tunnel["spi_in"], tunnel["stale_s"]) == (1, 0x1001, 15)
    counters = {counter["name"]: counter["value"] for counter in api.dispatch("counter.list", {})["counters"]}
    assert counters["pkt_recv"] == counters["pkt_session"] == 4
    assert api.dispatch("system.info", {}) == {"hostname": "here"}


@pytest.mark.parametrize(
    ("kind", "prefix", "names"),
    [
        ("zone", "", ["untrust", "trust", "any"]),
        ("zone", "un", ["untrust"]),
        ("rule", "", ["nothing", "default"]),
        ("interface", "", ["wan", "left", "right"]),
        ("tunnel", "n", ["net"]),
        ("session", "", ["1", "2", "3", "4"]),
        ("session", "4", ["4"]),
        ("session", "04", []),
        ("session", "\u0664", []),
    ],
)
def test_values_that_somebody_may_want_to_type(api, kind, prefix, names):
    values = api.dispatch("complete.values", {"kind": kind, "prefix": prefix})["values"]
    assert [name for name, _ in values] == names and all(meaning for _, meaning in values)


def test_values_offered_are_few_of_many(api, bench):
    for host in range(1, 250):
        bench.forward(esp(f"10.9.0.{host}", RIGHT, 1))
    offered = [int(value) for value, _ in api.dispatch("complete.values", {"kind": "session", "prefix": "2"})["values"]]
    assert offered == [2, *range(20, 30), *range(200, 239)] and len(offered) == api_module.VALUES_OFFERED
    assert len(api.dispatch("complete.values", {"kind": "session"})["values"]) == api_module.VALUES_OFFERED


def test_long_counts_and_lists_come_in_pages(api, bench, monkeypatch):
    monkeypatch.setattr(api_module, "LOOKED_AT_ONCE", 2)
    monkeypatch.setattr(api_module, "SAS_PER_PAGE", 2)
    counts, after = [], 0
    while after is not None:
        page = api.dispatch("session.count", {"after": after})
        counts, after = [*counts, page["count"]], page["next"]
    assert counts == [2, 2]
    bench.sas(SaSnapshot(tuple(child_sa(n, n + 100, reqid=n) for n in (9, 3, 7, 5))))
    bench.sas(SaDeleted(child_sa(9, 109, reqid=9)))
    first = api.dispatch("tunnel.list", {})
    second = api.dispatch("tunnel.list", {"after": first["next"]})
    assert [[t["spi_in"] for t in page["tunnels"]] for page in (first, second)] == [[3, 7], [5]]
    assert second["next"] is None and second["source"]["connected"]


def test_an_answer_to_a_probe_is_an_answer(api, bench):
    bench.sas(SaSnapshot((child_sa(),)))
    bench.now += 22
    assert api.dispatch("tunnel.list", {})["source"]["last_answer_age_s"] == 22
    bench.sas(SaSourceAlive())
    source = api.dispatch("tunnel.list", {})["source"]
    assert (source["last_answer_age_s"], source["connected"]) == (0, True)


def test_only_clearing_changes_anything(api):
    assert {name for name, right in api.rights.items() if right != "read"} == {"session.clear", "system.reload"}


# --- explanations, tunnels, events ------------------------------------------------------------------------------


def drain(api, bench):
    while event := bench.firewall.next_event():
        api.note_event(event)


def test_every_session_is_explained_and_shown_in_detail(api):
    for number in ids(api):
        answer = api.dispatch("explain.session", {"id": number})
        assert answer["session"] == number and all(group["sentences"] for group in answer["groups"])
        assert api.dispatch("session.get", {"id": number})["linked"] is not None
    with pytest.raises(RpcError, match="no session 99"):
        api.dispatch("explain.session", {"id": 99})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"src": "here"}, "src: found 'here', want an IP address"),
        ({"dst": "::1"}, "different IP versions"),
        ({"spi": 0}, "spi"),
        ({"ports": [1]}, "ports"),
        ({"ports": [1, 70000]}, "ports"),
    ],
)
def test_a_packet_to_explain_that_cannot_be_says_what_is_wrong(api, changes, says):
    with pytest.raises(RpcError, match=says):
        api.dispatch("explain.packet", {"src": PEER, "dst": HERE, "spi": 0x1001, **changes})


def test_a_packet_is_explained_by_its_session(api):
    assert api.dispatch("explain.packet", {"src": PEER, "dst": HERE, "spi": 0x1001})["session"] == 1
    assert api.dispatch("explain.packet", {"src": PEER, "dst": HERE, "spi": 1})["session"] is None


def test_tunnels_in_detail_by_either_name(api):
    for name in (None, "gw", "net"):
        (tunnel,) = api.dispatch("tunnel.detail", {"name": name})["tunnels"]
        (generation,) = tunnel["generations"]
        assert (tunnel["session"], generation["spi_in"], generation["in"]["packets"]) == (1, 0x1001, 1)
    with pytest.raises(RpcError, match="no tunnel 'other'"):
        api.dispatch("tunnel.detail", {"name": "other"})


def test_events_come_in_order_once_each_and_by_filter(api, bench):
    start = api.dispatch("event.list", {})
    assert start == {"events": [], "next": 0, "lost": 0}
    drain(api, bench)
    first = api.dispatch("event.list", {"after": 0, "limit": 2})
    assert [event["number"] for event in first["events"]] == [1, 2] and first["lost"] == 0
    rest = api.dispatch("event.list", {"after": first["next"]})
    assert [event["number"] for event in rest["events"]] == list(range(3, rest["next"] + 1))
    assert api.dispatch("event.list", {"after": rest["next"]})["events"] == []
    tunnel = api.dispatch("event.list", {"after": 0, "filter": {"application": "ipsec-udp"}})
    assert [event["event"] for event in tunnel["events"]] == ["created", "promoted"]
    assert tunnel["next"] == rest["next"]
    for words, about in (({"spi": "5"}, {2, 4}), ({"spi": "0x2001"}, {1}), ({"tunnel": "not net", "to": "any"}, set())):
        page = api.dispatch("event.list", {"after": 0, "filter": words})
        assert {event["id"] for event in page["events"]} == about


def test_a_slow_reader_is_told_how_many_events_it_missed(api, bench):
    drain(api, bench)
    before = api.dispatch("event.list", {})["next"]
    event = SessionCreated(bench.firewall.table.find(1))
    for _ in range(EVENTS_KEPT + 10):
        api.note_event(event)
    page = api.dispatch("event.list", {"after": before})
    assert page["lost"] == 10 and page["events"][0]["number"] == before + 11
    assert api.dispatch("event.list", {"after": 10**9}) == {"events": [], "next": before + EVENTS_KEPT + 10, "lost": 0}


def all_of(api, name=None):
    """The tunnels of all pages, and how many pages these were."""
    found, pages, after = [], 0, 0
    while after is not None:
        page = api.dispatch("tunnel.detail", {"name": name, "after": after})
        found, pages, after = found + page["tunnels"], pages + 1, page["next"]
    return found, pages


def test_pages_of_tunnels_hold_each_once(api, bench):
    for number in range(2, 3 * PAIRS_PER_PAGE):
        bench.firewall.apply_sa(SaEstablished(child_sa(number, 10**6 + number, reqid=number)), bench.now)
    found, pages = all_of(api)
    numbers = [tunnel["session"] for tunnel in found]
    assert numbers == sorted(set(numbers)) and len(numbers) == 3 * PAIRS_PER_PAGE - 1 and pages == 3
    assert len(all_of(api, "net")[0]) == len(numbers)


def test_a_page_ends_by_the_number_of_its_pairs(api, bench):
    for reqid in range(1, 11):
        for generation in range(30):
            sa = child_sa(
                reqid * 1000 + generation, 10**6 + reqid * 1000 + generation, reqid=reqid, uniqueid=generation
            )
            bench.firewall.apply_sa(SaEstablished(sa), bench.now)
    page = api.dispatch("tunnel.detail", {})
    assert sum(len(tunnel["generations"]) for tunnel in page["tunnels"]) <= PAIRS_PER_PAGE
    assert len(all_of(api)[0]) == 10


def test_a_tunnel_that_ended_is_shown_while_it_is_readable(api, bench):
    bench.sas(SaDeleted(child_sa()))
    assert api.dispatch("tunnel.detail", {})["tunnels"][0]["state"] == "CLOSING"
    bench.wait(10)
    (tunnel,) = api.dispatch("tunnel.detail", {"name": "gw"})["tunnels"]
    (generation,) = tunnel["generations"]
    assert (tunnel["state"], tunnel["end_reason"], tunnel["ended"] - generation["removed"]) == (
        "INIT",
        "tunnel-down",
        pytest.approx(5, abs=0.5),
    )
    assert generation["end"] == "deleted"
    bench.wait(bench.firewall.settings.keep_ended_s + 2)
    with pytest.raises(RpcError, match="no tunnel 'gw'"):
        api.dispatch("tunnel.detail", {"name": "gw"})


def test_an_sa_that_is_gone_is_not_said_to_be_confirmed(api, bench):
    def standing():
        ipsec = api.dispatch("session.get", {"id": 1})["ipsec"]
        return ipsec["sa_stale_s"], ipsec["sa_end"], ipsec["sa_removed"]

    bench.sas(SaSnapshot((child_sa(),)))
    assert standing() == (None, None, None)
    bench.clear(bench.firewall.table.find(1))
    bench.sas(SaDeleted(child_sa()))
    assert standing()[:2] == (None, "deleted") and standing()[2] is not None


def test_nat_keepalives_are_shown(api, bench):
    bench.firewall.reconfigure(settings())
    bench.forward(udp(LEFT, RIGHT, 4500, 4500, b"\xff"))
    assert api.dispatch("session.get", {"id": 2})["nat_keepalives"] == 1


def test_an_event_shows_its_session_as_it_was(api, bench):
    drain(api, bench)
    after = api.dispatch("event.list", {})["next"]
    bench.forward(esp("10.0.0.9", RIGHT, 5))
    drain(api, bench)
    bench.firewall.reconfigure(settings())
    session = bench.sessions[-1]
    bench.forward(esp("10.0.0.9", RIGHT, 5))
    bench.clear(session)
    drain(api, bench)
    events = api.dispatch("event.list", {"after": after})["events"]
    assert [(event["event"], event["state"], event["packets"]) for event in events] == [
        ("created", "DISCARD", 1),
        ("discarded", "DISCARD", 1),
        ("ended", "INIT", 2),
    ]
    shown = api.dispatch("event.list", {"after": after, "filter": {"state": "discard"}})["events"]
    assert [event["event"] for event in shown] == ["created", "discarded"]


def test_a_session_that_becomes_part_of_another_is_told_of(api, bench):
    bench.firewall.reconfigure(settings())
    bench.receive(esp(PEER, HERE, 3))
    provisional = bench.sessions[-1].id
    bench.sas(SaRekeyed(child_sa(), child_sa(3, 4, uniqueid=2)))
    drain(api, bench)
    events = api.dispatch("event.list", {"after": 0})["events"]
    assert [(e["id"], e["into"], e["packets"]) for e in events if e["event"] == "absorbed"] == [(provisional, 1, 1)]


def test_a_session_that_turns_into_its_tunnel_goes_on_under_its_id(api, bench):
    bench.firewall.reconfigure(settings())
    bench.receive(esp(PEER, HERE, 0x5001))
    bench.receive(esp(PEER, HERE, 0x6001))
    first, second = (session.id for session in bench.sessions[-2:])
    bench.sas(SaEstablished(child_sa(0x6001, 0x6002, reqid=2)))
    bench.wait(6)
    drain(api, bench)
    events = api.dispatch("event.list", {"after": 0})["events"]
    assert "absorbed" not in [event["event"] for event in events if event.get("id") in (first, second)]
    assert bench.firewall.table.find(second).application == "ipsec-udp"


def test_what_is_no_tunnels_follows_the_tunnels(api, bench):
    bench.firewall.reconfigure(settings())
    for seq in range(1, 4):
        bench.receive(esp(PEER, HERE, 0x7777, seq))
        bench.wait(10)
    answer = api.dispatch("tunnel.detail", {})
    (stranger,) = answer["strangers"]
    assert (stranger["packets"], stranger["findings"][0]["trouble"]) == (3, "unknown-spi")
    text = render.tunnel_detail(answer)
    assert f"No tunnel's: session {stranger['session']}" in text and "0x00007777" in text
    assert api.dispatch("tunnel.detail", {"name": "net"})["strangers"] == []
