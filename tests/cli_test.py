"""Verbs, help, configs by name, and requests to stop."""

import os
import pathlib
import subprocess
import sys

from stepsearch_jax import __main__ as verbs

ROOT = pathlib.Path(__file__).parents[1]


def stepsearch(*arguments, cwd=ROOT):
  return subprocess.run(
    [sys.executable, "-m", "stepsearch_jax", *arguments], cwd=cwd, text=True,
    capture_output=True, timeout=120,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )


def test_every_verb_names_a_module_that_runs_as_a_command():
  for verb, (module, _) in verbs.VERBS.items():
    if verb in verbs.LAUNCHERS:
      path = ROOT / f"launch/{verb}.py"
    else:
      path = ROOT / "stepsearch_jax" / (module.replace(".", "/") + ".py")
    assert 'if __name__ == "__main__":' in path.read_text(), verb
  assert stepsearch("help").stdout.count("\n  ") >= len(verbs.VERBS)


def test_an_unknown_verb_or_config_names_the_nearest(tmp_path):
  done = stepsearch("evalute")
  assert (done.returncode, done.stderr) == (
    1, "error: there is no verb 'evalute'; did you mean 'evaluate'?\n"
  )
  done = stepsearch("train", "--config=quikstart", "--workdir=w", cwd=tmp_path)
  assert done.returncode == 1
  assert done.stderr.endswith("did you mean quickstart?\n")


def test_help_shows_the_flags_of_the_verb_with_an_example(tmp_path):
  done = stepsearch("export", "--help", cwd=tmp_path)
  assert done.returncode == 0
  for part in ("--workdir=runs/quickstart", "--dtype", "--output"):
    assert part in done.stdout
  assert "--logtostderr" not in done.stdout


def test_configs_are_found_from_anywhere(tmp_path):
  done = stepsearch(
    "train", "--config=quickstart", "--config.sentinel.action=stop",
    "--workdir=w", cwd=tmp_path,
  )
  assert done.stderr.endswith(
    "error: sentinel.action: expected one of ('off', 'warn', 'halt', "
    "'rollback'), got 'stop'\n"
  )
  assert not (tmp_path / "w").exists()


def test_the_old_name_of_a_field_is_refused_with_the_new_one(tmp_path):
  done = stepsearch(
    "train", "--config=quickstart", "--workdir=w",
    "--config.log.wandb_project=mine", cwd=tmp_path,
  )
  assert done.returncode == 1
  assert done.stderr.endswith(
    "the config has no field 'wandb_project'; it is log.project now, with "
    "log.tracker = wandb or trackio\n"
  )


def test_overrides_may_stand_in_front_of_the_config(tmp_path):
  for config in (["--config=quickstart:runlocal"],
                 ["--config", "quickstart:runlocal"]):
    done = stepsearch(
      "train", "--config.sentinel.action=stop", "--workdir=w", *config,
      cwd=tmp_path,
    )
    assert done.stderr.endswith("'rollback'), got 'stop'\n"), done.stderr
