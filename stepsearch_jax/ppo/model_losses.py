"""What a micro-batch adds to the loss of the policy and of the value model.

Losses are sums over tokens, scaled so that the micro-batches of a mini-batch
add up to its mean: by the mini-batch's token count, or by the micro-batch's
own and the number of micro-batches, as released (C8, see the quirk table in
stepsearch_jax/README.md).
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from stepsearch_jax import types
from stepsearch_jax.models import decoder
from stepsearch_jax.ppo import forward, kl, losses, specs
from stepsearch_jax.ppo.records import MicroBatch

METRICS = {
  "policy": ("actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl",
             "actor/entropy_loss", "actor/kl_loss", "actor/llds_loss",
             "actor/less_likely_turns", "actor/logp_change", "actor/logp_k3",
             "actor/logp_outside", "actor/token_entropy"),
  "value": ("critic/vf_loss", "critic/vf_clipfrac", "critic/vpred_mean"),
}


@flax.struct.dataclass
class Share:
  """What a micro-batch is part of, [] float32 each.

  Attributes:
    tokens: tokens of the mini-batch that the loss is a mean over.
    turns: its turns.
    micros: micro-batches of the mini-batch.
  """

  tokens: types.Leaf
  turns: types.Leaf
  micros: types.Leaf


@flax.struct.dataclass
class MicroLoss:
  """Part of a mini-batch's loss, and of its metrics by name ([] float32)."""

  loss: jax.Array
  metrics: dict[str, jax.Array]


def scale(weighting: str, mask: jax.Array, share: Share) -> jax.Array:
  """Returns what the sums of a micro-batch are multiplied by, []."""
  if weighting == specs.MicroWeighting.TOKEN:
    return 1.0 / jnp.maximum(share.tokens, 1.0)
  own = (mask > 0).sum(dtype=jnp.float32)
  return 1.0 / (jnp.maximum(own, 1.0) * share.micros)


def policy(
  params: types.Tree, micro: MicroBatch, share: Share, *,
  config: decoder.DecoderConfig, spec: specs.LearnerSpec,
) -> MicroLoss:
  """Computes clipped policy loss, entropy bonus and KL loss.

  Args:
    params: the whole policy.
    micro: packed rows.
    share: what they are part of.
    config: decoder configuration.
    spec: learner settings.
  """
  loss, mask, weights = spec.loss, micro.policy_mask, micro.weights
  part = scale(loss.micro_weighting, mask, share)
  out = forward.policy(params, micro, config, spec.temperature)
  turns = losses.turn_numbers(micro.segment_ids, micro.turn)
  numbers = {"token": None, "sequence": micro.segment_ids, "turn": turns}
  ratio = losses.log_ratio(out.logp, micro.logp, mask, numbers[loss.ratio])
  if loss.old_logp == specs.OldLogp.ROLLOUT:
    ratio = losses.truncate(ratio, loss.importance_cap)
  token = losses.policy_loss(
    ratio, micro.advantages, 1 - loss.clip_ratio, loss.highest_ratio,
    loss.dual_clip,
  )
  surrogate = losses.masked_sum(weights * token.loss, mask)
  entropy = losses.masked_sum(weights * out.entropy, mask)
  gap = kl.penalty(out.logp, micro.reference_logp, spec.kl.loss_estimator)
  gap = losses.masked_sum(weights * gap, mask)
  drop = losses.likelihood_drop(out.logp, micro.logp, mask, turns)
  llds = losses.masked_sum(micro.llds_weights * drop.loss, mask)
  total = surrogate - loss.entropy_coef * entropy + spec.kl.loss_coef * gap
  total = part * total
  if loss.llds_coef:
    total = total + loss.llds_coef * llds
  moved = losses.log_ratio(out.logp, micro.logp, mask)
  outside = jnp.abs(jnp.expm1(moved)) > 0.1
  return MicroLoss(total, {
    "actor/pg_loss": part * surrogate,
    "actor/pg_clipfrac": part * losses.masked_sum(token.clipped, mask),
    "actor/ppo_kl": part * losses.masked_sum(-moved, mask),
    "actor/entropy_loss": part * entropy,
    "actor/kl_loss": part * gap,
    "actor/llds_loss": llds,
    "actor/less_likely_turns": drop.turns / jnp.maximum(share.turns, 1.0),
    "actor/logp_change": part * losses.masked_sum(jnp.abs(moved), mask),
    "actor/logp_k3": part * losses.masked_sum(jnp.expm1(moved) - moved, mask),
    "actor/logp_outside": part * losses.masked_sum(
      outside.astype(jnp.float32), mask
    ),
    # Per token, whatever the aggregation of the loss.
    "actor/token_entropy": part * losses.masked_sum(out.entropy, mask),
  })


def value(
  params: types.Tree, micro: MicroBatch, share: Share, *,
  config: decoder.DecoderConfig, spec: specs.LearnerSpec,
) -> MicroLoss:
  """Computes the clipped value loss; arguments as in `policy`."""
  weights = micro.value_weights
  part = scale(spec.loss.micro_weighting, weights, share)
  values = forward.values(params, micro, config)
  token = losses.value_loss(
    values, micro.values, micro.returns, spec.loss.value_clip
  )
  error = part * losses.masked_sum(weights * token.loss, weights)
  return MicroLoss(error, {
    "critic/vf_loss": error,
    "critic/vf_clipfrac": part * losses.masked_sum(token.clipped, weights),
    "critic/vpred_mean": part * losses.masked_sum(values, weights),
  })
