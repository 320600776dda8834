"""The unit as systemd itself judges it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fwd.daemon import HANDED_OVER

UNIT = Path(__file__).parents[2] / "systemd" / "fwd.service"

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (package systemd)"
)


def test_it_is_clean(tmp_path):
    daemon = tmp_path / "fwd"
    daemon.write_text("#!/bin/sh\n")
    daemon.chmod(0o755)
    copy = tmp_path / "fwd.service"
    copy.write_text(UNIT.read_text().replace("/usr/local/sbin/fwd", str(daemon)))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_its_exposure_is_low():
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", UNIT],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    level = re.search(r"Overall exposure level for fwd.service: ([0-9.]+)", done.stdout)
    assert level is not None, done.stderr
    assert float(level[1]) <= 1.5  # 0.4 of it is for what syslog, IPFIX and metrics are sent by


def test_it_knows_a_handing_over_when_it_sees_one():
    """Else an orderly restart would be a failure, and would take the rules out."""
    unit = UNIT.read_text()
    assert f"SuccessExitStatus={HANDED_OVER}\n" in unit
    assert re.search(r"^ExecStopPost=.*EXIT_CODE.* = killed ", unit, re.MULTILINE)


def test_a_reload_checks_the_file_first():
    commands = re.findall(r"^ExecReload=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert commands == ["/usr/local/sbin/fwd --check", "/bin/kill -HUP $MAINPID"]


def test_it_is_no_roots_and_has_one_capability():
    unit = UNIT.read_text()
    assert "\nUser=fwd\n" in unit
    assert re.findall(r"^(?:Ambient|CapabilityBounding)\w+=(.*)$", unit, re.MULTILINE) == ["CAP_NET_ADMIN"] * 2
    as_root = re.findall(r"^Exec\w+=\+-?(.*)$", unit, re.MULTILINE)
    assert [command.split()[0] for command in as_root] == ["/bin/chgrp", "/bin/chgrp"]


def test_its_user_is_made_even_where_an_older_fwd_made_a_group(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "group").write_text("fwd:x:990:\n")
    sysusers = UNIT.with_name("fwd.sysusers")
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", sysusers], capture_output=True, timeout=60, check=True)
    user = (tmp_path / "etc" / "passwd").read_text()
    assert re.search(r"^fwd:x:\d+:990:.*/nologin$", user, re.MULTILINE)
    assert re.search(r"^fwd-vici:x:\d+:fwd$", (tmp_path / "etc" / "group").read_text(), re.MULTILINE)


def test_the_drop_ins_are_clean(tmp_path):
    """strongSwan's, which lets fwd into VICI, and the README's, which has fwd run as root."""
    daemon = tmp_path / "fwd"
    daemon.write_text("#!/bin/sh\n")
    daemon.chmod(0o755)
    readme = (UNIT.parents[1] / "README.md").read_text()
    assert "    [Service]\n    User=root\n" in readme
    units = {
        "strongswan": ("[Service]\nType=notify\nExecStart=/bin/true\n", UNIT.with_name("strongswan.conf").read_text()),
        "fwd": (UNIT.read_text().replace("/usr/local/sbin/fwd", str(daemon)), "[Service]\nUser=root\n"),
    }
    for name, (unit, drop_in) in units.items():
        (tmp_path / f"{name}.service").write_text(unit)
        (tmp_path / f"{name}.service.d").mkdir()
        (tmp_path / f"{name}.service.d" / "fwd.conf").write_text(drop_in)
        command = ["systemd-analyze", "verify", tmp_path / f"{name}.service"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
