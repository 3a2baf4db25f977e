"""Sweeps become commands that the trainer understands."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def plan(config, workdir):
  return subprocess.run(
    [sys.executable, "launch/sweep.py", f"--config={config}",
     f"--workdir={workdir}", "--dry_run"],
    capture_output=True, text=True, cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )


def test_quickstart_sweep_is_two_algorithms_by_three_seeds(tmp_path):
  done = plan("configs/quickstart.py", tmp_path)
  commands = done.stdout.splitlines()
  assert done.returncode == 0 and len(commands) == 6
  assert len({c.split("--workdir=")[1] for c in commands}) == 6
  for algorithm in ("steppo", "ppo"):
    for seed in range(3):
      arguments = (f"--config=configs/quickstart.py:algorithm={algorithm} "
                   f"--config.seed={seed} ")
      assert sum(arguments in c for c in commands) == 1
  assert not list(tmp_path.iterdir())


def test_a_field_that_does_not_exist_stops_the_sweep(tmp_path):
  config = tmp_path / "bad.py"
  config.write_text(
    "from configs import quickstart\n"
    "get_config = quickstart.get_config\n"
    "def sweep(add):\n  add(ppo=dict(learning=1))\n"
  )
  done = plan(config, tmp_path)
  assert done.returncode == 1
  assert done.stderr.strip().endswith("sweep sets ppo.learning, which is no "
                                      "field")
