"""Leaves out what no test is about: waits for the disk, and what every study or page would compute again.

A test that ends a process loses nothing that the process has written: only a loss of power would, which fsync is for.
"""

from __future__ import annotations

import os
from functools import cache

from dimscope.page import render
from dimscope.studies import estimate


def save_time() -> None:
    """Let `os.fsync` return at once; measure this machine and compile the template of the page once per process."""
    os.fsync = lambda descriptor: None
    for name in ("_operations_per_second", "_bytes_per_second"):
        setattr(estimate, name, cache(getattr(estimate, name)))
    render._environment = cache(render._environment)
