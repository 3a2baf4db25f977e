"""SIGTERM and Ctrl-C as a request to stop where nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time

from absl import logging

# Tells a scheduler to run the same command again (BSD's EX_TEMPFAIL).
EXIT_PREEMPTED = 75
_GRACE_SECONDS = 10.0


class PreemptedError(RuntimeError):
  """The run was asked to stop, has saved, and can go on later."""


class Interrupts:
  """What SIGTERM and SIGINT do to a command.

  At first a signal ends the program at once: nothing is lost, because what is
  on disk is whole. After `defer` it only sets `requested`, and the loop that
  looks at it saves and stops; a second signal ends the program nevertheless.
  """

  def __init__(self):
    """Starts without a request; `install` makes signals count."""
    self.requested = False
    self._deferring = False

  def install(self) -> Interrupts:
    """Handles SIGTERM and SIGINT from now on; returns itself."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Python's own handlers wait while XLA compiles; this thread does not.
    threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._handle)
    return self

  def defer(self) -> None:
    """From now on a signal only sets `requested`."""
    self._deferring = True

  def allow(self) -> None:
    """From now on a signal ends the program at once.

    Raises:
      PreemptedError: one came while they were deferred.
    """
    self._deferring = False
    if self.requested:
      raise PreemptedError("stopped; the same command goes on")

  def _handle(self, number: int, frame) -> None:
    del frame
    again, self.requested = self.requested, True
    if again or not self._deferring:
      raise PreemptedError(
        f"stopped by {signal.Signals(number).name}; the same command goes on"
      )
    logging.warning("%s: saving after this step, then stopping (once more "
                    "stops at once)", signal.Signals(number).name)

  def _watch(self, reading: int) -> None:
    """Ends the program soon after a signal that must end it at once."""
    came = 0
    while data := os.read(reading, 1):
      if data[0] not in (signal.SIGTERM, signal.SIGINT):
        continue
      came += 1
      if came > 1 or not self._deferring:
        time.sleep(_GRACE_SECONDS)
        os.write(2, b"stopped; the same command goes on\n")
        os._exit(EXIT_PREEMPTED)
