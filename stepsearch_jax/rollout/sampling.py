"""Choosing tokens from logits: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stepsearch_jax.parallel import sharding

_SAMPLE_BLOCK = 128  # Most entries that `sample_tokens` sums at once.
_SMALLEST_BLOCK = 16  # Of a shared vocabulary.


def filter_logits(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """Sets logits outside the top-k / nucleus set to -inf.

  Args:
    logits: [P, V] float32, already divided by the temperature.
    top_k: static; 0 keeps all.
    top_p: static; the token that crosses the threshold is kept (Holtzman et
      al., 2020). 1 keeps all.

  Returns:
    [P, V] float32. Nothing is sorted unless a filter asks for it.
  """
  if top_k:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1.0:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ranked), axis=-1)
    before = before - jax.nn.softmax(ranked)
    kept = jnp.where(before < top_p, ranked, jnp.inf)
    logits = jnp.where(logits < kept.min(-1, keepdims=True), -jnp.inf, logits)
  return logits


def sample_tokens(
  logits: jax.Array, uniform: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Draws one token per row by inverting the cumulative distribution.

  Two levels (sums of blocks, then inside the chosen block) need a single
  uniform per row and one pass over the vocabulary; Gumbel noise would need V.
  Where devices share the vocabulary each sums its own blocks, and no logits but
  those of the chosen block are exchanged (see `_block_size`).

  Args:
    logits: [P, V] float32; -inf is never drawn.
    uniform: [P] float32 in [0, 1).

  Returns:
    (tokens [P] int32, logsumexp of the logits [P] float32).
  """
  rows, vocab = logits.shape
  size = _block_size(vocab)
  pad = -vocab % size
  highest = logits.max(-1, keepdims=True)
  weights = jnp.exp(logits - highest)
  weights = jnp.pad(weights, ((0, 0), (0, pad)))
  weights = weights.reshape(rows, -1, size)
  mass = weights.sum(-1)
  upto = jnp.cumsum(mass, axis=-1)
  target = uniform[:, None] * upto[:, -1:]
  block = (upto <= target).sum(-1)
  # Rounding may push the target past the last block that has any mass.
  last = mass.shape[-1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
  block = jnp.minimum(block, last)[:, None]
  inside = jnp.take_along_axis(weights, block[..., None], axis=1)[:, 0]
  before = jnp.take_along_axis(upto - mass, block, axis=1)
  index = (before + jnp.cumsum(inside, axis=-1) <= target).sum(-1)
  last = size - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=-1)
  # A run of zero weight right after the target must not be entered either.
  index = jnp.minimum(index, last)
  drawn = (block[:, 0] * size + index).astype(jnp.int32)
  return drawn, highest[:, 0] + jnp.log(mass.sum(-1))


def _block_size(vocab: int) -> int:
  """Entries per block.

  Every device that has a share of the vocabulary has whole blocks of it, unless
  these would be so small that the sums are as many as the logits.
  """
  own = vocab // sharding.shards("vocab", vocab)
  whole = own & -own
  if own < vocab and whole >= _SMALLEST_BLOCK:
    return min(whole, _SAMPLE_BLOCK)
  return _SAMPLE_BLOCK


def _first_highest(logits: jax.Array) -> jax.Array:
  """argmax [P] int32 as two plain reductions, which XLA:CPU vectorises."""
  highest = logits.max(-1, keepdims=True)
  places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  return jnp.where(logits == highest, places, logits.shape[-1] - 1).min(-1)


def uniforms(
  key: jax.Array, episode: jax.Array, position: jax.Array
) -> jax.Array:
  """One draw per row that depends on (seed, episode, position) alone.

  Args:
    key: the run's sampling key.
    episode: [P] int32, rollout number.
    position: [P] int32, place of the token before.

  Returns:
    [P] float32 in [0, 1).
  """

  def draw(e, p):
    return jax.random.uniform(
      jax.random.fold_in(jax.random.fold_in(key, e), p), dtype=jnp.float32
    )

  return jax.vmap(draw)(episode, position)


def select(
  logits: jax.Array, temperature: jax.Array, uniform: jax.Array, top_k: int,
  top_p: float,
) -> tuple[jax.Array, jax.Array]:
  """Chooses the next token of every slot.

  Args:
    logits: [P, V] float32.
    temperature: [P] float32, 0 for greedy.
    uniform: [P] float32 in [0, 1).
    top_k, top_p: see `filter_logits`.

  Returns:
    (tokens [P] int32, log-probabilities [P] float32 under the whole
    temperature-scaled policy).
  """
  greedy = temperature == 0
  scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
  kept = filter_logits(scaled, top_k, top_p)
  drawn, norm = sample_tokens(kept, uniform)
  if kept is not scaled:  # Log-probabilities are the whole policy's.
    norm = jax.nn.logsumexp(scaled, axis=-1)
  best = _first_highest(logits)
  tokens = jnp.where(greedy, best, drawn)
  chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
  return tokens, chosen - norm
