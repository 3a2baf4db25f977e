"""What a micro-batch adds to the loss of the policy and of the value model.

Losses are sums over tokens, scaled so that the micro-batches of a mini-batch
add up to its mean: by the mini-batch's token count, or (released, C8) by the
micro-batch's own and the number of micro-batches.
"""

from __future__ import annotations

import jax.numpy as jnp

from stepsearch_jax.models import decoder
from stepsearch_jax.ppo import advantages as adv
from stepsearch_jax.ppo import losses, scores
from stepsearch_jax.ppo.records import LearnerSpec, Micro

METRICS = {
  "policy": ("actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl",
             "actor/entropy_loss", "actor/kl_loss"),
  "value": ("critic/vf_loss", "critic/vf_clipfrac", "critic/vpred_mean"),
}


def _scale(spec: LearnerSpec, mask, count, micros):
  if spec.micro_weighting == "token":
    return 1.0 / jnp.maximum(count, 1.0)
  own = (mask > 0).sum(dtype=jnp.float32)
  return 1.0 / (jnp.maximum(own, 1.0) * micros)


def of_policy(
  params, micro: Micro, count, micros, *, config: decoder.DecoderConfig,
  spec: LearnerSpec,
):
  """Clipped policy loss, entropy bonus and KL loss of a micro-batch.

  Args:
    params: policy parameters.
    micro: packed rows.
    count: [] float32, policy tokens of the mini-batch.
    micros: [] float32, micro-batches of the mini-batch.
    config: decoder configuration.
    spec: learner settings.

  Returns:
    (loss [] float32, metrics by name).
  """
  scale = _scale(spec, micro.mask, count, micros)
  logp, entropy = scores.of_policy(params, micro, config, spec.temperature)
  on = micro.mask > 0
  policy, hit, gap = losses.policy_loss(
    logp, micro.logp, micro.advantages, micro.mask, spec.clip_ratio
  )
  entropies = jnp.where(on, entropy, 0.0).sum()
  kl = adv.kl_penalty(logp, micro.reference_logp, spec.kl_estimator)
  kl = jnp.where(on, kl, 0.0).sum()
  total = policy - spec.entropy_coef * entropies + spec.kl_loss_coef * kl
  parts = (policy, hit, gap, entropies, kl)
  return scale * total, dict(
    zip(METRICS["policy"], (scale * part for part in parts), strict=True)
  )


def of_value(
  params, micro: Micro, count, micros, *, config: decoder.DecoderConfig,
  spec: LearnerSpec,
):
  """Clipped value loss of a micro-batch; arguments as in `of_policy`."""
  scale = _scale(spec, micro.scope, count, micros)
  values = scores.of_value(params, micro, config)
  error, clipped = losses.value_loss(
    values, micro.values, micro.returns, micro.scope, spec.value_clip
  )
  mean = jnp.where(micro.scope > 0, values, 0.0).sum()
  return scale * error, dict(
    zip(
      METRICS["value"], (scale * part for part in (error, clipped, mean)),
      strict=True,
    )
  )
