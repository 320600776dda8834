"""`make install` and `make uninstall`, on a copy of this machine that is gone afterwards."""

import os
import subprocess
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]

# $1 is an empty folder, $2 the tree, $3 what is done on the copy; in the end it says which files that has left. What is
# written lies in memory. systemd is not told: without /run there is none.
ON_A_COPY = """
mount -t tmpfs tmpfs $1
mkdir $1/written $1/new $1/work $1/work-new $1/root
mount -t overlay -o lowerdir=/,upperdir=$1/written,workdir=$1/work overlay $1/root
for path in /proc /dev /etc/resolv.conf; do mount --rbind $path $1/root$path; done
mkdir $1/root/tree
mount -t overlay -o lowerdir=$2,upperdir=$1/new,workdir=$1/work-new overlay $1/root/tree
chroot $1/root sh -ec "$3" >&2
cd $1/written
find . \\( -path ./root -o -path ./tmp -o -path ./run -o -name __pycache__ \\) -prune -o -type f -print
"""
INSTALL = """
cd /tree
make install
/usr/local/sbin/fwd --print-default-config | cmp - /etc/fwd/fwd.toml
_FWCTL_COMPLETE=bash_source /usr/local/bin/fwctl | cmp - /usr/local/share/bash-completion/completions/fwctl
ls /usr/local/share/man/man1/fwctl.1 /usr/local/share/man/man5/fwd.toml.5 /usr/local/share/man/man8/fwd.8
systemd-analyze verify /etc/systemd/system/fwd.service
getent passwd fwd
make uninstall
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the copy is an overlay")
@pytest.mark.timeout(300)
def test_what_it_installs_works_and_goes_again(tmp_path):
    command = ["unshare", "--mount", "sh", "-ec", ON_A_COPY, "sh", tmp_path, TREE, INSTALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    of_users = {f"./etc/{name}{old}" for name in ("passwd", "shadow", "group", "gshadow") for old in ("", "-")}
    assert set(done.stdout.splitlines()) - of_users - {"./etc/.pwd.lock"} == {"./etc/fwd/fwd.toml"}
