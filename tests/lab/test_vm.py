"""What of the virtual machine is not in the machine: when its disk is made anew, and that a run ends."""

import subprocess

import pytest

from lab.sandbox import LabError
from lab.vm import Image, image, machine


def test_the_disk_is_another_when_what_it_is_made_of_changes(monkeypatch):
    before = Image("bookworm").folder
    assert Image("bookworm").folder == before != Image("trixie").folder
    monkeypatch.setattr(image, "_PACKAGES", (*image._PACKAGES, "another"))
    assert Image("bookworm").folder != before
    with pytest.raises(LabError, match="there are: bookworm, trixie"):
        Image("sid")


def test_what_the_python_world_has_to_bring_is_what_the_project_says():
    names = " ".join(image.requirements())
    assert all(name in names for name in ("netfilterqueue", "pytest", "setuptools"))


@pytest.fixture
def guest(tmp_path):
    """Follows a program in the place of a guest; gives what was said, and what is wrong."""

    disk = tmp_path / "disk"
    subprocess.run(["mke2fs", "-q", disk, "1M"], capture_output=True, check=True)

    def follow(script, time_limit_s=20.0):
        said = []

        def boot():
            return subprocess.Popen(["sh", "-c", script], cwd=tmp_path, text=True, stderr=subprocess.DEVNULL)

        trouble = machine._follow(boot, disk, tmp_path / "console", tmp_path / "output", said.append, time_limit_s)
        return said, trouble

    return follow


def test_what_a_guest_prints_is_said_line_by_line(guest):
    assert guest("echo one > output; echo two >> output; printf three >> output") == (["one", "two", "three"], None)


def test_a_guest_boots_again_when_it_asks_for_it(guest):
    once = 'debugfs -w -R "write again boot" disk'
    assert guest(f"echo on >> output; [ -e again ] || {{ echo 1 > again; {once}; }}") == (["on", "on"], None)


def test_a_guest_that_is_not_done_in_time_is_ended(guest):
    said, trouble = guest("while echo on > console; do sleep 0.1; done", 1.0)
    assert said == [] and trouble == "the guest was not done in 1 s"


def test_a_guest_that_says_nothing_is_ended(guest, monkeypatch):
    monkeypatch.setattr(machine, "SILENCE_S", 1.0)
    assert guest("exec sleep 30") == ([], "the guest hangs: not a byte from it for 1 s")


def test_a_crashed_kernel_is_not_waited_for(guest):
    _, trouble = guest("echo 'Kernel panic - not syncing: no reason' > console; exec sleep 30")
    assert trouble == "the guest does not boot, or its kernel has crashed"


def test_qemus_own_failure_is_told(guest):
    assert guest("exit 3") == ([], "qemu ended with status 3")
