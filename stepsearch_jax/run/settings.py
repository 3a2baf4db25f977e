"""From a ConfigDict to checked settings of rewards and learner.

Beside `experiment.py`, which builds the parts, the last place that sees
`config`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from stepsearch_jax import types
from stepsearch_jax.env import prompts
from stepsearch_jax.models import adapters, decoder
from stepsearch_jax.ppo import records
from stepsearch_jax.rewards import step_rewards
from stepsearch_jax.rollout import device as slots
from stepsearch_jax.run import monitor as sentinel

# Estimator of each algorithm, and whether only the answer's F1 is rewarded.
_ALGORITHMS = {
  "steppo": ("gae", False),
  "ppo": ("gae", True),
  "grpo": ("grpo", True),
  "reinforce": ("reinforce", True),
}


def validate(config) -> None:
  """Checks what no single part can check.

  Raises:
    UserError: naming the field, what was expected and what was given.
  """
  if config.algorithm not in _ALGORITHMS:
    raise types.UserError(
      f"algorithm must be one of {sorted(_ALGORITHMS)}, got "
      f"{config.algorithm!r}"
    )
  if (config.total_steps > 0) == (config.total_epochs > 0):
    raise types.UserError(
      "set exactly one of total_steps and total_epochs, got "
      f"{config.total_steps} and {config.total_epochs}"
    )
  if config.algorithm == "grpo" and config.batch.rollouts < 2:
    raise types.UserError(
      "grpo compares rollouts of one question: batch.rollouts must be >= 2, "
      f"got {config.batch.rollouts}"
    )
  rollouts = config.batch.questions * config.batch.rollouts
  if rollouts < 1 or rollouts % config.ppo.mini_batch:
    raise types.UserError(
      f"batch.questions * batch.rollouts = {rollouts} must be a positive "
      f"multiple of ppo.mini_batch = {config.ppo.mini_batch}"
    )
  for field, value in (
    ("rollout.slots", config.rollout.slots),
    ("ppo.micro_rows", config.ppo.micro_rows),
  ):
    shards = _data_shards(config.mesh)
    if value % shards:
      raise types.UserError(
        f"{field} = {value} is not divisible by the mesh's {shards} data "
        "shards (mesh.data * mesh.fsdp)"
      )
  if config.rollout.template not in prompts.TEMPLATES:
    raise types.UserError(
      f"rollout.template must be one of {sorted(prompts.TEMPLATES)}, got "
      f"{config.rollout.template!r}"
    )


def _data_shards(mesh) -> int:
  if mesh.data != -1 and mesh.fsdp != -1:
    return mesh.data * mesh.fsdp
  return max(jax.device_count() // mesh.tensor, 1)


def total_steps(config, questions: int) -> int:
  """Training steps; an epoch asks every question once."""
  if config.total_steps:
    return config.total_steps
  return max(int(config.total_epochs * questions) // config.batch.questions, 1)


def reward_spec(config) -> step_rewards.RewardSpec:
  """The preset with the ablation switches of the config."""
  reward = config.reward
  if reward.preset not in step_rewards.PRESETS:
    raise types.UserError(
      f"reward.preset must be one of {sorted(step_rewards.PRESETS)}, got "
      f"{reward.preset!r}"
    )
  overrides = {k: v for k, v in reward.items() if k != "preset"}
  return dataclasses.replace(
    step_rewards.PRESETS[reward.preset](),
    outcome_only=_ALGORITHMS[config.algorithm][1],
    **overrides,
  )


def sized_decoder(config, vocab_size: int) -> decoder.DecoderConfig:
  """Decoder of `model.size`."""
  size = config.model.size
  return decoder.DecoderConfig(
    family=size.family,
    vocab_size=vocab_size,
    hidden_size=size.hidden,
    intermediate_size=size.mlp,
    num_layers=size.layers,
    num_heads=size.heads,
    num_kv_heads=size.kv_heads,
    head_dim=size.hidden // size.heads,
    tie_embeddings=size.tied,
    qkv_bias=size.family == "qwen2",
    qk_norm=size.family == "qwen3",
    dtype=jnp.dtype(config.model.dtype),
    remat=config.model.remat,
  )


def sampler_spec(config) -> slots.SamplerSpec:
  """Shapes of the rollout programs."""
  rollout = config.rollout
  return slots.SamplerSpec(
    slots=rollout.slots, context=rollout.context, block=rollout.block,
    top_k=rollout.top_k, top_p=rollout.top_p,
  )


def sentinel_limits(config) -> sentinel.Limits:
  """Limits that the sentinel holds a run to."""
  given = config.sentinel
  if given.action not in sentinel.ACTIONS:
    raise types.UserError(
      f"sentinel.action must be one of {sentinel.ACTIONS}, got "
      f"{given.action!r}"
    )
  names = (field.name for field in dataclasses.fields(sentinel.Limits))
  return sentinel.Limits(**{name: given[name] for name in names})


def learner_spec(config, steps: int) -> records.LearnerSpec:
  """Optimisation settings; warm-up ratios become optimiser steps."""
  ppo = config.ppo
  trajectories = config.batch.questions * config.batch.rollouts
  updates = steps * ppo.epochs * (trajectories // ppo.mini_batch)
  estimator = _ALGORITHMS[config.algorithm][0]
  released = config.reward.preset == "released"
  return records.LearnerSpec(
    estimator=estimator,
    gamma=ppo.gamma,
    lam=ppo.lam,
    clip_ratio=ppo.clip_ratio,
    value_clip=ppo.value_clip,
    entropy_coef=ppo.entropy_coef,
    kl_coef=ppo.kl_coef,
    kl_estimator=ppo.kl_estimator,
    kl_controller=ppo.kl_controller,
    kl_target=ppo.kl_target,
    kl_horizon=ppo.kl_horizon,
    kl_in_reward=estimator != "grpo",
    kl_loss_coef=ppo.kl_loss_coef if estimator == "grpo" else 0.0,
    ppo_epochs=ppo.epochs,
    mini_batch=ppo.mini_batch,
    micro_rows=ppo.micro_rows,
    row_length=config.rollout.context,
    temperature=config.rollout.temperature,
    policy_lr=ppo.policy_lr,
    value_lr=ppo.value_lr,
    policy_warmup=int(updates * ppo.policy_warmup_ratio),
    value_warmup=int(updates * ppo.value_warmup_ratio),
    weight_decay=ppo.weight_decay,
    grad_clip=ppo.grad_clip,
    critic_warmup=ppo.critic_warmup,
    mask_scope="attended" if released else "policy",
    micro_weighting="micro_mean" if released else "token",
    first_lr_zero=released,
    policy_adapter=adapter("policy", config.policy),
    value_adapter=adapter("value", config.value),
  )


def adapter(role: str, given) -> adapters.AdapterSpec | None:
  """Adapter size of `config.policy` or `config.value`; None trains all."""
  small = {"policy": "lora", "value": "adapter"}[role]
  if given.kind not in ("full", small):
    raise types.UserError(
      f"{role}.kind must be full or {small}, got {given.kind!r}"
    )
  if given.kind == "full":
    return None
  return adapters.AdapterSpec(given.rank, given.alpha)
