"""Flow export to nfdump's collector: its totals are fwd's, packet for packet, through rekeys, a restart and a kill."""

import io
import json
import signal
import subprocess
from collections import Counter
from contextlib import suppress

import ipfix.ie
import ipfix.reader

from fwd.cli.client import Client
from fwd.rpc import RpcError
from lab.lab import default_config, wait_for

ipfix.ie.use_iana_default()

CONFIG = default_config() + '[ipfix]\ncollector = "udp:192.0.2.2:4739"\nactive-timeout = 1\n'
#: What carries flow records, and what they tell of.
CAPTURED = "udp port 4739 or esp or udp port 500"


def start_collector(host):
    host.path("/run/flows").mkdir()
    # Its semaphore outlives a nfcapd that a lab has ended, and would hold up the next one.
    command = ["unshare", "--ipc", "nfcapd", "-p", "4739", "-w", "/run/flows", "-t", "3600"]
    collector = host.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: host.run(["ss", "-Hlun", "sport = :4739"]).stdout, "nfcapd listens")
    return collector


def stop_collector(collector):
    """Gives what it logged."""
    collector.send(signal.SIGTERM)
    return collector.popen.communicate(timeout=60)[0]


def collected(host):
    """Packets and bytes from one address to another, by nfdump."""
    (file,) = host.path("/run/flows").glob("nfcapd.2*")
    shown = host.run(["nfdump", "-r", f"/run/flows/{file.name}", "-o", "json"]).stdout
    totals = Counter()
    for flow in json.loads(shown):
        ends = (flow.get("src4_addr") or flow["src6_addr"], flow.get("dst4_addr") or flow["dst6_addr"], flow["proto"])
        totals[*ends, "packets"] += flow["in_packets"]
        totals[*ends, "bytes"] += flow["in_bytes"]
    return totals


def ours(host, count):
    """The same by fwd: of the first `count` sessions, those that ended included."""
    totals = Counter()
    client = Client(str(host.path("/run/fwd/control.sock")))
    for session_id in range(1, count + 1):
        with suppress(RpcError):  # absorbed by another one
            session = client.call("session.get", id=session_id)
            for flow in (session["c2s"], session["s2c"]):
                for unit in ("packets", "bytes"):
                    totals[flow["source"], flow["destination"], flow["protocol"], unit] += flow[unit]
    client.close()
    return +totals


def decoded(capture):
    """The flow records in a capture."""
    messages = (p.octets[28:] for p in capture.packets if p.octets[9] == 17 and p.octets[22:24] == b"\x12\x83")
    records = ipfix.reader.from_stream(io.BytesIO(b"".join(messages))).namedict_iterator()
    return [record for record in records if "packetDeltaCount" in record]


def test_nfdump_counts_what_fwd_counts_through_rekeys_a_restart_and_a_kill(terminated):
    peer = terminated.hosts["peer"]
    collector = start_collector(peer)
    with terminated.hosts["fwd"].capture("to-peer", CAPTURED) as capture:
        fwd = terminated.start_fwd(CONFIG)
        terminated.initiate("peer-v4", "peer-v6")
        traffic = [terminated.start_ping(name, count=3000) for name in ("peer-v4", "peer-v6")]
        wait_for(lambda: fwd.counters()["ipfix_records_sent"] >= 4, "flows that go on are told of")
        terminated.charon("peer").rekey("peer-v4")
        terminated.charon("fwd").rekey("peer-v6")
        fwd.process.send(signal.SIGUSR1)
        fwd.process.wait(15)
        fwd = terminated.start_fwd(CONFIG)
        told = fwd.counters()["ipfix_records_sent"]
        wait_for(lambda: fwd.counters()["ipfix_records_sent"] > told, "they are told of again")
        fwd.kill()
        fwd = terminated.start_fwd(CONFIG)
        for process in traffic:
            process.end()
        fwd.fwctl("clear", "session", "all")
        wait_for(lambda: fwd.counters()["ipfix_packets_sent"] == fwd.counters()["pkt_session"], "all is told")
    counters = fwd.counters()
    sessions = ours(terminated.hosts["fwd"], counters["session_allocated"])
    info = fwd.json("show", "system", "info")["flow-export"]
    assert fwd.stop() == 0
    log = stop_collector(collector)
    theirs = collected(peer)
    print(json.dumps({" ".join(map(str, key)): value for key, value in theirs.items()}), log, info)

    assert info.startswith("udp:192.0.2.2:4739, sending; ")
    assert counters["ipfix_records_not_sent"] == 0 and theirs <= sessions
    assert theirs["192.0.2.1", "192.0.2.2", 50, "packets"] > 50
    packets, octets = (sum(n for (*_, name), n in theirs.items() if name == unit) for unit in ("packets", "bytes"))
    assert f"Packets: {packets}, Bytes: {octets}" in log
    assert counters["pkt_session"] == counters["ipfix_packets_sent"]
    assert counters["byte_session"] == counters["ipfix_bytes_sent"]
    if counters["ipfix_records_unsure"]:  # killed between its record of them and the sending
        return
    assert theirs == sessions and "Sequence Errors: 0" in log
    assert (packets, octets) == (counters["pkt_session"], counters["byte_session"])

    # nfdump keeps no SPI. Another decoder does, and tcpdump has seen the packets themselves.
    by_spi = Counter()
    records = decoded(capture)
    for record in records:
        if "IPSecSPI" in record:
            by_spi[record["IPSecSPI"]] += record["packetDeltaCount"]
    wire = Counter()
    for ends in (("192.0.2.1", "192.0.2.2"), ("2001:db8:c::1", "2001:db8:c::2")):
        protocol_at, header = (6, 40) if ":" in ends[0] else (9, 20)
        for packet in capture.packets:
            if {packet.source, packet.destination} == {*ends} and packet.octets[protocol_at] == 50:
                wire[int.from_bytes(packet.octets[header : header + 4])] += 1
    assert len(by_spi) == 8, "two pairs of SPIs of each tunnel"
    assert sum(wire.values()) - sum(by_spi.values()) <= counters["pkt_unseen"]
    if not counters["pkt_unseen"]:
        assert by_spi == wire
