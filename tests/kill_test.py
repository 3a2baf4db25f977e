"""A run that is killed again and again ends where an unharmed one ends."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import train_test

ROOT = pathlib.Path(__file__).parents[1]
KILLS = 10
STEPS = 14


def command(workdir):
  return [
    sys.executable, "-m", "stepsearch_jax.train", f"--workdir={workdir}",
    "--config=configs/quickstart.py:runlocal", f"--config.total_steps={STEPS}",
    "--config.checkpoint.every=1", "--config.eval.every=4",
    "--config.data.eval_limit=4", "--config.rollout.max_turn=12",
    "--config.ppo.kl_controller=adaptive",
  ]


def start(workdir):
  return subprocess.Popen(
    command(workdir), cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
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
  for name in ("predictions.jsonl", "card.json"):
    name = f"evaluations/step_000014/{name}"
    ours = (killed / name).read_text().replace(str(killed), "")
    assert ours == (whole / name).read_text().replace(str(whole), "")
