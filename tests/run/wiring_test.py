"""Config to every setting outside the update, and settings to the parts."""

import dataclasses

import pytest
from etils import epath

from configs import quickstart
from stepsearch_jax.rollout import controls, text_side
from stepsearch_jax.run import experiment as experiment_lib
from stepsearch_jax.run import reporting
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings

# Where each record of the settings has its fields from.
SECTIONS = {
  "schedule": "", "model": "model", "model.size": "model.size",
  "data": "data", "data.world": "data.world", "batch": "batch",
  "protocol": "rollout", "warm_start": "warm_start",
  "warm_start.habits": "warm_start", "evaluation": "eval",
  "checkpoint": "checkpoint", "monitor": "sentinel",
  "monitor.limits": "sentinel", "mesh": "mesh", "log": "log",
  "retrieval": "retrieval", "retrieval.patience": "retrieval.patience",
  "retrieval.encoding": "retrieval.encoding", "sampler": "rollout",
  "rollout": "rollout", "reward": "reward",
  "rollout.probe": "probe", "reward.probe": "probe",
}
RENAMED = {
  "schedule.steps": "total_steps", "schedule.epochs": "total_epochs",
  "protocol.topk": "retrieval.topk",
  "rollout.probe.others": "probe.ig_search_sets", "rollout.probe.seed": "seed",
}
# Numbers that no other field of their section has.
CHANGES = {
  "seed": 23, "total_steps": 19, "retrieval.topk": 4, "rollout.max_turns": 7,
  "rollout.slots": 24, "rollout.block": 9, "rollout.top_k": 11,
  "rollout.top_p": 0.93, "ppo.old_logp": "recompute", "rollout.max_turn": 13,
  "rollout.max_observation": 21, "rollout.answer_room": 10,
  "rollout.retrieval_delay": 5, "rollout.search_threads": 3,
  "rollout.max_prompt": 33, "rollout.context": 130, "batch.questions": 16,
  "rollout.documents": "gold",
  "batch.rollouts": 2,
  "batch.dynamic": True, "batch.dynamic_limit": 6, "ppo.mini_batch": 8,
  "checkpoint.every": 17, "checkpoint.keep": 3, "eval.every": 12,
  "warm_start.whole": 0.11, "warm_start.repeat": 0.12,
  "warm_start.give_up": 0.13, "warm_start.rows": 14,
  "sentinel.invalid_share": 0.81, "sentinel.unanswered_share": 0.82,
  "sentinel.entropy": 0.003, "sentinel.kl": 8.0, "sentinel.grad_norm": 90.0,
  "sentinel.reward_drop": 0.3, "sentinel.patience": 4,
  "sentinel.searches": 0.2, "sentinel.clipped_share": 0.7,
  "sentinel.kl_growth": 0.15, "sentinel.explained_variance": -0.1,
  "sentinel.settling": 22, "sentinel.differing_share": 0.06,
  "sentinel.rollbacks": 2, "sentinel.lr_factor": 0.6,
  "reward.gamma_key": 0.5, "reward.search_bonus": 0.07,
  "reward.outcome_only": True, "reward.step_scale": 0.7,
  "reward.malformed": -0.5, "reward.key_match": "last",
  "reward.f1_decimals": 3, "reward.empty_gold": "never",
  "reward.step_position": "reencoded", "reward.outcome_on_step": "overwrite",
  "reward.document_text": "parsed", "reward.scored_text": "regex",
  "reward.eos": "dropped", "probe.reward": "ig_search", "probe.aliases": 25,
  "probe.tokens": (26, 27), "probe.tips_alpha": 0.28, "probe.tips_tau": 0.29,
  "probe.igpo_gain": "log", "probe.ig_search_alpha": 0.31,
  "probe.ig_search_sets": 32, "log.trajectories": 15,
  "log.trajectories_every": 18,
  "log.project": "theirs",
  "data.limit": 50, "data.eval_limit": 6, "data.holdout": 0.2,
}


def changed():
  config = quickstart.get_config("runlocal")
  config.update_from_flattened_dict(CHANGES)
  return config


def look_up(config, path):
  for name in path.split("."):
    config = config[name]
  return config


def fields_of(spec, path):
  """Yields (path, value) of the plain fields of a record."""
  for field in dataclasses.fields(spec):
    value = getattr(spec, field.name)
    if not dataclasses.is_dataclass(value):
      yield f"{path}.{field.name}", value


