"""Keeps a program's first run apart from other threads' work on the device.

On its first run a program loads its kernels, and cuDNN captures graphs while it
does so. On an H200 (jax 0.11.2) searches that embedded queries in their threads
beside the first run of a prefill ended the process, by an error that names such
a capture or by a segmentation fault. So those threads say when they are
`working`, and a first run waits until none is and lets none begin.

This module must not know what runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

_gate = threading.Condition()
_working: set[int] = set()  # Threads, by their ids.


@contextlib.contextmanager
def working() -> Iterator[None]:
  """A block during which no program runs for the first time elsewhere.

  Any number of threads work beside each other.
  """
  own = threading.get_ident()
  with _gate:
    _working.add(own)
  try:
    yield
  finally:
    with _gate:
      _working.discard(own)
      _gate.notify_all()


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
    with _gate:
      _gate.wait_for(lambda: not _working)
      result = jax.block_until_ready(program(*args))
    self._ran.add(id(program))
    return result
