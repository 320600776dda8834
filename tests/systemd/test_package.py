"""The Debian package on a system of its own, with systemd as its first process: `make deb-test`.

One test for a life in the order in which it is led, because each step stands on the one before.
"""

import os
import platform
import shutil

import pytest

from lab.booted import Booted
from lab.root_folder import root_folder
from tests.waiting import until

PACKAGE = os.environ.get("FWD_DEB", "")
# What the package depends on and recommends, and a strongSwan.
PACKAGES = (
    "systemd,systemd-sysv,init-system-helpers,procps,python3,libnetfilter-queue1,nftables,iptables,iproute2,"
    "charon-systemd,strongswan-swanctl"
)

ESP = """
import socket, struct, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 50)
for number in range(int(sys.argv[1]), int(sys.argv[2])):
    s.sendto(struct.pack("!II", 0x1234567, number) + bytes(40), ("192.0.2.9", 0))
    time.sleep(0.01)
"""

IMPORT_ALL = """
import importlib, pkgutil, fwd
for each in pkgutil.walk_packages(fwd.__path__, "fwd."):
    importlib.import_module(each.name)
"""

pytestmark = [
    pytest.mark.skipif(not PACKAGE, reason="make deb-test runs it"),
    pytest.mark.timeout(900),  # the first time a root folder is made
]


@pytest.fixture
def machine():
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]  # the package is for the release that built it
    with Booted(root_folder(f"package-{release}", PACKAGES, release=release)) as booted:
        yield booted


def test_it_installs_runs_upgrades_and_purges_clean(machine):
    shutil.copy(PACKAGE, machine.path("/root/fwd.deb"))
    machine.path("/root/esp.py").write_text(ESP)
    says(machine, "ip link add fw0 type veth peer name fw1")
    says(machine, "ip address add 192.0.2.1/24 dev fw0")
    says(machine, "ip link set fw1 up")
    says(machine, "ip link set fw0 up")
    says(machine, "ip neighbour add 192.0.2.9 lladdr 02:00:00:00:00:09 dev fw0")
    before = files(machine)

    # Installed, it runs: as its own user, started now and at each boot.
    says(machine, "dpkg --install /root/fwd.deb")
    assert says(machine, "systemctl is-active fwd") == "active\n"
    assert says(machine, "systemctl is-enabled fwd") == "enabled\n"
    assert says(machine, "ps -o user= -C fwd").split() == ["fwd"]
    assert "queue-rules: " in says(machine, "fwctl show system info")
    assert "systemctl" in says(machine, "fwd --print-default-config")
    done = machine.run("/usr/lib/fwd/bin/python3", "-c", IMPORT_ALL)  # nothing was taken out that fwd needs
    assert (done.returncode, done.stderr) == (0, "")
    for page in ("man1/fwctl.1.gz", "man5/fwd.toml.5.gz", "man8/fwd.8.gz"):
        assert machine.path(f"/usr/share/man/{page}").exists()
    completes = "COMP_WORDS='fwctl show sess' COMP_CWORD=2 _FWCTL_COMPLETE=bash_complete fwctl"
    assert "session" in machine.run("sh", "-c", completes).stdout

    # A strongSwan that starts later lets it in.
    says(machine, "systemctl start strongswan")
    until(lambda: "strongswan: connected" in says(machine, "fwctl show system info"))

    says(machine, "fwctl doctor")  # it finds no problem

    # A reload takes what the operator wrote.
    config = machine.path("/etc/fwd/fwd.toml")
    config.write_text(config.read_text().replace("# trust = ", "trust = "))
    says(machine, "systemctl reload fwd")

    # An upgrade leaves that alone, and hands over: the session goes on, and has each packet that was sent meanwhile.
    says(machine, "python3 /root/esp.py 1 11")
    until(lambda: "[20033]" in says(machine, "fwctl show session all"))
    began = line(says(machine, "fwctl show session id 1"), "start time")
    main_pid = says(machine, "systemctl show --property MainPID fwd")
    says(machine, "systemd-run --unit traffic --remain-after-exit python3 /root/esp.py 11 1011")
    says(machine, "dpkg --install /root/fwd.deb")
    assert says(machine, "systemctl show --property MainPID fwd") != main_pid
    until(lambda: "exited" in says(machine, "systemctl show --property SubState traffic"))
    session = says(machine, "fwctl show session id 1")
    assert line(session, "start time") == began
    assert line(session, "layer7 packet count(c2s)") == "1010"
    assert "\ntrust = " in config.read_text()

    # Removed, it is stopped and lets everything pass; configuration and logs are the operator's.
    says(machine, "systemctl stop strongswan")
    says(machine, "dpkg --remove fwd")
    assert "fwd" not in says(machine, "nft list tables")
    assert not machine.path("/run/fwd").exists()
    assert not machine.path("/usr/lib/fwd").exists()
    assert config.exists()
    assert machine.path("/var/log/fwd/traffic").exists()

    # Purged, nothing is left but its users, so that nobody else gets their numbers.
    says(machine, "dpkg --purge fwd")
    of_users = {"/etc/shadow-", "/etc/gshadow-"}  # what a newer systemd-sysusers copies before it adds to them
    assert files(machine) - before - of_users == {"/var/log/dpkg.log"}
    assert "fwd" in says(machine, "getent passwd fwd")


def says(machine: Booted, command: str) -> str:
    done = machine.run(*command.split())
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def files(machine: Booted) -> set[str]:
    """All files, but what the kernel shows and what systemd notes of units."""
    left_out = " -o ".join(f"-path {folder}" for folder in ("/proc", "/sys", "/dev", "/run/systemd"))
    listed = says(machine, f"find / /run -xdev ( {left_out} ) -prune -o -print")
    return set(listed.splitlines())


def line(text: str, name: str) -> str:
    """What stands behind a name and a colon."""
    return next(each.partition(":")[2].strip() for each in text.splitlines() if each.strip().startswith(name))
