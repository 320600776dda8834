"""A whole machine for the lab: a Debian with its own kernel, systemd and strongSwan, in qemu.

What a kernel or systemd does is real in it, whatever kernel the lab runs on: ESP, nft's `queue`, the unit, a reboot.
"""

from .image import RELEASES, Image
from .machine import Machine, Outcome

__all__ = ["RELEASES", "Image", "Machine", "Outcome"]
