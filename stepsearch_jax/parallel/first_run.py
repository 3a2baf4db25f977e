"""Keeps a program's first run apart from other threads' work on the device.

On its first run a program loads its kernels, and cuDNN captures graphs while it
does so. Whatever another thread asks of the GPU meanwhile breaks the capture: a
search that embedded its query beside the first prefill ended the process (seen
on an H200, jax 0.11.2). So such a thread works under `alone`, and so does
everybody's first run.

This module must not know what runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import jax

_LOCK = threading.Lock()


def alone() -> contextlib.AbstractContextManager:
  """A block during which no program runs for the first time elsewhere."""
  return _LOCK


class FirstAlone:
  """Calls programs, each of them alone until its first result is there."""

  def __init__(self):
    """None has run yet."""
    self._ran: set[int] = set()

  def __call__(self, program: Callable[..., Any], *args: Any) -> Any:
    """Returns the program's result.

    Args:
      program: must outlive this object, which knows it by its identity.
      *args: are given to it.
    """
    if id(program) in self._ran:
      return program(*args)
    with alone():
      result = jax.block_until_ready(program(*args))
    self._ran.add(id(program))
    return result
