"""From tokens to turns and back, for estimators that credit whole turns."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stepsearch_jax.ppo.estimators import gae, interface


def first_tokens(turn: jax.Array) -> jax.Array:
  """Marks the first policy token of every turn, [B, T] float32.

  Args:
    turn: [B, T] int32, turn of each policy token; -1 elsewhere.
  """
  before = jnp.pad(turn, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  newest = jax.lax.cummax(before, axis=1)
  return ((turn >= 0) & (turn > newest)).astype(jnp.float32)


def last_tokens(turn: jax.Array) -> jax.Array:
  """Marks the last policy token of every turn, [B, T] float32."""
  count = jnp.iinfo(turn.dtype).max
  later = jnp.pad(
    jnp.where(turn < 0, count, turn), ((0, 0), (0, 1)), constant_values=count
  )[:, 1:]
  oldest = jax.lax.cummin(later, axis=1, reverse=True)
  return ((turn >= 0) & (turn < oldest)).astype(jnp.float32)


def sums(x: jax.Array, turn: jax.Array, count: int) -> jax.Array:
  """Adds up the tokens of each turn: [B, T] to [B, count].

  A turn that did not happen has 0. No scatter: the order of additions, and so
  the last bit, is the same in every run.
  """

  def one(number):
    return jnp.where(turn == number, x, 0.0).sum(-1)

  return jax.vmap(one, out_axes=1)(jnp.arange(count, dtype=turn.dtype))


def spread(per_turn: jax.Array, turn: jax.Array) -> jax.Array:
  """Gives every policy token its turn's number: [B, U] to [B, T]."""
  found = jnp.take_along_axis(per_turn, jnp.maximum(turn, 0), axis=1)
  return jnp.where(turn >= 0, found, 0.0)


def rewards(inputs: interface.Inputs) -> jax.Array:
  """Sum of the token rewards of each turn, [B, U]."""
  rewards = gae.credited(inputs.rewards, inputs.masks.policy)
  return sums(rewards, inputs.turn, inputs.anchor.shape[1])


def returns_to_go(per_turn: jax.Array, gamma: float) -> jax.Array:
  """G_t = r_t + gamma G_{t+1}, [B, U]."""

  def step(later, reward):
    now = reward + gamma * later
    return now, now

  zeros = jnp.zeros(per_turn.shape[0], jnp.float32)
  _, found = jax.lax.scan(step, zeros, per_turn.T, reverse=True)
  return found.T
