"""A real fwd's metrics: over TCP and a unix socket, through a reload and a restart, beside real ESP."""

import json
import signal
import socket
import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lab.lab import LabError, default_config, wait_for

TCP = '[metrics]\nlisten = "127.0.0.1:9469"\n'
UNIX = '[metrics]\nlisten = "/run/fwd/metrics.sock"\n'


def ask(host):
    """The metrics over TCP, as text; what went wrong is raised."""
    url = "http://127.0.0.1:9469/metrics"
    return host.run(
        [sys.executable, "-c", f"import urllib.request as u; print(u.urlopen({url!r}).read().decode())"]
    ).stdout


def ask_by_path(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return client.makefile().read().partition("\n\n")[2]


def read(text):
    """All samples by name and labels, which are one text each."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, json.dumps(sample.labels, sort_keys=True)] = sample.value
    return found


def scrape(host):
    return read(ask(host))


def total(samples, name, **labels):
    wanted = labels.items()
    return sum(v for (n, of), v in samples.items() if n == name and wanted <= json.loads(of).items())


def test_metrics_follow_the_traffic_a_reload_and_a_restart(demo):
    host = demo.hosts["fwd"]
    fwd = demo.start_fwd(default_config() + TCP)
    demo.initiate("peer-v4", "sites-v4")
    assert demo.ping("peer-v4", 1) == demo.ping("sites-v4", 1) == 1  # the first of each comes to the daemon
    assert demo.ping("peer-v4", 19) == 19 and demo.ping("sites-v4", 9) == 9

    def is_read():
        samples = scrape(host)
        through = total(samples, "fwd_packets_total", from_zone="trust")
        return total(samples, "fwd_tunnel_packets_total") == 40 and through >= 20 and samples

    samples = wait_for(is_read, "the kernel's counts are read")
    (tunnel,) = fwd.sessions(application="ipsec-udp")
    assert total(samples, "fwd_tunnel_bytes_total", direction="in") == tunnel["c2s"]["bytes"]
    assert total(samples, "fwd_tunnel_sas", tunnel="peer-v4/peer-v4", remote_id="peer.lab") == 1
    assert total(samples, "fwd_packets_total") == total(samples, "fwd_pkt_session_total")
    assert total(samples, "fwd_bytes_total") == total(samples, "fwd_session_bytes_total")
    assert total(samples, "fwd_sessions") == len(fwd.sessions())
    assert total(samples, "fwd_sessions", application="ipsec-udp", state="ACTIVE", type="FLOW") == 1
    assert total(samples, "fwd_vici_up") == 1 and total(samples, "fwd_pkt_fast_path_total") > 30
    slow = total(samples, "fwd_pkt_recv_total") - total(samples, "fwd_pkt_fast_path_total")
    assert 0 < total(samples, "fwd_decision_seconds_count") <= slow

    fwd.reload(default_config() + UNIX)
    after = read(ask_by_path(host.path("/run/fwd/metrics.sock")))
    with pytest.raises(LabError, match="Connection refused"):
        ask(host)
    assert all(after[key] >= value for key, value in samples.items() if key[0].endswith("_total"))
    told = fwd.json("show", "system", "info")
    assert told["metrics"] == "/run/fwd/metrics.sock"

    fwd.process.send(signal.SIGUSR1)  # as systemctl restart does
    assert fwd.process.wait(15) == 10
    fwd = demo.start_fwd(default_config() + TCP)
    anew = scrape(host)
    assert total(anew, "fwd_pkt_session_total") >= total(after, "fwd_pkt_session_total") >= 60
    assert total(anew, "fwd_packets_total") <= total(anew, "fwd_pkt_session_total") - 60
    assert demo.ping("peer-v4", 5) == 5
    wait_for(lambda: total(scrape(host), "fwd_tunnel_packets_total") >= 10, "the kernel's counts are read")


def test_without_a_place_for_metrics_fwd_runs_and_says_so(transit):
    host = transit.hosts["fwd"]
    takes = "import socket; s = socket.create_server(('127.0.0.1', 9469)); print('taken', flush=True); s.accept()"
    taken = host.start([sys.executable, "-c", takes], stdout=subprocess.PIPE)
    assert taken.popen.stdout.readline() == "taken\n"
    fwd = transit.start_fwd(default_config() + TCP)
    why = "cannot listen on 127.0.0.1, port 9469 (Address already in use): [metrics] listen chooses another one"
    assert why in fwd.json("show", "system", "info")["metrics"] and why in fwd.log
    taken.end()
    fwd.reload(default_config() + TCP)
    assert total(scrape(host), "fwd_metrics_request_total") == 1
