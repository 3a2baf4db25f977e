"""Requests to stop, by the handler's own calls and by real signals."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from stepsearch_jax.parallel import distributed
from stepsearch_jax.run import interrupts as interrupts_lib
from stepsearch_jax.run.interrupts import Interrupts, PreemptedError


def test_a_signal_stops_at_once_or_where_the_loop_says():
  interrupts = Interrupts()
  interrupts.defer()
  interrupts._handle(signal.SIGTERM, None)
  assert interrupts.requested
  with pytest.raises(PreemptedError, match="SIGINT"):
    interrupts._handle(signal.SIGINT, None)  # The second one is serious.
  with pytest.raises(PreemptedError, match="stopped by SIGTERM"):
    Interrupts()._handle(signal.SIGTERM, None)


def test_a_deferred_signal_counts_when_signals_are_allowed_again():
  interrupts = Interrupts()
  interrupts.defer()
  interrupts.allow()
  interrupts.defer()
  interrupts._handle(signal.SIGINT, None)
  with pytest.raises(PreemptedError):
    interrupts.allow()


def test_a_stop_is_no_error_that_a_run_survives():
  """A search that fails costs its script, an unreadable file its progress."""

  def search():
    Interrupts()._handle(signal.SIGTERM, None)

  with pytest.raises(PreemptedError):
    distributed.search_together(search, 1, 3)


@pytest.mark.parametrize("command, said", [
  (["python", "-m", "stepsearch_jax", "train", "--workdir=a b"],
   ": python -m stepsearch_jax train '--workdir=a b'"),
  (["python", sys.executable, "train"], f": {sys.executable} train"),
  (["python", "x.py", "--workdir=gs://bucket/run"],
   ": python x.py --workdir=gs://bucket/run"),
  (["python", "x.py", "--config.retrieval.remote=http://me:word@host/"], ""),
  (["python", "x.py", "--remote", "http://host/?key=word"], ""),
])
def test_the_command_that_goes_on_is_said_but_no_secret(
  monkeypatch, command, said
):
  monkeypatch.setattr(sys, "orig_argv", command)
  assert interrupts_lib.how_to_go_on() == said


BUSY = """
import threading, time
from stepsearch_jax.run import interrupts
interrupts._GRACE_SECONDS = 0.5
interrupts.Interrupts().install()
lock = threading.Lock()
lock.acquire()
try:
  print("ready", flush=True)
  time.sleep(60)
finally:
  lock.acquire()  # For ever, as if in a program that XLA compiles.
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_that_does_not_come_back_is_ended_soon(number):
  process = subprocess.Popen(
    [sys.executable, "-c", BUSY], stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(number)
  began = time.monotonic()
  assert process.wait(timeout=60) == interrupts_lib.EXIT_PREEMPTED
  assert time.monotonic() - began < 30
  assert process.stderr.read() == (
    f"stopped; the same command goes on: {shlex.join(process.args)}\n"
  )
