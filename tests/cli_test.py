"""Verbs, help, configs by name, and requests to stop."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from stepsearch_jax import __main__ as verbs
from stepsearch_jax import cli

ROOT = pathlib.Path(__file__).parents[1]


def stepsearch(*arguments, cwd=ROOT):
  return subprocess.run(
    [sys.executable, "-m", "stepsearch_jax", *arguments], cwd=cwd, text=True,
    capture_output=True, timeout=120,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )


def source_of(verb):
  if verb in verbs.LAUNCHERS:
    return ROOT / f"launch/{verb}.py"
  module = verbs.VERBS[verb][0].replace(".", "/")
  return ROOT / "stepsearch_jax" / f"{module}.py"


def test_every_verb_names_a_module_that_runs_as_a_command():
  for verb in verbs.VERBS:
    text = source_of(verb).read_text()
    assert 'if __name__ == "__main__":' in text, verb
    # What --help prints.
    assert f"\n  stepsearch {verb}" in ast.get_docstring(ast.parse(text)), verb
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


@pytest.mark.slow
@pytest.mark.parametrize("verb", verbs.VERBS)
def test_every_verb_has_help(verb, tmp_path):
  done = stepsearch(verb, "--help", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert f"  stepsearch {verb}" in done.stdout
  assert "\nflags:\n  --" in done.stdout and not done.stderr


@pytest.mark.parametrize("arguments, said", [
  (["train", "--config=quickstart", "--config.ppo.policy_lrr=3"],
   "--config.ppo.policy_lrr=3: the config has no field 'policy_lrr'; did you "
   "mean policy_lr?"),
  (["train", "--config=quickstart:fast"],
   "--config: unknown config argument 'fast'; accepted: ['method', "
   "'runlocal']"),
  (["view", "--ouput=r.html"],
   "Unknown command line flag 'ouput'. Did you mean: output ?; --help shows "
   "the flags"),
  (["train"],
   "--config is missing; --workdir is missing; --help shows the flags"),
])
def test_wrong_flags_are_one_line(tmp_path, arguments, said):
  done = stepsearch(*arguments, cwd=tmp_path)
  assert (done.returncode, done.stderr) == (1, f"error: {said}\n")


@pytest.mark.parametrize("config, said", [
  ("broken.py", "--config: Expecting value: line 1 column 1 (char 0)"),
  (f"{ROOT}/stepsearch_jax/run/saved.py:run",
   "--config: run/config.json:1: malformed JSON (Expecting value at column 1)"),
])
def test_a_config_that_cannot_be_read_is_one_line(
  tmp_path, monkeypatch, config, said
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "broken.py").write_text(
    "import json\ndef get_config():\n  json.loads('')\n"
  )
  (tmp_path / "run").mkdir()
  (tmp_path / "run/config.json").touch()
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  with pytest.raises(flags.Error) as error:
    values(["test", f"--config={config}"])
  assert cli._wrong_flags(error.value) == said


def test_a_model_brings_its_own_settings(tmp_path):
  (tmp_path / "stepsearch.json").write_text('{"rollout": {"turns": 3}}')
  done = stepsearch("ask", f"--model={tmp_path}", "--index=i", cwd=tmp_path)
  assert done.returncode == 1
  assert "stepsearch.json was written by another version" in done.stderr
  assert "Traceback" not in done.stderr
  done = stepsearch("ask", "--model=.", "--index=i", cwd=ROOT)
  assert done.stderr == (
    "error: --index: i is no index: manifest.json is missing\n")


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
