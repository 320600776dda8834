"""What of the virtual machine is not in the machine: when its disk is made anew, and that a run ends."""

import contextlib
import os
import subprocess

import pytest

from lab.sandbox import LabError
from lab.vm import Image, image, machine, tools


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


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a program in the place of a guest, whose disk it finds as `disk`; gives the outcome and what was said."""
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path)
    results = tmp_path / "results"

    class Disk:
        def install(self, tree, folder):
            assert (tree / "pyproject.toml").exists()
            (folder / "new").mkdir()
            return folder / "new"

        in_use = staticmethod(contextlib.nullcontext)

    def run(script, time_limit_s=20.0):
        def start(self, words, folder, *options, **more):
            return subprocess.Popen(["sh", "-ec", script], cwd=folder, text=True, stderr=subprocess.DEVNULL)

        monkeypatch.setattr(machine.Machine, "_start", start)
        said = []
        outcome = machine.Machine(Disk(), "tcg").run(["true"], results, said.append, time_limit_s)
        return outcome.status, said, results

    return run


LEAVE = "echo {status} > status; debugfs -w -R 'write status out/status' disk"


def test_the_exit_status_and_the_results_come_out(run):
    status, said, results = run(f"echo hello > output; echo boots > console; {LEAVE.format(status=3)}")
    assert (status, said) == (3, ["hello"])
    assert {path.name for path in results.iterdir()} == {".fwd-vm", "status", "console", "output"}
    assert run(LEAVE.format(status=0))[0] == 0  # into the folder of the run before
    assert not (results / "console").exists()


@pytest.mark.parametrize("script", ["true", LEAVE.format(status="")])
def test_a_guest_without_a_result_is_told_with_its_console(run, script):
    with pytest.raises(LabError, match=r"(?s)the guest went off .*all of it: .*the last words"):
        run(f"echo the last words > console; {script}")


def test_what_a_guest_that_is_ended_had_written_comes_out(run, tmp_path):
    with pytest.raises(LabError, match="was not done in 1 s"):
        run(f"{LEAVE.format(status=1)}; while echo on > console; do sleep 0.1; done", 1.0)
    assert (tmp_path / "results/status").read_text() == "1\n"
    assert not list(tmp_path.glob("run-*"))


def test_a_folder_that_has_no_results_is_not_emptied(run, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/precious").write_text("")
    with pytest.raises(LabError, match="name another folder with --results"):
        run("true")
    assert (tmp_path / "results/precious").exists()


def test_what_a_killed_run_left_goes_and_what_runs_stays(run, tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid in (gone.pid, os.getpid()):
        (tmp_path / f"run-{pid}-x").mkdir()
    run(LEAVE.format(status=0))
    assert [path.name for path in tmp_path.glob("run-*")] == [f"run-{os.getpid()}-x"]


def test_a_disk_that_a_machine_runs_on_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(image, "cache_folder", lambda: tmp_path)
    disk = Image("bookworm")
    disk.folder.mkdir()
    with disk.in_use():
        image._remove_unused(disk.folder)
        assert disk.folder.exists()
    image._remove_unused(disk.folder)
    assert not disk.folder.exists()


def test_missing_programs_are_told_with_their_packages(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LabError, match=r"not installed: qemu-system-x86_64, .*apt-get install .*qemu-utils"):
        Image("bookworm").ensure(print)


def test_a_program_that_fails_is_told_with_its_words():
    with pytest.raises(LabError, match="cannot make tea: no water"):
        tools.run(["sh", "-c", "echo no water >&2; exit 1"], "make tea")
    with pytest.raises(LabError, match="sleep was not done in"):
        tools.run(["sleep", 10], "make tea", 0.1)
