"""AdamW with clipping and a warm-up that starts at a full first step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from stepsearch_jax import types


def warmup_factor(
  count: jax.typing.ArrayLike, warmup: int, first_zero: bool = False
) -> jax.Array:
  """Learning-rate factor of optimizer step `count` (from 0).

  Args:
    count: steps already taken.
    warmup: steps until the full rate.
    first_zero: the released schedule, whose first step changes nothing (C9).
  """
  done = jnp.asarray(count, jnp.float32) + (0.0 if first_zero else 1.0)
  return jnp.minimum(1.0, done / max(1.0, float(warmup)))


def warmup_schedule(
  learning_rate: float, warmup: int, first_zero: bool = False
) -> optax.Schedule:
  """Learning rate by optimizer step: linear warm-up, then constant."""
  return lambda count: learning_rate * warmup_factor(count, warmup, first_zero)


def adamw(
  schedule: optax.Schedule, weight_decay: float = 0.01, grad_clip: float = 1.0
) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW (0.9, 0.999)."""
  return optax.chain(
    _clip(grad_clip),
    optax.adamw(
      schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay
    ),
  )


def steps_taken(state: types.Tree) -> jax.Array:
  """[] int32, optimizer steps behind a state of `adamw`."""
  return optax.tree_utils.tree_get(
    state, "count",
    filtering=lambda path, _: path[-1].tuple_name == "ScaleByScheduleState",
  )


def _clip(limit: float) -> optax.GradientTransformation:
  """torch's clip_grad_norm_: scale by min(1, limit / (norm + 1e-6))."""

  def update(updates, state, params=None):
    del params
    scale = jnp.minimum(1.0, limit / (optax.global_norm(updates) + 1e-6))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
