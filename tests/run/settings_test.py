"""Every wrong setting is refused in the first second, by name."""

import dataclasses
import importlib.util

import pytest

from configs import common, quickstart
from stepsearch_jax import types
from stepsearch_jax.run import specs
from stepsearch_jax.run.settings import Settings


def config_with(changes):
  config = quickstart.get_config("runlocal")
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize("changes, field", [
  ({"method": "a2c"}, "method"),
  ({"total_epochs": 1.0}, "total_steps, total_epochs"),
  ({"total_steps": 0, "warm_start.steps": 0}, "total_steps, total_epochs"),
  ({"data.split": "test"}, "data.split"),
  ({"data.world.train": -1}, "data.world.train"),
  ({"warm_start.wording": "best"}, "warm_start.wording"),
  ({"warm_start.give_up": 2.0}, "warm_start.give_up"),
  ({"method": "grpo"}, "batch.rollouts"),
  ({"batch.questions": 7}, "ppo.mini_batch"),
  ({"batch.questions": 0}, "batch.questions"),
  ({"batch.dynamic": True}, "batch.rollouts"),
  ({"batch.dynamic_limit": 0}, "batch.dynamic_limit"),
  ({"mesh.data": 3}, "rollout.slots"),
  ({"mesh.data": 0}, "mesh.data"),
  ({"mesh.tensor": 0}, "mesh.tensor"),
  ({"mesh.rules": "width=fsdp"}, "mesh.rules"),
  ({"rollout.template": "x"}, "rollout.template"),
  ({"rollout.documents": "none"}, "rollout.documents"),
  ({"rollout.retrieval_delay": 0}, "rollout.retrieval_delay"),
  ({"rollout.temperature": 0.0}, "rollout.temperature"),
  ({"rollout.context": 4}, "rollout.context"),
  ({"rollout.max_turns": -1}, "rollout.max_turns"),
  ({"sentinel.action": "stop"}, "sentinel.action"),
  ({"sentinel.patience": 0}, "sentinel.patience"),
  ({"sentinel.lr_factor": 0.0}, "sentinel.lr_factor"),
  ({"reward.preset": "papr"}, "reward.preset"),
  ({"ppo.kl_estimator": "k3"}, "ppo.kl_estimator"),
  ({"ppo.kl_controller": "ramp"}, "ppo.kl_controller"),
  ({"ppo.micro_rows": 0}, "ppo.micro_rows"),
  ({"ppo.mini_batch": 0}, "ppo.mini_batch"),
  ({"policy.kind": "adapter"}, "policy.kind"),
  ({"value.kind": "lora"}, "value.kind"),
  ({"retrieval.engine": "faiss"}, "retrieval.engine"),
  ({"retrieval.replay_miss": "ask"}, "retrieval.replay_miss"),
  ({"retrieval.topk": 0}, "retrieval.topk"),
  ({"model.size.family": "gpt2"}, "model.size.family"),
  ({"model.size.heads": 3}, "model.size.heads"),
  ({"model.dtype": "bf16"}, "model.dtype"),
  ({"model.remat": "True"}, "model.remat"),
  ({"model.remat": "some"}, "model.remat"),
  ({"warm_start.rows": 0}, "warm_start.rows"),
  ({"checkpoint.every": 0}, "checkpoint.every"),
  ({"checkpoint.keep": 0}, "checkpoint.keep"),
  ({"eval.every": -1}, "eval.every"),
  ({"data.holdout": 1.0}, "data.holdout"),
  ({"log.profile": (3, 2)}, "log.profile"),
  ({"probe.reward": "steps"}, "probe.reward"),
  ({"method": "tips", "reward.function": "builtins:print"}, "probe.reward"),
  ({"method": "igpo"}, "batch.rollouts"),
  ({"method": "ig_search"}, "batch.rollouts"),
  ({"method": "tips", "probe.aliases": 0}, "probe.aliases"),
  ({"method": "tips", "probe.tokens": (32, 8)}, "probe.tokens"),
  ({"method": "tips", "probe.tokens": (160,)}, "probe.tokens"),
  ({"method": "tips", "probe.tips_alpha": 0.0}, "probe.tips_alpha"),
  ({"method": "tips", "probe.tips_alpha": float("nan")}, "probe.tips_alpha"),
  ({"method": "tips", "probe.tips_tau": -1.0}, "probe.tips_tau"),
  ({"method": "igpo", "batch.rollouts": 2, "probe.igpo_gain": "odds"},
   "probe.igpo_gain"),
  ({"method": "ig_search", "batch.rollouts": 2, "probe.ig_search_sets": 0},
   "probe.ig_search_sets"),
  ({"method": "ig_search", "batch.rollouts": 2,
    "probe.ig_search_alpha": -0.3}, "probe.ig_search_alpha"),
  ({"log.tracker": "mlflow"}, "log.tracker"),
  ({"sentinel.settling": -1}, "sentinel.settling"),
  ({"method": "grpo", "batch.rollouts": 2,
    "ppo.kl_controller": "adaptive"}, "ppo.kl_controller"),
  *[({field: value}, f"{field}: expected a finite number, got {value}")
    for field in (
      "ppo.policy_warmup_ratio", "ppo.value_warmup_ratio", "reward.gamma_key",
      "reward.step_scale", "sentinel.kl", "sentinel.searches", "policy.alpha",
      "retrieval.patience.timeout_seconds", "rollout.temperature",
    ) for value in (float("nan"), float("inf"))],
  *[({field: ("a",)}, f"{field}: expected integers, got ('a',)")
    for field in ("rollout.extend_rows", "rollout.extend_tokens",
                  "probe.tokens", "log.profile")],
  ({"rollout.extend_rows": (1, 2.5)}, "rollout.extend_rows"),
])
def test_a_wrong_setting_names_its_field(changes, field):
  config = config_with(changes)
  with pytest.raises(types.UserError) as error:
    Settings.from_config(config, devices=1)
  assert field in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("given, devices, batch, slots", [
  ((-1, 2, 2, ""), 8, 4, 4), ((2, -1, 2, ""), 8, 4, 4),
  ((2, 4, 1, "batch=data"), 8, 2, 8), ((1, 2, 4, "batch=data+tensor"), 8, 4, 2),
  ((2, 4, 1, "slots="), 8, 8, 1),
])
def test_rows_and_slots_divide_over_the_axes_of_their_rules(
  given, devices, batch, slots
):
  mesh = specs.MeshSpec(*given)
  assert mesh.shards("batch", devices) == batch
  assert mesh.shards("slots", devices) == slots


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_said_in_the_first_second(monkeypatch, name):
  config = config_with({"log.tracker": name})
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(types.UserError, match=rf'install -e "\.\[{name}\]"'):
    Settings.from_config(config, devices=1)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
  assert Settings.from_config(config, devices=1).log.tracker == name
  config.log.project = ""
  with pytest.raises(types.UserError, match="log.project"):
    Settings.from_config(config, devices=1)


