"""Config to every field of the learner's settings, by hand."""

import itertools

import pytest

from configs import common
from stepsearch_jax import types
from stepsearch_jax.models import adapters
from stepsearch_jax.ppo import specs
from stepsearch_jax.run.settings import Settings

# Values that no field shares with another, so that a wrong wire shows.
PPO = dict(
  gamma=0.91, lam=0.92, turn_gamma=0.93, turn_weight=0.94, strata_blend=0.95,
  clip_ratio=0.21, clip_ratio_high=0.22, dual_clip=3.1, ratio="turn",
  aggregation="token", llds_coef=0.23, llds_answer_weight=0.24,
  old_logp="rollout", importance_cap=2.5, value_clip=0.51, entropy_coef=0.011,
  kl_coef=0.012, kl_estimator="abs", kl_loss_estimator="mse",
  kl_controller="fixed", kl_target=0.13, kl_horizon=1400, epochs=3,
  mini_batch=6, micro_rows=5, policy_lr=1.5e-3, value_lr=1.6e-3,
  policy_warmup_ratio=0.25, value_warmup_ratio=0.5, critic_warmup=7,
  weight_decay=0.017, grad_clip=1.8,
)


def make_config(method="steppo", preset="paper"):
  config = common.base()
  config.total_steps = 10
  config.method = method
  config.reward.preset = preset
  config.batch.questions, config.batch.rollouts = 6, 4
  config.rollout.context = 190
  config.rollout.temperature = 0.8
  config.rollout.slots = 8
  config.ppo.update(PPO)
  return config


def learner(config, steps=10):
  return Settings.from_config(config, devices=1).learner(steps)


@pytest.mark.parametrize("method, preset", itertools.product(
  ("steppo", "ppo", "grpo", "reinforce"), ("paper", "released")
))
def test_every_field_reaches_the_learner(method, preset):
  released = preset == "released"
  optimizer = dict(
    first_rate_zero=released, weight_decay=0.017, grad_clip=1.8, adapter=None
  )
  # 10 steps of 3 epochs over 24 / 6 mini-batches: 120 optimizer steps.
  want = specs.LearnerSpec(
    estimator=specs.EstimatorSpec(
      name={"steppo": "gae", "ppo": "gae"}.get(method, method),
      gamma=0.91, lam=0.92, scope="attended" if released else "policy",
      turn_gamma=0.93, turn_weight=0.94, strata_blend=0.95,
    ),
    loss=specs.LossSpec(
      clip_ratio=0.21, clip_ratio_high=0.22, dual_clip=3.1, ratio="turn",
      aggregation="token", llds_coef=0.23, llds_answer_weight=0.24,
      old_logp="rollout", importance_cap=2.5, value_clip=0.51,
      entropy_coef=0.011,
      micro_weighting="micro_mean" if released else "token",
    ),
    kl=specs.KlSpec(
      in_reward=method != "grpo", coef=0.012, estimator="abs",
      loss_estimator="mse", controller="fixed", target=0.13, horizon=1400,
    ),
    policy=specs.OptimizerSpec(
      role="policy", learning_rate=1.5e-3, warmup=30, **optimizer
    ),
    value=specs.OptimizerSpec(
      role="value", learning_rate=1.6e-3, warmup=60, **optimizer
    ),
    batch=specs.BatchSpec(
      epochs=3, mini_batch=6, micro_rows=5, row_length=190
    ),
    temperature=0.8,
    critic_warmup=7,
  )
  assert learner(make_config(method, preset)) == want


@pytest.mark.parametrize("method", ["steppo", "ppo", "grpo", "reinforce"])
def test_only_steppo_pays_for_steps(method):
  settings = Settings.from_config(make_config(method), devices=1)
  assert settings.reward.outcome_only == (method != "steppo")


def test_the_kl_is_in_the_loss_or_in_the_reward():
  assert learner(make_config("grpo")).kl.loss_coef == 0.012
  assert learner(make_config("steppo")).kl.loss_coef == 0.0


def test_adapters_of_each_model_are_its_own():
  config = make_config()
  config.policy.update(kind="lora", rank=2, alpha=3.0)
  config.value.update(kind="adapter", rank=4, alpha=5.0)
  found = learner(config)
  assert found.policy.adapter == adapters.AdapterSpec(2, 3.0)
  assert found.value.adapter == adapters.AdapterSpec(4, 5.0)


def test_an_estimator_of_another_name_replaces_the_methods_own():
  config = make_config("grpo")
  config.estimator = "turn_rloo"
  found = learner(config)
  assert found.estimator.name == "turn_rloo" and not found.kl.in_reward


@pytest.mark.parametrize("changes, field", [
  ({"estimator": "gea"}, "estimator"),
  ({"estimator": "gigpo", "batch.rollouts": 1}, "batch.rollouts"),
  ({"method": "grpo", "batch.rollouts": 1}, "batch.rollouts"),
  ({"ppo.kl_loss_estimator": "kl"}, "ppo.kl_loss_estimator"),
  ({"ppo.clip_ratio_high": 0.1}, "ppo.clip_ratio_high"),
  ({"rollout.top_p": 0.9}, "ppo.old_logp"),
  ({"rollout.top_k": 40}, "ppo.old_logp"),
  ({"reward.preset": "released", "ppo.aggregation": "sequence"},
   "ppo.aggregation"),
  ({"ppo.epochs": 0}, "ppo.epochs"),
  ({"ppo.policy_lr": -1.0}, "ppo.policy_lr"),
  ({"ppo.value_warmup_ratio": -0.1}, "ppo.value_warmup_ratio"),
  ({"ppo.grad_clip": 0.0}, "ppo.grad_clip"),
  ({"ppo.lam": 1.1}, "ppo.lam"),
  ({"ppo.critic_warmup": -1}, "ppo.critic_warmup"),
])
def test_a_wrong_setting_of_the_update_names_its_field(changes, field):
  config = make_config()
  for path, value in changes.items():
    node, names = config, path.split(".")
    for name in names[:-1]:
      node = node[name]
    node[names[-1]] = value
  with pytest.raises(types.UserError, match=f"^{field}: expected ") as error:
    Settings.from_config(config, devices=1)
  assert "\n" not in str(error.value)
