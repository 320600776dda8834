"""A live userspace firewall dataplane for IPsec on Linux."""

__version__ = "0.1.0"
