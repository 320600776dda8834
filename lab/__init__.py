"""Testbeds of network namespaces with real strongSwan: real IKEv2, real protocol-50 packets, nothing left behind."""

from .lab import Lab

__all__ = ["Lab"]
