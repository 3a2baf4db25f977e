"""Several processes train one run, and end together."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import train_test

ROOT = pathlib.Path(__file__).parents[1]


def start(workdir, processes, devices, *arguments):
  """Starts a run of `processes` x `devices`; returns the process handles."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
  }
  command = [
    sys.executable, "-m", "stepsearch_jax.train", f"--workdir={workdir}",
    "--config=configs/quickstart.py:runlocal", "--config.checkpoint.every=1",
    "--config.mesh.fsdp=2", "--config.data.eval_limit=4",
    "--config.rollout.max_turn=12", "--config.probe.reward=tips", *arguments,
  ]
  handles = []
  for process in range(processes):
    joining = []
    if processes > 1:
      joining = [f"--coordinator=127.0.0.1:{port}", f"--process_id={process}",
                 f"--num_processes={processes}"]
    handles.append(subprocess.Popen(
      command + joining, env=environment, cwd=ROOT, text=True,
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ))
  return handles


def finish(handles, timeout):
  """Standard errors and exit codes, waiting for all."""
  errors = [handle.communicate(timeout=timeout)[1] for handle in handles]
  return errors, [handle.returncode for handle in handles]


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
  for name, processes, devices in (("two", 2, 2), ("one", 1, 4)):
    errors, codes = finish(start(tmp_path / name, processes, devices), 600)
    assert codes == [0] * processes, errors[0][-3000:]
  two, one = tmp_path / "two", tmp_path / "one"
  _compare(two, one)
  # The run of two processes goes on in one, on another mesh.
  errors, codes = finish(start(two, 1, 2, "--config.total_steps=3",
                               "--allow_changes=total_steps"), 600)
  assert codes == [0], errors[0][-3000:]
  assert "resumed at step 2" in errors[0]
  assert [r["step"] for r in train_test.records(two)] == [0, 1, 2, 3]


def _compare(two, one):
  assert (two / "index_0_of_2").exists() and (two / "index_1_of_2").exists()
  for ours, theirs in zip(
    train_test.records(two), train_test.records(one), strict=True
  ):
    assert ours.keys() == theirs.keys()
    for key, want in theirs.items():
      np.testing.assert_allclose(
        ours[key], want, rtol=2e-3, atol=1e-4, err_msg=key
      )
  # Texts are not compared: one rounding more or less may choose another token.
  policies = [
    train_test.final_policy(folder, train_test.tiny())[1]
    for folder in (two, one)
  ]
  for ours, theirs in zip(*map(jax.tree.leaves, policies), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.slow
def test_a_dead_process_ends_the_others_with_an_error(tmp_path):
  # Without a warm start, so that initial weights are shared by processes too.
  handles = start(tmp_path, 2, 1, "--config.total_steps=1000",
                  "--config.mesh.fsdp=1", "--config.warm_start.steps=0")
  try:
    records = tmp_path / "metrics.jsonl"
    deadline = time.time() + 600
    while not (records.exists() and records.read_text().count("\n") > 1):
      assert time.time() < deadline and handles[0].poll() is None
      time.sleep(0.5)
    handles[1].send_signal(signal.SIGKILL)
    (error, _), (code, _) = finish(handles, 60)
  finally:
    for handle in handles:
      handle.kill()  # A failed test leaves no run behind.
  assert code not in (0, 1)  # 1 would say that starting again cannot help.
  assert "another process" in error or "distributed service" in error, error
