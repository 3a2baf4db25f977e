"""Forward passes over packed rows: log-probabilities, entropies, values."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from stepsearch_jax import types
from stepsearch_jax.models import attention, decoder, heads
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import logprobs
from stepsearch_jax.ppo.records import MicroBatch


@flax.struct.dataclass
class PolicyOutput:
  """Of the policy's tokens, [R, S] float32; 0 elsewhere.

  Attributes:
    logp: log-probability of the token that was sampled.
    entropy: of the distribution that it was sampled from, in nats.
  """

  logp: types.Leaf
  entropy: types.Leaf


def _trunk(params, micro: MicroBatch, config: decoder.DecoderConfig):
  """Hidden states; row t holds the state in which token t was chosen."""
  hidden, _ = decoder.Decoder(config).apply(
    heads.variables(params),
    micro.tokens,
    micro.positions,
    segment_ids=micro.segment_ids,
  )
  before = jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  # What goes on behind a shared prefix was chosen in the prefix's last state.
  segments = micro.segment_ids
  shared = segments == attention.PREFIX
  size = shared.sum(axis=1, dtype=jnp.int32, keepdims=True)
  places = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
  # A masked sum: no gather, and no scatter in the backward pass.
  last = jnp.where((places == size - 1)[..., None], hidden, 0)
  last = last.sum(axis=1, keepdims=True)
  earlier = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
  first = (segments > 0) & (segments != earlier) & (size > 0)
  return jnp.where(first[..., None], last, before)


def policy(
  params: types.Tree, micro: MicroBatch, config: decoder.DecoderConfig,
  temperature: float,
) -> PolicyOutput:
  """Runs a policy; `micro.policy_mask` says which tokens are wanted."""
  mask = micro.policy_mask
  hidden = _trunk(params, micro, config)
  logp, entropy = logprobs.token_logprobs(
    hidden.reshape(-1, hidden.shape[-1]),
    heads.unembedding(params),
    micro.tokens.reshape(-1),
    mask.reshape(-1),
    temperature,
    parts=sharding.shards("batch", len(mask)),
  )
  return PolicyOutput(logp.reshape(mask.shape), entropy.reshape(mask.shape))


def values(
  params: types.Tree, micro: MicroBatch, config: decoder.DecoderConfig
) -> jax.Array:
  """Runs a value model: state values [R, S] float32."""
  return heads.values(params, _trunk(params, micro, config))
