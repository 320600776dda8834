"""Faults, floods and malice. `make test` runs each of them small, `make torture` in full (FWD_TORTURE=full)."""

from __future__ import annotations

import os
from typing import TypeVar

from tests.namespaces.conftest import demo, pytest_collection_modifyitems, terminated, transit

__all__ = ["demo", "in_full", "pytest_collection_modifyitems", "terminated", "transit"]

_T = TypeVar("_T")

IS_FULL = os.environ.get("FWD_TORTURE") == "full"


def in_full(full: _T, small: _T) -> _T:
    """How much of something: the first figure in `make torture`, the second in `make test`."""
    return full if IS_FULL else small