@pytest.mark.parametrize("field, value", [
  ("step_scale", 0.3), ("malformed", -0.5), ("key_match", "last"),
  ("f1_decimals", 2), ("empty_gold", "never"), ("step_position", "reencoded"),
  ("outcome_on_step", "overwrite"), ("document_text", "parsed"),
  ("scored_text", "regex"), ("eos", "dropped"), ("gamma_key", 0.1),
  ("search_bonus", 0.2), ("information_gain", False),
  ("redundancy_penalty", False), ("search_steps_reward", False),
  ("search_key_reward", False),
])
def test_every_choice_of_a_reward_preset_is_a_field(field, value):
  preset = Settings.from_config(config_with({}), devices=1).reward
  ours = Settings.from_config(
    config_with({f"reward.{field}": value}), devices=1
  ).reward
  assert getattr(preset, field) != value
  assert ours == dataclasses.replace(preset, **{field: value})


def test_the_schedule_covers_every_question():
  config = config_with({"total_steps": 0, "total_epochs": 1.0})
  settings = Settings.from_config(config, devices=1)
  assert config.batch.questions == 8
  assert settings.total_steps(100) == 13
  assert settings.total_steps(96) == 12
  assert settings.total_steps(1) == 1


def leaves(tree, prefix=""):
  for name, value in tree.items():
    if hasattr(value, "items"):
      yield from leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name


def test_settings_keep_every_field_of_the_config():
  config = common.base()
  config.total_steps = 1
  settings = Settings.from_config(config, devices=1)
  assert set(leaves(settings.config)) == set(leaves(config))


def test_a_config_of_another_version_says_which_field_it_lacks():
  config = quickstart.get_config("runlocal")
  with config.unlocked():
    del config.model["chat"]
  with pytest.raises(types.UserError, match="no field 'chat'"):
    Settings.from_config(config, devices=1)


def test_variables_of_a_chat_template_may_be_words():
  config = quickstart.get_config("runlocal")
  with config.unlocked():
    config.model.chat["tools"] = ("search",)
  settings = Settings.from_config(config, devices=1)
  assert settings.model.chat["tools"] == ("search",)
