"""`fwctl doctor` in front of real states: a daemon of its own user, then much that is wrong at once."""

import json
import signal
import subprocess
import sys

from lab.lab import PROGRAMS, wait_for
from tests.torture.test_privileges import AsUser

READER = """
import signal
from netfilterqueue import NetfilterQueue
queue = NetfilterQueue()
queue.bind(20, lambda packet: packet.drop())
print("bound", flush=True)
signal.pause()
"""

FOREIGN = """
table inet foreign {
  chain input {
    type filter hook input priority filter; policy drop;
    ct state established accept
    udp dport { 500, 4500 } accept
  }
}
"""


def doctor(host, status):
    done = host.run([str(PROGRAMS / "fwctl"), "doctor", "--json"], check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout)["findings"]


def levels(findings, area, check):
    return [(found["level"], found["text"]) for found in findings if (found["area"], found["check"]) == (area, check)]


def test_what_is_wrong_is_found_where_it_is_wrong(terminated):
    host, charon = terminated.hosts["fwd"], terminated.charon("fwd")
    fwd = AsUser(terminated)
    (closed,) = levels(doctor(host, 1), "strongSwan", "VICI")
    assert closed[0] == "problem" and f"may not open {charon.vici_path} (uid 0, gid 0, mode 0770)" in closed[1]

    fwd.open_vici()
    wait_for(fwd.hears_charon, "charon is heard")
    found = doctor(host, 0)
    assert {level for level, _ in levels(found, "rules", "fwd's rules")} == {"ok"}
    assert levels(found, "rules", "queue") == [
        ("ok", f"NFQUEUE 20 is read by fwd (pid {fwd.ask('show', 'system', 'info')['pid']})")
    ]
    assert "answers fwd on" in levels(found, "strongSwan", "VICI")[0][1]
    assert not [one for one in found if "defect" in one["text"]]

    fwd.process.send(signal.SIGKILL)
    fwd.process.wait(10)
    host.path("/run/foreign.nft").write_text(FOREIGN)
    host.run(["nft", "-f", "/run/foreign.nft"])
    host.run(["nft", "flush", "chain", "ip6", "fwd_dataplane", "forward"])
    reader = host.start([sys.executable, "-c", READER], stdout=subprocess.PIPE)
    assert reader.popen.stdout.readline() == "bound\n"
    charon.stop()
    found = doctor(host, 1)
    rules = levels(found, "rules", "fwd's rules")
    assert [level for level, _ in rules] == ["warning", "problem"]
    assert "none answers" in rules[0][1] and rules[1][1].startswith("IPv6: ") and "were removed" in rules[1][1]
    (queue,) = levels(found, "rules", "queue")
    assert queue[0] == "problem" and "read by another process than this fwd: python" in queue[1]
    (firewall,) = levels(found, "rules", "other firewalls")
    assert firewall == ("warning", "nft table inet foreign, chain input (input) drops ESP, although fwd let it pass")
    assert levels(found, "daemon", "socket")[0][0] == "problem"
