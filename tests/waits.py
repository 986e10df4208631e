"""Leaves out two waits that no test is about: for the disk, and for the speed of this machine at every announcement.

A test that ends a process loses nothing that the process has written: only a loss of power would, which fsync is for.
"""

from __future__ import annotations

import os
from functools import cache

from dimscope.studies import estimate


def skip_waits() -> None:
    """Let `os.fsync` return at once, and measure the speed of products and of memory once per process."""
    os.fsync = lambda descriptor: None
    for name in ("_operations_per_second", "_bytes_per_second"):
        setattr(estimate, name, cache(getattr(estimate, name)))
