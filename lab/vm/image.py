"""The machine's disk: a Debian with all that fwd, its tests and its installation need, made once and kept in a cache.

The tree under test is not in it, so it stays as it is when the tree changes; every input it is made of is in its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..root_folder import LEASH, cache_folder, root_folder
from ..sandbox import LabError
from . import tools

#: Releases of Debian that a machine can be of, the default first.
RELEASES = ("bookworm", "trixie")

_TREE = Path(__file__).parents[2]
_GUEST = Path(__file__).parent / "guest"
_PACKAGES = (
    # a machine
    *("linux-image-cloud-amd64", "initramfs-tools", "systemd-sysv", "dbus", "udev", "kmod", "less", "procps", "strace"),
    # what fwd's users have
    *("charon-systemd", "strongswan-swanctl", "libcharon-extra-plugins", "libstrongswan-extra-plugins"),
    *("nftables", "iptables", "firewalld", "iproute2", "iputils-ping", "fping"),
    # what `make deb` and the tests want
    *("build-essential", "debhelper", "python3-venv", "python3-dev", "libnetfilter-queue-dev"),
    *("tcpdump", "ethtool", "conntrack"),
)
# Inside of the new root. Nothing starts by itself that a test has not started: `strongswan`, `firewalld` and so on.
_FINISH = """
# The disk is virtio's: the initial RAM disk needs no other driver, and emulated each MB of it counts.
echo MODULES=list > /etc/initramfs-tools/conf.d/lab
printf 'virtio_pci\\nvirtio_blk\\n' >> /etc/initramfs-tools/modules
update-initramfs -u
systemctl disable -q strongswan.service firewalld.service nftables.service
systemctl mask -q serial-getty@ttyS0.service getty@tty1.service apt-daily.timer apt-daily-upgrade.timer
systemctl enable -q fwd-lab.service fwd-lab-shell.service
passwd -q -d root
echo fwd-vm > /etc/hostname
echo '127.0.0.1 localhost fwd-vm' > /etc/hosts
mkdir /lab
echo '/dev/disk/by-id/virtio-lab /lab ext4 defaults 0 0' > /etc/fstab
python3 -m venv /opt/fwd-test
/opt/fwd-test/bin/pip install -q --disable-pip-version-check --no-cache-dir wheel
/opt/fwd-test/bin/pip wheel -q --disable-pip-version-check --no-cache-dir -w /opt/wheels {requirements}
/opt/fwd-test/bin/pip install -q --disable-pip-version-check --no-index --find-links /opt/wheels {requirements}
"""
_INSTALL = """
export PIP_NO_INDEX=1 PIP_FIND_LINKS=/opt/wheels PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
cd /lab/tree
make deb
apt-get install -q -y ./build/fwd_*.deb
mv build/fwd_*.deb /opt/fwd.deb
rm -rf build
/opt/fwd-test/bin/python -m compileall -q fwd lab tests
"""
# pip finds the index as it does outside: with the same name servers, certificates and configuration.
_AS_OUTSIDE = ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs")
_ENTER = """
root=$1 ; shift
for path in {paths} ; do
  [ -e $path ] || continue
  if [ -d $path ] ; then mkdir -p $root$path ; else mkdir -p $root${{path%/*}} ; : >> $root$path ; fi
  mount --bind $path $root$path && mount -o remount,bind,ro $root$path || exit
done
mount -t proc proc $root/proc && mount --rbind /dev $root/dev || exit
exec chroot $root "$@"
"""
_SIZE = "4G"  # sparse
_USED = "used"


class Image:
    """The disk, kernel and initial RAM disk of one Debian release."""

    def __init__(self, release: str) -> None:
        if release not in RELEASES:
            raise LabError(f"no recipe for Debian {release}; there are: {', '.join(RELEASES)}")
        self.release = release
        self.folder = cache_folder() / f"vm-disk-{release}-{self._inputs()}"

    @property
    def disk(self) -> Path:
        """An ext4 file system; a machine never writes to it."""
        return self.folder / "disk"

    @property
    def kernel(self) -> Path:
        """The release's own kernel for virtual machines."""
        return self.folder / "vmlinuz"

    @property
    def ram_disk(self) -> Path:
        """Its initial RAM disk."""
        return self.folder / "initrd"

    def ensure(self, say: Callable[[str], None], *, again: bool = False) -> None:
        """Make it, if it is not there yet or if it has to be made again, with today's packages. Raises LabError."""
        tools.need()
        cache_folder().mkdir(parents=True, exist_ok=True)
        with (cache_folder() / f"vm-{self.release}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two that start at once make it once
            if self.folder.exists() and not again:
                return
            say(f"making the machine's disk {self.disk}, once (some minutes) ...")
            unfinished = cache_folder() / f"vm-{self.release}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)  # of one that was killed: who holds the lock is alone
            unfinished.mkdir()
            try:
                if again:
                    for debian in cache_folder().glob(f"vm-debian-{self.release}-*"):
                        shutil.rmtree(debian)
                self._make(unfinished, say)
                for former in cache_folder().glob(f"vm-disk-{self.release}-*"):
                    _remove_unused(former)
                if self.folder.exists():
                    raise LabError(f"a machine runs on {self.disk}: try again when it is off")
                unfinished.rename(self.folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While a machine runs, nobody removes its disk: another tree with another recipe, say."""
        with (self.folder / _USED).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def _make(self, folder: Path, say: Callable[[str], None]) -> None:
        packages = ",".join(_PACKAGES)
        name = f"vm-debian-{self.release}-{_hash(packages)}"
        debian = root_folder(name, packages, say, self.release)
        for former in cache_folder().glob(f"vm-debian-{self.release}-*"):
            if former != debian:
                shutil.rmtree(former)
        say("Debian is there; now the Python packages ...")
        root = folder / "root"
        aim = "make the machine's disk"
        tools.run(["cp", "-a", "--reflink=auto", debian, root], aim)
        shutil.copytree(_GUEST, root / "etc/systemd/system", dirs_exist_ok=True)
        enter = _ENTER.format(paths=" ".join(_AS_OUTSIDE))
        finish = _FINISH.format(requirements=" ".join(f"'{wanted}'" for wanted in requirements()))
        tools.run([*LEASH, "sh", "-c", enter, "sh", root, "sh", "-ec", finish], aim)
        (root / "etc/resolv.conf").unlink(missing_ok=True)
        shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
        shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)
        for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
            (found,) = (root / "boot").glob(pattern)
            shutil.copyfile(found, folder / name)
        tools.run(["mke2fs", "-q", "-t", "ext4", "-d", root, folder / "disk", _SIZE], aim)

    def install(self, tree: Path, folder: Path) -> Path:
        """Make a tree's Debian package and install it on the image; gives what is new then.

        That is done here, in the image's root folder, because emulated it takes minutes. The image does not change.
        Raises LabError.
        """
        (folder / "new").mkdir()
        (folder / "work").mkdir()
        (folder / "root").mkdir()
        layers = f"lowerdir={self.folder}/root,upperdir={folder}/new,workdir={folder}/work"
        mount = f"mount -t overlay -o {layers} none {folder}/root"
        bind = f"mkdir {folder}/root/lab/tree && mount --bind {tree} {folder}/root/lab/tree"
        enter = f"{mount} && {bind} && {_ENTER.format(paths='')}"
        aim = "make this tree's package and install it on the machine's disk"
        tools.run([*LEASH, "sh", "-c", enter, "sh", folder / "root", "sh", "-ec", _INSTALL], aim)
        # What overlayfs has in the place of a file that was removed: a device, to whoever copies it.
        tools.run(["find", folder / "new", "-type", "c", "-delete"], aim)
        shutil.rmtree(folder / "new/lab")
        shutil.rmtree(folder / "new/tmp", ignore_errors=True)
        return folder / "new"

    def _inputs(self) -> str:
        files = [path.name + path.read_text() for path in sorted(_GUEST.iterdir())]
        return _hash(self.release, *_PACKAGES, _FINISH, _ENTER, _SIZE, *requirements(), *files)


def _hash(*inputs: str) -> str:
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:12]


def requirements() -> list[str]:
    """What of the Python world the tree needs to be built, run and tested, as pyproject.toml says."""
    project = tomllib.loads((_TREE / "pyproject.toml").read_text())
    dependencies: list[str] = project["project"]["dependencies"]
    return [
        *dependencies,
        *project["project"]["optional-dependencies"]["test"],
        *project["build-system"]["requires"],
        "wheel",
    ]


def _remove_unused(disk: Path) -> None:
    with (disk / _USED).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # the next one that makes a disk tries again
        shutil.rmtree(disk)
