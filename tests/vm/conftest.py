"""A whole machine for the tests: they run in the guest of `python -m lab vm run`, which is theirs to install, break and reboot."""
