"""A run that is killed again and again ends where an unharmed one ends."""

import functools
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import train_test

from stepsearch_jax.run import interrupts

ROOT = pathlib.Path(__file__).parents[1]
KILLS = 10
STEPS = 14
DATE = re.compile(r'"date": "[\d-]+"')  # The test may run past midnight.


def command(workdir, *more):
  return [
    sys.executable, "-m", "stepsearch_jax.train", f"--workdir={workdir}",
    "--config=configs/quickstart.py:runlocal", f"--config.total_steps={STEPS}",
    "--config.checkpoint.every=1", "--config.eval.every=4",
    "--config.data.eval_limit=4", "--config.rollout.max_turn=12",
    "--config.ppo.kl_controller=adaptive", *more,
  ]


def start(workdir, *more):
  # A shell's background jobs ignore SIGINT, and so do their children.
  heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
  return subprocess.Popen(
    command(workdir, *more), cwd=ROOT, preexec_fn=heed,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
  )


def finish(process):
  _, errors = process.communicate(timeout=600)
  assert process.returncode == 0, errors[-3000:]


def steps_done(workdir):
  path = workdir / "metrics.jsonl"
  return path.read_text().count("\n") if path.exists() else 0


def kill_somewhere(workdir, moments, after_a_step):
  """Starts the run and kills it while it starts, or soon after a step."""
  process, before = start(workdir), steps_done(workdir)
  deadline = time.time() + 120
  while after_a_step and steps_done(workdir) <= before:
    assert process.poll() is None and time.time() < deadline
    time.sleep(0.05)
  time.sleep(moments.uniform(0.0, 1.0 if after_a_step else 8.0))
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL


def stop(process, number):
  """Sends a signal; returns the exit code and the seconds that it took."""
  began = time.time()
  process.send_signal(number)
  process.communicate(timeout=120)
  return process.returncode, time.time() - began


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_anywhere_save_or_leave_it_clean(tmp_path, number):
  """In the warm start, and wherever else a run of a few seconds is."""
  more = ["--config.warm_start.steps=40", "--config.total_steps=2"]
  whole, ours = tmp_path / "whole", tmp_path / "ours"
  finish(start(whole, *more))
  moments, stops = random.Random(int(number)), 0
  process = start(ours, *more)
  while not (ours / "index/manifest.json").exists():
    assert process.poll() is None
    time.sleep(0.05)
  for attempt in range(8):
    # The first has started already, and may have little left to do.
    time.sleep(moments.uniform(1.0, 10.0) if attempt else moments.uniform(0, 2))
    if process.poll() is not None:
      break
    code, seconds = stop(process, number)
    assert seconds < 100  # Two seconds where nobody else works.
    if code == 0:
      break
    # Imports do not listen yet.
    assert code in (interrupts.EXIT_PREEMPTED, -number, 1), code
    stops += code == interrupts.EXIT_PREEMPTED
    process = start(ours, *more)
  finish(process)
  assert stops
  assert train_test.records(ours) == train_test.records(whole)
  ours, theirs = (
    train_test.final_policy(folder, train_test.tiny())[1]
    for folder in (ours, whole)
  )
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_ten_sigkills_change_nothing(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  finish(start(whole))
  moments = random.Random(0)
  for kill in range(KILLS):
    kill_somewhere(killed, moments, after_a_step=kill % 2 == 1)
  assert steps_done(killed) < STEPS + 1
  finish(start(killed))
  assert train_test.records(killed) == train_test.records(whole)
  ours, theirs = (
    train_test.final_policy(folder, train_test.tiny())[1]
    for folder in (killed, whole)
  )
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  for name in ("predictions.jsonl", "card.json", "trajectories.jsonl"):
    name = f"evaluations/step_000014/{name}"
    ours, theirs = (
      (folder / name).read_text().replace(str(folder), "")
      for folder in (killed, whole)
    )
    assert DATE.sub("", ours) == DATE.sub("", theirs)
