"""Sweeps become commands that the trainer understands."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


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


def test_a_sweep_runs_side_by_side_resumes_and_ends_in_table_and_plot(tmp_path):
  """With a stand-in trainer: what is tested is the launcher."""
  package = tmp_path / "fake" / "stepsearch_jax"
  package.mkdir(parents=True)
  (package / "__init__.py").write_text("")
  (package / "train.py").write_text(
    "import json, pathlib, sys\n"
    "flags = dict(a[2:].split('=', 1) for a in sys.argv[1:])\n"
    "seed = int(flags['config.seed'])\n"
    "folder = pathlib.Path(flags['workdir'])\n"
    "folder.mkdir(parents=True, exist_ok=True)\n"
    "with (folder / 'started').open('a') as file: file.write('x')\n"
    "if seed == 1 and len((folder / 'started').read_text()) < 2: sys.exit(75)\n"
    "(folder / 'metrics.jsonl').write_text(\n"
    "  json.dumps({'step': 1, 'critic/score/mean': 0.5}) + '\\n')\n"
    "names = ('em_before', 'em_after', 'f1_after', 'searches_per_question',\n"
    "         'train_seconds')\n"
    "summary = json.dumps(dict.fromkeys(names, seed))\n"
    "(folder / 'summary.json').write_text(summary)\n"
  )
  config = tmp_path / "seeds.py"
  config.write_text(
    "import ml_collections\n"
    "def get_config(arg=None): return ml_collections.ConfigDict({'seed': 0})\n"
    "def sweep(add):\n"
    "  for seed in range(3): add(seed=seed)\n"
  )

  def sweep():
    return subprocess.run(
      [sys.executable, str(ROOT / "launch/sweep.py"), f"--config={config}",
       f"--workdir={tmp_path}/runs", "--parallel=2"],
      capture_output=True, text=True, cwd=tmp_path / "fake",
    )

  first = sweep()
  assert first.returncode == 1
  assert "001_seed-1 (code 75) did not finish" in first.stderr
  second = sweep()
  assert second.returncode == 0, second.stderr
  assert "002_seed-2" in second.stdout and "2.000" in second.stdout
  runs = tmp_path / "runs"
  assert (runs / "sweep.png").stat().st_size > 10_000
  assert (runs / "000_seed-0/started").read_text() == "x"  # Not run again.
  assert (runs / "001_seed-1/started").read_text() == "xx"
