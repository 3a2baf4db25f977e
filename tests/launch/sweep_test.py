"""Sweeps become commands that the trainer understands."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def plan(config, workdir, *arguments):
  return subprocess.run(
    [sys.executable, "launch/sweep.py", f"--config={config}",
     f"--workdir={workdir}", "--dry_run", *arguments],
    capture_output=True, text=True, cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )


def test_quickstart_sweep_is_two_methods_by_three_seeds(tmp_path):
  done = plan("configs/quickstart.py", tmp_path)
  commands = done.stdout.splitlines()
  assert done.returncode == 0 and len(commands) == 6
  assert len({c.split("--workdir=")[1] for c in commands}) == 6
  for method in ("steppo", "ppo"):
    for seed in range(3):
      arguments = (f"--config=configs/quickstart.py:method={method} "
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


@pytest.mark.parametrize("arguments, message", [
  (["--config.ppo.learning=1"], "the command sets ppo.learning, which is no"),
  (["--config.seed=1"], "--config.seed: the sweep itself varies it"),
  (["--config.total_steps=many"],
   "flag --config.total_steps=many: invalid literal for int()"),
  (["--steps=3"], "--steps=3: expected --config.FIELD=VALUE"),
])
def test_overrides_that_cannot_be_are_refused(tmp_path, arguments, message):
  done = plan("configs/quickstart.py", tmp_path, *arguments)
  assert done.returncode == 1 and message in done.stderr


def test_overrides_and_arguments_go_to_every_run(tmp_path):
  done = plan("configs/quickstart.py:runlocal", tmp_path,
              "--config.total_steps=3", "--config.model.remat=none")
  commands = done.stdout.splitlines()
  assert len(commands) == 6, done.stderr
  for command in commands:
    assert "--config=configs/quickstart.py:runlocal,method=" in command
    assert "--config.total_steps=3 --config.model.remat=none" in command


def test_arms_of_the_ablation_play_the_same_number_of_rollouts(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "launch"))
  monkeypatch.syspath_prepend(str(ROOT))
  import sweep

  monkeypatch.chdir(ROOT)
  runs = sweep.plan("configs/stepsearch_qwen2_5_3b.py", [])
  rollouts = {run.config["batch"]["questions"] * run.config["batch"]["rollouts"]
              for run in runs}
  assert rollouts == {128}
  off = {"search_steps_reward", "redundancy_penalty", "information_gain",
         "search_key_reward"}
  switched = [{name for name in off if not run.config["reward"][name]}
              for run in runs]
  assert {"search_key_reward"} in switched


# Settings are read and written as the trainer does; nothing is trained.
TRAINER = """
import json, pathlib, sys
from absl import app, flags
from ml_collections import config_flags
from stepsearch_jax.run import methods
config_flags.DEFINE_config_file('config')
flags.DEFINE_string('workdir', None, '')

def main(argv):
  config = json.loads(json.dumps(
    methods.filled(flags.FLAGS.config).to_dict()))
  seed = config['seed']
  folder = pathlib.Path(flags.FLAGS.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'started').open('a') as file: file.write('x')
  if not (folder / 'index').exists():
    (folder / 'index').mkdir()
    (folder / 'index/manifest.json').write_text(str(seed))
  if seed == 1 and len((folder / 'started').read_text()) < 2: sys.exit(75)
  record = {'step': 1, 'critic/answer_correct/mean': 0.5, 'val/em': 0.2}
  (folder / 'metrics.jsonl').write_text(json.dumps(record) + '\\n')
  if (folder / 'config.json').exists():
    if json.loads((folder / 'config.json').read_text())['config'] != config:
      sys.exit('error: other settings')
  (folder / 'config.json').write_text(json.dumps({'config': config}))
  names = ('em_before', 'em_after', 'f1_after', 'searches_per_question',
           'train_seconds')
  (folder / 'summary.json').write_text(json.dumps(dict.fromkeys(names, seed)))

app.run(main)
"""
# Its modules but one are the project's own.
PACKAGE = f"__path__.append({str(ROOT / 'stepsearch_jax')!r})\n"


@pytest.fixture
def sweep(tmp_path):
  """Sweeps three seeds with a stand-in trainer: the launcher is tested."""
  package = tmp_path / "fake" / "stepsearch_jax"
  package.mkdir(parents=True)
  (package / "__init__.py").write_text(PACKAGE)
  (package / "train.py").write_text(TRAINER)
  config = tmp_path / "seeds.py"
  config.write_text(
    "from configs import common\n"
    "def get_config(arg=None):\n"
    "  return common.base()\n"
    "def sweep(add):\n"
    "  for seed in range(3): add(seed=seed)\n"
  )

  def run(*arguments):
    return subprocess.run(
      [sys.executable, str(ROOT / "launch/sweep.py"), f"--config={config}",
       f"--workdir={tmp_path}/runs", "--parallel=2", *arguments],
      capture_output=True, text=True, cwd=tmp_path / "fake",
      env=os.environ | {"PYTHONPATH": str(ROOT)},
    )

  return run


def test_a_sweep_runs_side_by_side_resumes_and_ends_in_table_and_plot(
  sweep, tmp_path
):
  first = sweep()
  assert first.returncode == 1
  assert "001_seed-1 (code 75) did not finish" in first.stderr
  second = sweep()
  assert second.returncode == 0, second.stderr
  assert "002_seed-2" in second.stdout
  # Seeds 0, 1, 2: mean 1, sample deviation 1.
  (mean,) = [line for line in second.stdout.splitlines()
             if line.startswith("default (3)")]
  assert mean.split()[2:] == ["1.000", "+-", "1.000"] * 5
  runs = tmp_path / "runs"
  assert (runs / "sweep.png").stat().st_size > 10_000
  assert (runs / "000_seed-0/started").read_text() == "x"  # Not run again.
  assert (runs / "001_seed-1/started").read_text() == "xx"


def test_runs_share_what_the_first_of_them_built(sweep, tmp_path):
  sweep()
  built = [tmp_path / "runs" / name / "index/manifest.json"
           for name in ("000_seed-0", "001_seed-1", "002_seed-2")]
  assert len({path.resolve() for path in built}) == 1
  assert built[2].read_text() == "0"


@pytest.mark.slow
def test_a_finished_run_is_skipped_with_the_same_settings_only(
  sweep, tmp_path
):
  # The method decides the ratio, the scale is None at first, rows are a tuple.
  same = ["--config.reward.step_scale=1", "--config.estimator=turn_gae",
          "--config.rollout.extend_rows=2,4"]
  sweep(*same)
  folder = tmp_path / "runs/000_seed-0"
  assert sweep(*same).returncode == 0
  assert (folder / "started").read_text() == "x"
  changed = sweep("--config.ppo.clip_ratio=0.3", *same)
  assert changed.returncode == 1
  assert "000_seed-0 (code 1)" in changed.stderr
  assert (folder / "log.txt").read_text().endswith("error: other settings\n")
  kept = json.loads((folder / "config.json").read_text())
  assert kept["config"]["ppo"]["clip_ratio"] == 0.2


def test_a_sweep_is_found_by_name(tmp_path):
  by_name, by_path = (
    plan(config, tmp_path) for config in ("quickstart", "configs/quickstart.py")
  )
  assert by_name.returncode == 0 and by_name.stdout == by_path.stdout
  missing = plan("quikstart", tmp_path)
  assert missing.returncode == 1
  assert missing.stderr.endswith("did you mean quickstart?\n")
