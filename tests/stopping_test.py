"""SIGTERM ends the long commands besides training as it ends a training."""

import glob
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from stepsearch_jax.run import interrupts

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = [
  "--config=configs/quickstart.py:runlocal", "--config.total_steps=0",
  "--config.warm_start.steps=2", "--config.data.limit=0",
]


def start(verb, *arguments):
  return subprocess.Popen(
    [sys.executable, "-m", "stepsearch_jax", verb, *map(str, arguments)],
    cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )


def stop_when(process, path):
  """Sends SIGTERM once a path (or pattern) is there; checks how it ends."""
  deadline = time.monotonic() + 200
  while not glob.glob(str(path)):
    assert process.poll() is None, process.communicate()[1][-3000:]
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == interrupts.EXIT_PREEMPTED, errors[-3000:]
  last = errors.splitlines()[-1]
  assert f"the same command goes on: {shlex.join(process.args)}" in last


def finish(process):
  _, errors = process.communicate(timeout=400)
  assert process.returncode == 0, errors[-3000:]


@pytest.mark.slow
def test_an_index_is_stopped_and_gone_on_with(tmp_path):
  corpus, output = tmp_path / "corpus.jsonl", tmp_path / "index"
  with corpus.open("w") as file:
    for i in range(12_000):
      file.write(json.dumps({"id": str(i), "title": f"t{i}",
                             "text": f"word{i % 997} of {i * 7}"}) + "\n")
  command = ("index", f"--corpus={corpus}", f"--output={output}")
  stop_when(start(*command), tmp_path / "index.partial")
  assert not output.exists()
  finish(start(*command))
  assert json.loads((output / "manifest.json").read_text())["count"] == 12_000


@pytest.mark.slow
def test_evaluation_and_rejection_sampling_are_stopped(tmp_path):
  workdir = tmp_path / "run"
  finish(start("train", f"--workdir={workdir}", *SETTINGS))

  evaluate = ("evaluate", f"--workdir={workdir}", "--config.data.eval_limit=0",
              "--attempts=40", "--temperature=1")
  folder = next(workdir.glob("evaluations/step_*")).with_name(
    f"{str(workdir).strip('/').replace('/', '_')}_step_0_t1_k40"
    .replace("-", "_") + "_*")  # Its limit is not the run's.
  stop_when(start(*evaluate), folder / "predictions.partial.jsonl")
  assert not glob.glob(str(folder / "card.json"))

  reject = ("sft", f"--workdir={workdir}", "--rejection=1")
  place = workdir / "rejection"
  stop_when(start(*reject), place / "sampling.json")
  assert [p.name for p in place.glob("*.jsonl")] == []
  other = start(*reject, "--temperature=0.5")
  _, errors = other.communicate(timeout=200)
  assert other.returncode == 1
  assert "temperature: they have 1.0, this start 0.5" in errors


@pytest.mark.slow
def test_imitation_of_traces_is_stopped_and_saved(tmp_path):
  traces = tmp_path / "traces.jsonl"
  traces.write_text(json.dumps({
    "question": "Who?", "golden_answers": ["Ada"], "response": "<search> a "
    "</search><information>b</information><answer> Ada </answer>",
  }) + "\n")
  workdir = tmp_path / "run"
  process = start("sft", f"--input={traces}", f"--workdir={workdir}", *SETTINGS,
                  "--config.warm_start.steps=1000000")
  stop_when(process, workdir / "warm_start")
