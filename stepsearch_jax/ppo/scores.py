"""Log-probabilities, entropies and values of packed micro-batches."""

from __future__ import annotations

import jax.numpy as jnp

from stepsearch_jax.models import decoder, heads
from stepsearch_jax.ppo import logprobs


def _shift(hidden):
  """Row t holds the state in which token t was chosen."""
  return jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def _trunk(params, micro, config):
  hidden, _ = decoder.Decoder(config).apply(
    {"params": params["trunk"]},
    micro.tokens,
    micro.positions,
    segment_ids=micro.segment_ids,
  )
  return _shift(hidden)


def of_policy(params, micro, config, temperature):
  """(log-probabilities, entropies) [R, S] of the masked tokens."""
  hidden = _trunk(params, micro, config)
  logp, entropy = logprobs.token_logprobs(
    hidden.reshape(-1, hidden.shape[-1]),
    heads.unembedding(params),
    micro.tokens.reshape(-1),
    micro.mask.reshape(-1),
    temperature,
  )
  return logp.reshape(micro.mask.shape), entropy.reshape(micro.mask.shape)


def of_value(params, micro, config):
  """State values [R, S] float32."""
  return heads.values(params, _trunk(params, micro, config))
