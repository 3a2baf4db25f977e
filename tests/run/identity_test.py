"""Which starts are the same run: fields, questions, and a lock."""

import copy
import dataclasses
import json

import pytest
from etils import epath

from configs import quickstart
from stepsearch_jax import types
from stepsearch_jax.run import identity

PASSAGE = types.Passage("p", "Larn", "Larn is a port.")
QUESTION = types.Question(
  "1", "Who founded Larn?", ("Ada",), search_keys=(("Larn founder",),),
  support=(PASSAGE,), decomposition=(types.SubQuestion("Who?", "Ada", 0),),
)


def config_with(**changes):
  config = quickstart.get_config("runlocal")
  config.update_from_flattened_dict(changes)
  return config.to_dict()


def test_any_field_that_training_reads_changes_the_questions_hash():
  same = identity.questions_hash([QUESTION])
  assert same == identity.questions_hash([copy.deepcopy(QUESTION)])
  others = [
    dict(id="2"), dict(text="Who?"), dict(answers=("Ada", "Bo")),
    dict(search_keys=(("Larn",),)), dict(support=()),
    dict(support=(dataclasses.replace(PASSAGE, text="Larn."),)),
    dict(decomposition=()),
  ]
  hashes = [
    identity.questions_hash([dataclasses.replace(QUESTION, **change)])
    for change in others
  ]
  assert len({same, *hashes}) == len(others) + 1
  assert identity.questions_hash([QUESTION] * 2) != same


@pytest.mark.parametrize("field, value", [
  ("seed", 1), ("method", "ppo"), ("ppo.policy_lr", 1.0),
  ("retrieval.topk", 2), ("rollout.template", "plain"), ("model.dtype",
  "bfloat16"), ("reward.preset", "released"), ("batch.questions", 16),
  ("batch.dynamic_limit", 4), ("data.limit", 9), ("data.world.seed", 4),
])
def test_a_field_that_changes_results_is_refused_unless_named(
  tmp_path, field, value
):
  folder = epath.Path(tmp_path)
  identity.claim(folder, config_with(), "hash")
  other = config_with(**{field: value, "total_steps": 99})
  for allowed in ((), ("total_steps",), (field,)):
    with pytest.raises(identity.ChangedSettingsError) as error:
      identity.claim(folder, other, "hash", allowed)
    missing = {field, "total_steps"} - set(allowed)
    assert f"--allow_changes={','.join(sorted(missing))} " in str(error.value)
  assert json.loads((folder / "config.json").read_text())["changes"] == []
  identity.claim(folder, other, "hash", (field, "total_steps"))
  changes = json.loads((folder / "config.json").read_text())["changes"]
  assert [c["field"] for c in changes] == sorted([field, "total_steps"])
  assert value in [c["to"] for c in changes]


@pytest.mark.parametrize("field, value", [
  ("model.remat", "dots"), ("checkpoint.every", 7), ("eval.every", 3),
  ("log.trajectories", 0), ("mesh.fsdp", 1), ("data.eval_limit", 3),
  ("rollout.search_threads", 2), ("retrieval.cache", 7),
])
def test_a_field_of_speed_or_place_is_free(tmp_path, field, value):
  folder = epath.Path(tmp_path)
  identity.claim(folder, config_with(), "hash")
  identity.claim(folder, config_with(**{field: value}), "hash")


@pytest.mark.parametrize("field, value", [
  ("warm_start.traces", "traces.jsonl"), ("warm_start.steps", 7),
  ("probe.tokens", (32,)),
])
def test_what_a_run_will_learn_from_is_free_until_it_has_learned(
  tmp_path, field, value
):
  folder = epath.Path(tmp_path)
  identity.claim(folder, config_with(), "hash")
  assert not identity.has_learned(folder)
  (folder / "checkpoints").mkdir()  # Opened, and nothing saved.
  identity.claim(folder, config_with(**{field: value}), "hash")
  written = json.loads((folder / "config.json").read_text())
  assert written["changes"] == []
  found = identity.flat(written["config"])[field]
  assert found == (list(value) if isinstance(value, tuple) else value)
  (folder / "checkpoints/0").mkdir()
  with pytest.raises(identity.ChangedSettingsError, match=field):
    identity.claim(folder, config_with(), "hash")


def test_other_questions_are_another_run(tmp_path):
  folder = epath.Path(tmp_path)
  identity.claim(folder, config_with(), "hash")
  with pytest.raises(identity.ChangedSettingsError, match="data: the run has"):
    identity.claim(folder, config_with(), "other")


def test_a_folder_in_use_is_refused(tmp_path):
  folder = epath.Path(tmp_path)
  with identity.locked(folder):
    with pytest.raises(types.UserError, match="in use by process"):
      with identity.locked(folder):
        pass
  with identity.locked(folder):
    pass


def test_a_field_is_free_by_its_whole_name():
  assert identity.is_free("log") and identity.is_free("log.profile")
  assert not identity.is_free("logic") and not identity.is_free("logic.x")


@pytest.mark.parametrize("content, said", [
  ("", "config.json:1: malformed JSON"), ("[]", "expected a JSON object"),
  ('{"config": {"see', "config.json:1: malformed JSON"),
  ("{}", "config.json: field config: expected dict, got no such field"),
  ('{"config": "x"}', "config.json: field config: expected dict, got 'x'"),
])
def test_a_damaged_config_is_one_line(tmp_path, content, said):
  folder = epath.Path(tmp_path)
  (folder / "config.json").write_text(content)
  for use in (identity.read, identity.started, lambda folder: identity.claim(
    folder, config_with(), "hash")):
    with pytest.raises(types.UserError, match=said):
      use(folder)


@pytest.mark.parametrize("field", ["questions", "changes"])
def test_a_run_is_claimed_with_all_that_is_compared(tmp_path, field):
  folder = epath.Path(tmp_path)
  identity.claim(folder, config_with(), "hash")
  row = json.loads((folder / "config.json").read_text())
  del row[field]
  (folder / "config.json").write_text(json.dumps(row))
  with pytest.raises(types.UserError, match=f"config.json: field {field}: "):
    identity.claim(folder, config_with(), "hash")
