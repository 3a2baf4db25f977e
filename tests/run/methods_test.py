"""Methods: what each stands for, what a config keeps, what is said of it."""

import json

import pytest

from configs import common
from stepsearch_jax import types
from stepsearch_jax.ppo import estimators
from stepsearch_jax.run import identity, methods
from stepsearch_jax.run.settings import Settings

# By hand: estimator, only the outcome is paid, KL in the reward, KL weight,
# lower and upper clip, ratio, aggregation, LLDS weight.
WANT = {
  "steppo": ("gae", False, True, .001, .2, 0, "token", "token", 0),
  "ppo": ("gae", True, True, .001, .2, 0, "token", "token", 0),
  "turn_ppo": ("turn_gae", True, True, .001, .2, 0, "token", "token", 0),
  "bilevel": ("bilevel_gae", True, True, .001, .2, 0, "token", "token", 0),
  "reinforce": ("reinforce", True, True, .001, .2, 0, "token", "token", 0),
  "rloo": ("rloo", True, True, .001, .2, 0, "token", "token", 0),
  "grpo": ("grpo", True, False, .001, .2, 0, "token", "token", 0),
  "llds_grpo": ("grpo", True, False, .001, .2, 0, "token", "token", .2),
  "dapo": ("grpo", True, False, 0, .2, .28, "token", "token", 0),
  "gspo": ("grpo", True, False, 0, 3e-4, 4e-4, "sequence", "sequence", 0),
  "grpo_no_std":
    ("grpo_no_std", True, False, 0, .2, 0, "token", "constant", 0),
  "maxrl": ("maxrl", True, False, .001, .2, 0, "token", "token", 0),
  "stratified": ("stratified", True, False, .001, .2, 0, "token", "token", 0),
  "gigpo": ("gigpo", True, False, .001, .2, 0, "token", "token", 0),
  "turn_rloo": ("turn_rloo", False, False, .001, .2, 0, "token", "token", 0),
  "tips": ("gae", True, True, .001, .2, 0, "token", "token", 0),
  "igpo": ("igpo", True, False, .001, .2, 0, "token", "token", 0),
  "ig_search": ("ig_search", True, False, .001, .2, 0, "token", "token", 0),
}
PROBED = ("tips", "igpo", "ig_search")


def config_of(method, **changes):
  config = common.base()
  config.total_steps = 1
  config.batch.rollouts = 2
  config.update_from_flattened_dict({"method": method, **changes})
  return config


def settings_of(method, **changes):
  return Settings.from_config(config_of(method, **changes), devices=1)


def test_every_method_is_written_down_here():
  assert set(methods.METHODS) == set(WANT)
  assert {want[0] for want in WANT.values()} == set(estimators.REGISTRY)


@pytest.mark.parametrize("method", WANT)
def test_a_method_reaches_rewards_and_learner(method):
  settings = settings_of(method)
  learner = settings.learner(1)
  assert settings.batch.dynamic == (method == "dapo")
  probed = method if method in PROBED else "none"
  assert settings.reward.probe.reward == probed
  assert (settings.rollout.probe is not None) == (method in PROBED)
  assert WANT[method] == (
    learner.estimator.name, settings.reward.outcome_only,
    learner.kl.in_reward, learner.kl.coef, learner.loss.clip_ratio,
    learner.loss.clip_ratio_high, learner.loss.ratio,
    learner.loss.aggregation, learner.loss.llds_coef,
  )


def test_a_field_that_is_set_stays_whatever_the_method():
  settings = settings_of("dapo", **{
    "estimator": "turn_rloo", "reward.outcome_only": False,
    "ppo.clip_ratio_high": 0.3, "ppo.kl_coef": 0.5,
    "ppo.kl_in_reward": True,
  })
  learner = settings.learner(1)
  assert not settings.reward.outcome_only
  assert learner.estimator.name == "turn_rloo"
  assert learner.loss.clip_ratio_high == 0.3
  assert (learner.kl.in_reward, learner.kl.coef) == (True, 0.5)


def test_the_given_config_is_left_alone():
  config = config_of("dapo")
  Settings.from_config(config, devices=1)
  assert config.estimator is None and config.ppo.kl_coef is None


def test_what_was_chosen_stands_in_the_config_of_the_run(tmp_path):
  identity.claim(tmp_path, settings_of("gspo").config, "hash")
  kept = json.loads((tmp_path / "config.json").read_text())["config"]
  assert kept["method"] == "gspo" and kept["estimator"] == "grpo"
  assert kept["ppo"]["clip_ratio_high"] == 4e-4
  assert None not in [identity.flat(kept)[path] for path in methods.DECIDED]


def test_the_start_says_what_was_chosen_and_what_was_not():
  text = methods.described(
    settings_of("grpo", **{"ppo.kl_coef": 0.5}).config
  )
  assert text.startswith("method grpo, ") and "\n" not in text
  assert "estimator = grpo, " in text
  assert "ppo.kl_coef = 0.5 (instead of 0.001)" in text
  assert text.count("instead of") == 1


@pytest.mark.parametrize("given, near", [
  ("gigop", "gigpo"), ("stepo", "steppo"), ("turn_rlo", "turn_rloo"),
])
def test_an_unknown_method_names_the_nearest(given, near):
  with pytest.raises(types.UserError, match=f"did you mean {near}") as error:
    settings_of(given)
  assert str(error.value).startswith("method: expected one of steppo, ppo, ")
  assert str(error.value).endswith(f"got {given!r}")


def test_a_method_of_groups_says_how_many_rollouts_it_needs():
  needy = [name for name, want in WANT.items()
           if estimators.find(want[0]).needs_groups]
  assert "grpo" in needy and "steppo" not in needy
  for name in needy:
    with pytest.raises(types.UserError, match=(
      r"^batch.rollouts: expected 2 or more, because [\w.]+ compares rollouts "
      r"of one question, got 1$"
    )):
      settings_of(name, **{"batch.rollouts": 1})
