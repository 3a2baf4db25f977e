"""SIGTERM and Ctrl-C as a request to stop where nothing is lost."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time

from absl import logging

from stepsearch_jax.run import trackers

# Tells a scheduler to run the same command again (BSD's EX_TEMPFAIL).
EXIT_PREEMPTED = 75
_GRACE_SECONDS = 10.0


class PreemptedError(BaseException):
  """The run was asked to stop, has saved, and can go on later.

  As with KeyboardInterrupt, no `except Exception` takes it for a failure: a
  search that seemed to fail would cost the warm start one of its scripts.
  """


def how_to_go_on() -> str:
  """Returns ": " and the command that this process was started with.

  Empty where the command holds a secret, which belongs in no log.
  """
  command = sys.orig_argv
  values = [
    word.partition("=")[2] if word.startswith("-") else word
    for word in command
  ]
  if trackers.public(values) != values:
    return ""
  if len(command) > 1 and os.access(command[1], os.X_OK):
    command = command[1:]  # A script that needs no interpreter named.
  return f": {shlex.join(command)}"


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
    self._last_words = ""

  def install(self) -> Interrupts:
    """Handles SIGTERM and SIGINT from now on; returns itself."""
    self._last_words = f"stopped; the same command goes on{how_to_go_on()}\n"
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
        os.write(2, self._last_words.encode())
        os._exit(EXIT_PREEMPTED)
