"""Programs of one optimiser step: accumulate gradients, then apply them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from stepsearch_jax.ppo import objectives, optimizer
from stepsearch_jax.ppo.records import LearnerSpec
from stepsearch_jax.ppo.variants import Variant


def _objective(variant: Variant, spec: LearnerSpec):
  """(params, reference, micro, count, micros) to (loss, metric sums)."""
  of_model = {
    "policy": objectives.of_policy, "value": objectives.of_value
  }[variant.role]

  def objective(params, reference, micro, count, micros):
    return of_model(
      variant.model(params, reference), micro, count, micros,
      config=variant.config, spec=spec,
    )

  return objective


def compiled(
  variant: Variant, spec: LearnerSpec, rate: optax.Schedule,
  tx: optax.GradientTransformation, placed, opt_placed, replicated,
):
  """The jitted (zero, accumulate, apply) programs of one model.

    zero(params) -> (gradients, metric sums)
    accumulate(params, reference, gradients, sums, micro, count, micros)
      -> (gradients, sums)
    apply(params, optimiser, gradients, lr_scale)
      -> (params, optimiser, metrics)

  Args:
    variant: the model and what of it is trained.
    spec: learner settings.
    rate: learning rate by optimiser step.
    tx: optimiser.
    placed, opt_placed: shardings of parameters and optimiser state.
    replicated: sharding of scalars.
  """
  role = variant.role
  prefix = {"policy": "actor", "value": "critic"}[role]
  objective = _objective(variant, spec)

  def zero(params):
    sums = {name: jnp.float32(0) for name in objectives.METRICS[role]}
    return jax.tree.map(jnp.zeros_like, params), sums

  def accumulate(params, reference, grads, sums, micro, count, micros):
    new, parts = jax.grad(objective, has_aux=True)(
      params, reference, micro, count, micros
    )
    return (
      jax.tree.map(jnp.add, grads, new),
      {name: sums[name] + parts[name] for name in sums},
    )

  def apply(params, opt, grads, lr_scale):
    metrics = {
      f"{prefix}/grad_norm": optax.global_norm(grads),
      f"{prefix}/lr": lr_scale * rate(optimizer.steps_taken(opt)),
    }
    updates, opt = tx.update(grads, opt, params)
    params = jax.tree.map(lambda p, u: p + lr_scale * u, params, updates)
    # Finite exactly when the parameters are, before they reach a checkpoint.
    metrics[f"{prefix}/param_norm"] = optax.global_norm(params)
    return params, opt, metrics

  return (
    jax.jit(zero, out_shardings=(placed, replicated)),
    jax.jit(
      accumulate, donate_argnums=(2, 3), out_shardings=(placed, replicated)
    ),
    jax.jit(
      apply, donate_argnums=(0, 1),
      out_shardings=(placed, opt_placed, replicated),
    ),
  )
