"""The lab itself: it leaves nothing behind whatever ends it, labs do not meet, and its command line works."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lab import Lab
from lab.lab import default_config, wait_for
from lab.ping import outcome
from lab.root_folder import root_folder
from lab.running import FOLDER, Running, find, running
from lab.sandbox import LabError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: namespaces and strongSwan")

KINDS = ("pid", "mnt", "net", "uts")
REPOSITORY = Path(__file__).parents[2]

BUILD = """
import sys, time
from lab import Lab
with Lab("terminated") as lab:
    lab.initiate("peer-v4")
    capture = lab.hosts["fwd"].capture("to-peer")
    if sys.argv[1:] == ["freeze"]:
        lab.charon("fwd").freeze()
    print(lab.sandbox.first_pid, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(scope="module", params=["transit", "terminated"])
def testbed(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab(request.param) as lab:
        lab.initiate()
        yield lab


@pytest.fixture
def detached() -> Iterator[str]:
    """A name for a lab that is ended in any case."""
    name = f"t-{os.getpid()}"
    yield name
    for entry in running():
        if entry.name == name:
            entry.end()


def python(*words: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=REPOSITORY,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def lab_command(*words: str, status: int = 0, **options) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lab", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        **options,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def typed(*words: str, prompt: str, line: str) -> str:
    """Wait for the prompt on a terminal, type a line and leave; gives all that the terminal showed."""
    ours, its = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "lab", *words], cwd=REPOSITORY, stdin=its, stdout=its, stderr=its, start_new_session=True
    )
    os.close(its)
    shown = ""

    def read() -> str:
        nonlocal shown
        if select.select([ours], [], [], 0)[0]:
            with suppress(OSError):  # EIO: nobody has the other end any more
                shown += os.read(ours, 4096).decode()
        return shown

    try:
        wait_for(lambda: prompt in read(), "the prompt is there")
        os.write(ours, f"{line}; exit\n".encode())
        wait_for(lambda: (read(), child.poll())[1] is not None, "the shell has ended")
    finally:
        child.kill()
        child.wait(10)
        os.close(ours)
    return shown


# --- what a lab is made of, and whether it is gone ----------------------------------------------------------


def processes() -> Iterator[Path]:
    return (path for path in Path("/proc").iterdir() if path.name.isdigit())


def namespaces_of(process: Path) -> set[str]:
    try:
        return {os.readlink(process / "ns" / kind) for kind in KINDS}
    except OSError:  # it has ended
        return set()


class Held:
    """Namespaces held open: until `close` the kernel gives their numbers to no other lab, so they tell what is left."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}

    def add(self, kind: str, path: Path) -> None:
        """Hold one, unless it is this process's own or has gone already."""
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY)
            name = f"{kind}:[{os.fstat(file).st_ino}]"
            if name in self.files or name in namespaces_of(Path("/proc/self")):
                os.close(file)
            else:
                self.files[name] = file

    def add_process(self, process: Path) -> None:
        """Hold all that a process is in."""
        for kind in KINDS:
            self.add(kind, process / "ns" / kind)

    def add_lab(self, first_pid: int) -> Held:
        """Hold those of a lab: its processes' and the network namespaces that its hosts' files stand for."""
        own = os.readlink(f"/proc/{first_pid}/ns/pid")
        for process in processes():
            if own in namespaces_of(process):
                self.add_process(process)
        for path in Path(f"/proc/{first_pid}/root/run/netns").iterdir():
            self.add("net", path)
        return self

    def close(self) -> None:
        """Let them go."""
        for file in self.files.values():
            os.close(file)
        self.files.clear()


@pytest.fixture
def held() -> Iterator[Held]:
    namespaces = Held()
    yield namespaces
    namespaces.close()


def mounts_of(process: Path) -> str:
    try:
        return (process / "mountinfo").read_text()
    except OSError:
        return ""


def runs(process: Path) -> bool:
    """Whether it is there and not just waiting for its parent to ask for its exit status."""
    try:
        return bool((process / "cmdline").read_bytes())
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    found = {pid}
    with suppress(OSError):  # it has ended meanwhile
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found |= descendants(int(child))
    return found


def left_of(held: Held, pids: Iterable[int] = ()) -> list[str]:
    """Processes still in them or that were the lab's, and mounts anywhere that still stand for one of them."""
    left = []
    for process in processes():
        if (int(process.name) in pids and runs(process)) or namespaces_of(process) & held.files.keys():
            left.append(f"{process} {namespaces_of(process)}")
        mounts = mounts_of(process)
        left += [f"{process} mounts {name}" for name in held.files if name in mounts]
    return left