@pytest.mark.parametrize("record, section", SECTIONS.items())
def test_a_record_has_each_field_from_its_place(record, section):
  config = changed()
  settings = Settings.from_config(config, devices=1)
  spec = settings
  for name in record.split("."):
    spec = getattr(spec, name)
  seen = 0
  for path, value in fields_of(spec, record):
    name = path.rpartition(".")[2]
    source = RENAMED.get(path, f"{section}.{name}".lstrip("."))
    if record == "reward" and name not in config.reward:
      continue  # The preset's own.
    wanted = look_up(config, source)
    if hasattr(wanted, "to_dict"):
      wanted = wanted.to_dict()
    if isinstance(wanted, list):
      wanted = tuple(wanted)
    decided = wanted is None and record != "retrieval.encoding"
    if decided:  # Left to the method, see methods_test.
      wanted = look_up(settings.config, source)
    assert value == wanted, (path, source)
    seen += 1
  assert seen >= 1


def test_the_seed_and_the_preset_are_the_configs():
  def reward(preset):
    config = quickstart.get_config("runlocal")
    config.update_from_flattened_dict(
      {"reward.preset": preset, "reward.gamma_key": 0.5}
    )
    return Settings.from_config(config, devices=1).reward

  assert Settings.from_config(changed(), devices=1).seed == 23
  assert reward("released").step_scale == 1.6
  assert reward("paper").step_scale == 0.6
  assert reward("released").gamma_key == reward("paper").gamma_key == 0.5


def test_the_environment_and_the_engine_take_their_settings(
  tmp_path, monkeypatch
):
  made = Experiment(Settings.from_config(changed(), devices=1),
                    epath.Path(tmp_path))
  assert (made.env.max_turns, made.env.topk) == (7, 4)
  got = {}

  def programs(model, shape, table, first_stop, mesh):
    got.update(shape=shape)
    return "programs"

  def engine(compiled, texts, retriever, limits, seed):
    got.update(compiled=compiled, texts=texts, limits=limits, seed=seed)

  made.__dict__.update(retriever="retriever")
  monkeypatch.setattr(experiment_lib.programs, "RolloutPrograms", programs)
  monkeypatch.setattr(experiment_lib.engine_lib, "Engine", engine)
  _ = made.engine
  assert got["seed"] == 23 and got["compiled"] == "programs"
  assert got["shape"] is made.settings.sampler
  assert got["limits"] is made.settings.rollout
  assert isinstance(got["texts"], text_side.TextSide)
  assert got["limits"].max_turn == 13


@pytest.mark.parametrize("documents, kind", [
  ("found", text_side.TextSide), ("random", controls.RandomDocuments),
  ("gold", controls.GoldDocuments),
])
def test_what_a_search_shows_is_what_the_settings_say(
  tmp_path, monkeypatch, documents, kind
):
  config = changed()
  config.rollout.documents = documents
  made = Experiment(Settings.from_config(config, devices=1),
                    epath.Path(tmp_path))
  monkeypatch.setattr(Experiment, "make_engine", lambda self, texts: texts)
  assert type(made.engine) is kind


def test_the_card_says_what_the_settings_say():
  class Retriever:
    def describe(self):
      return {"index": "i", "encoder": "e", "passages": 5, "corpus_hash": "c"}

  card = reporting.card_settings(
    Settings.from_config(changed(), devices=1), Retriever(), "mine"
  )
  assert {name: card[name] for name in (
    "model", "k", "max_turns", "max_turn", "max_observation", "context",
    "template", "reward_preset", "seed", "index", "passages", "questions",
    "split", "corpus", "documents",
  )} == {
    "model": "mine", "k": 4, "max_turns": 7, "max_turn": 13,
    "max_observation": 21, "context": 130, "template": "compact",
    "reward_preset": "paper", "seed": 23, "index": "i", "passages": 5,
    "questions": "world", "split": "held out", "corpus": "the embedded world",
    "documents": "gold",
  }


def test_the_card_of_a_run_says_what_was_trained():
  config = changed()
  config.method, config.total_steps = "ppo", 30
  config.warm_start.steps, config.warm_start.policy = 11, ""
  found = reporting.training_settings(
    Settings.from_config(config, devices=1), 12
  )
  assert found == {
    "method": "ppo", "trained_on": "world", "trained_steps": "12 of 30",
    "batch": f"{config.batch.questions} questions x "
             f"{config.batch.rollouts} rollouts",
    "policy_lr": config.ppo.policy_lr, "value_lr": config.ppo.value_lr,
    "warm_start": "11 steps of imitation",
  }
  config.method, config.total_steps = "grpo", 0
  config.total_epochs, config.warm_start.steps = 2.5, 0
  found = reporting.training_settings(
    Settings.from_config(config, devices=1), 12
  )
  assert found["trained_steps"] == "12 of 2.5 epochs"
  assert "value_lr" not in found and "warm_start" not in found