def traces(name: str) -> list[str]:
    """What of this machine a lab could leave a trace in: mounts, interfaces, named namespaces, its own file.

    Not in folders for temporary files: there another test may mount something meanwhile.
    """
    shown = subprocess.run(
        "ip netns list; ip -o link show | cut -d: -f2; cut -d' ' -f5 /proc/self/mountinfo",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    left = [line for line in shown.splitlines() if not line.startswith(tempfile.gettempdir())]
    return sorted([*left, *map(str, FOLDER.glob(f"*{name}*"))])


def gone(held: Held, pids: set[int]) -> None:
    wait_for(lambda: not left_of(held, pids), "nothing of the lab is left")


@pytest.mark.parametrize(
    ("ending", "words"), [("normal", ()), ("SIGINT", ()), ("SIGTERM", ()), ("SIGKILL", ()), ("SIGKILL", ("freeze",))]
)
def test_nothing_is_left_whatever_ends_it(ending, words, held):
    child = python("-c", BUILD, *words)
    first_pid = int(child.stdout.readline())
    pids = descendants(child.pid)
    held.add_lab(first_pid)
    assert len([name for name in held.files if name.startswith("net:")]) == 3  # the lab's own and two hosts'
    assert len(pids) > 8  # two charons, tcpdump and what is around them
    if ending != "normal":
        os.kill(child.pid, signal.Signals[ending])
    child.communicate("\n", timeout=60)
    gone(held, pids)
    assert not Path(f"/proc/{first_pid}/root/run/hosts").exists()


def test_when_close_returns_all_is_gone_already(held):
    with Lab("terminated") as lab:
        held.add_lab(lab.sandbox.first_pid)
    assert not left_of(held)


@pytest.mark.parametrize("delay_s", [0.1, 0.3, None])
@pytest.mark.parametrize("command", ["build", "up"])
def test_nothing_is_left_of_one_that_was_killed_while_it_was_built(command, delay_s, detached, tmp_path, held):
    """Wherever in the build the signal meets it: the delays only spread over it, None is as late as can be."""
    # Nobody writes to this, so `up` waits for its configuration for ever, and BUILD for its standard input.
    os.mkfifo(tmp_path / "fwd.toml")
    up = ("-m", "lab", "up", "terminated", "--name", detached, "--config", str(tmp_path / "fwd.toml"))
    child = python(*(("-c", BUILD) if command == "build" else up))
    if delay_s is not None:
        time.sleep(delay_s)
    elif command == "build":
        child.stdout.readline()
    else:
        wait_for(lambda: detached in [entry.name for entry in running()], "the lab is built")
    child.send_signal(signal.SIGSTOP)  # so that it starts nothing that is not looked at
    pids = descendants(child.pid)
    for pid in pids:
        held.add_process(Path(f"/proc/{pid}"))
    child.kill()
    child.communicate(timeout=60)
    gone(held, pids)
    assert detached not in [entry.name for entry in running()]


def test_two_labs_at_once_do_not_meet():
    with Lab("terminated") as one, Lab("terminated") as two:
        first, second = (Held().add_lab(lab.sandbox.first_pid) for lab in (one, two))
        assert first.files and not first.files.keys() & second.files.keys()
        first.close()
        second.close()
        one.initiate("peer-v4")
        two.initiate("peer-v4")
        assert one.ping("peer-v4") == two.ping("peer-v4") == 3
        (one_sa,), (two_sa,) = one.charon("fwd").list_sas(), two.charon("fwd").list_sas()
        assert one_sa.spi_in != two_sa.spi_in
        one.close()
        assert two.ping("peer-v4") == 3


# --- tunnels and witnesses --------------------------------------------------------------------------------------


def on_the_wire(packet) -> int:
    """The SPI of a captured ESP packet (RFC 4303, section 2)."""
    at = 20 if packet.octets[0] >> 4 == 4 else 40
    return int.from_bytes(packet.octets[at : at + 4])


def test_tunnels_carry_protocol_50_on_fwds_wire_and_a_rekey_changes_the_spis(testbed):
    interface = "to-a" if testbed.topology.name == "transit" else "to-peer"
    for tunnel in testbed.topology.tunnels:
        charon = testbed.charon(tunnel.initiator)
        before = charon.installed(tunnel.name)
        with testbed.hosts["fwd"].capture(interface) as capture:
            assert testbed.ping(tunnel.name, count=4) == 4
            after = testbed.rekey(tunnel.name, tunnel.initiator)
            assert testbed.ping(tunnel.name, count=3) == 3
        assert not {before.spi_in, before.spi_out} & {after.spi_in, after.spi_out}
        for ends, spis in (
            (tunnel.outer, [before.spi_out] * 4 + [after.spi_out] * 3),
            (tunnel.outer[::-1], [before.spi_in] * 4 + [after.spi_in] * 3),
        ):
            packets = [packet for packet in capture.packets if (packet.source, packet.destination) == ends]
            assert [on_the_wire(packet) for packet in packets] == spis
            assert capture.total(*ends) == (7, sum(len(packet.octets) for packet in packets))
        assert sum("ESP(spi=0x" in line for line in capture.printed()) == 14


def test_an_answer_that_comes_late_is_no_lost_one(testbed):
    """Later than two round trips after the last ping."""
    tunnel = testbed.topology.tunnels[0]
    answerer = testbed.charon(tunnel.ends[1])
    middle = testbed.hosts["fwd"]
    device = next(end[1] for link in testbed.topology.links for end in link.ends if end[0] == "fwd")

    def carried():
        (link,) = json.loads(middle.run(["ip", "-json", "-statistics", "link", "show", device]).stdout)
        return link["stats64"]["rx"]["packets"] + link["stats64"]["tx"]["packets"]

    before = carried()
    pings = testbed.start_ping(tunnel.name, count=3, interval_s=0.3)
    wait_for(lambda: carried() >= before + 2, "one is answered")
    answerer.freeze()
    time.sleep(1.2)  # that long the last answer takes
    answerer.thaw()
    assert outcome(pings) == (3, 3)


def test_charon_restarted_sets_its_tunnels_up_again(testbed):
    tunnel = testbed.topology.tunnels[0]
    charon = testbed.charon(tunnel.initiator)
    before = charon.installed(tunnel.name)
    charon.restart()
    assert charon.list_sas() == []
    charon.initiate(tunnel.name)
    assert charon.installed(tunnel.name).spi_in != before.spi_in
    assert testbed.ping(tunnel.name) == 3


def test_fwd_that_does_not_start_says_why(testbed):
    with pytest.raises(LabError, match=r"fwd did not start:\n(.*\n)*.*no-such-key"):
        testbed.start_fwd(default_config() + "\n[no-such-key]\n")


# --- the root folder ----------------------------------------------------------------------------------------------


def fake_mmdebstrap(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Put a program of that name first in the path and give the lab an empty cache; returns where the root will be."""
    program = folder / "bin" / "mmdebstrap"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh -e\nfor root; do :; done\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "fwd-lab" / "some-root"


def test_labs_that_start_at_once_make_the_root_folder_once(tmp_path, monkeypatch):
    root = fake_mmdebstrap(tmp_path, monkeypatch, f'echo made >> {tmp_path}/made; sleep 0.3; touch "$root/whole"')
    script = "from lab.root_folder import root_folder; print((root_folder('some-root', 'p') / 'whole').exists())"
    both = [python("-c", script), python("-c", script)]
    assert [child.communicate(timeout=60)[0] for child in both] == ["True\n", "True\n"]
    assert (tmp_path / "made").read_text() == "made\n"
    assert root.exists()


def test_a_root_folder_that_failed_is_not_kept(tmp_path, monkeypatch):
    root = fake_mmdebstrap(tmp_path, monkeypatch, 'touch "$root/half"; echo no mirror >&2; exit 1')
    with pytest.raises(LabError, match="no mirror"):
        root_folder("some-root", "p")
    assert not root.exists()
    assert [path.name for path in root.parent.iterdir()] == ["lock"]


def test_a_build_that_was_killed_goes_on_nowhere_and_is_made_anew(tmp_path, monkeypatch, held):
    root = fake_mmdebstrap(tmp_path, monkeypatch, f'echo made >> {tmp_path}/made; touch "$root/half"; sleep 60')
    unfinished = root.with_name("unfinished")
    child = python("-c", "from lab.root_folder import root_folder; root_folder('some-root', 'p')")
    wait_for(lambda: (unfinished / "half").exists(), "the build has begun")
    pids = descendants(child.pid)
    child.kill()
    child.communicate(timeout=60)
    gone(held, pids)
    assert not root.exists()
    (tmp_path / "bin" / "mmdebstrap").write_text('#!/bin/sh -e\nfor root; do :; done\ntouch "$root/whole"\n')
    assert [path.name for path in root_folder("some-root", "p").iterdir()] == ["whole"]
    assert not unfinished.exists()


def test_a_missing_mmdebstrap_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match="apt-get install mmdebstrap"):
        root_folder("some-root", "p")


# --- the command line -----------------------------------------------------------------------------------------------


def test_up_list_shell_down(detached, held):
    before = traces(detached)
    assert "tunnels are up" in lab_command("up", "terminated", "--name", detached)
    entry = find(detached)
    held.add_lab(entry.first_pid)
    assert f"runs: {detached} (topology terminated; hosts fwd, peer" in lab_command("list")

    tunnels = json.loads(lab_command("shell", detached, "fwd", "fwctl", "--json", "show", "tunnel"))["tunnels"]
    assert {tunnel["child_sa"] for tunnel in tunnels} == {"peer-v4", "peer-v6"}
    assert "1 received" in lab_command("shell", detached, "peer", "ping", "-c1", "-W5", "-I", "10.3.0.1", "10.9.0.1")
    assert "10.3.0.1" in typed("shell", detached, "peer", prompt=f"[lab {detached}: peer]", line="ip addr show lo")

    assert "has no host nobody; there are: fwd, peer" in lab_command("shell", detached, "nobody", status=1)
    assert f"a lab {detached} runs already" in lab_command("up", "transit", "--name", detached, status=1)
    assert find(detached) == entry

    assert "is gone" in lab_command("down", detached)
    assert not left_of(held)
    assert f"no lab {detached} runs" in lab_command("down", detached, status=1)
    assert traces(detached) == before


def test_up_that_fails_leaves_nothing(detached, tmp_path):
    before = traces(detached)
    config = tmp_path / "fwd.toml"
    config.write_text("[no-such-key]\n")
    assert "no-such-key" in lab_command("up", "transit", "--name", detached, "--config", str(config), status=1)
    assert detached not in [entry.name for entry in running()]
    assert traces(detached) == before


def test_a_configuration_that_is_no_text_is_named(detached, tmp_path):
    (tmp_path / "fwd.toml").write_bytes(b"x = 1\n\xff")
    told = lab_command("up", "transit", "--name", detached, "--config", str(tmp_path / "fwd.toml"), status=1)
    assert f"{tmp_path}/fwd.toml: byte 6 is not UTF-8" in told
    assert detached not in [entry.name for entry in running()]


def test_a_lab_of_another_checkout_is_listed_all_the_same(detached):
    with subprocess.Popen(["sleep", "60"]) as bystander:
        Running.of(detached, "no-such-topology", bystander.pid).save()
        assert f"runs: {detached} (topology no-such-topology; hosts unknown here" in lab_command("list")
        assert "which this checkout has not" in lab_command("shell", detached, "fwd", status=1)
        bystander.kill()
    lab_command("list")  # forgets it


def test_a_recycled_pid_is_never_killed(detached):
    with subprocess.Popen(["sleep", "60"]) as bystander:
        real = Running.of(detached, "transit", bystander.pid)
        stale = Running(real.name, real.topology, real.first_pid, real.started - 1)
        stale.save()
        stale.end()
        stale.save()
        assert "no lab" in lab_command("down", detached, status=1)
        assert not (FOLDER / f"{detached}.json").exists()
        assert bystander.poll() is None
        bystander.kill()


def test_the_demonstration_agrees_with_tcpdump_and_strongswan():
    shown = lab_command("demo")
    for words in ("PRED", "20033", "ESP(spi=0x", "spi-in 0x", "show tunnel", "A forced rekey", "python -m lab up demo"):
        assert words in shown


def test_a_demonstration_that_fails_says_so(tmp_path):
    (tmp_path / "fwd-lab" / "strongswan-trixie").mkdir(parents=True)  # a root folder with nothing in it
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    assert "charon on fwd did not start" in lab_command("demo", status=1, env=environment)


@pytest.mark.parametrize("command", [(), ("up",), ("down",), ("shell",), ("list",), ("demo",)])
def test_help_everywhere(command):
    assert "Usage: python -m lab" in lab_command(*command, "--help")
