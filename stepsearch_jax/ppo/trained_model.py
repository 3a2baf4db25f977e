"""One model in training: its places, its optimizer, its compiled programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepsearch_jax import types
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import forward, model_losses, optimizer, specs
from stepsearch_jax.ppo.model_losses import Share
from stepsearch_jax.ppo.records import MicroBatch, Trained
from stepsearch_jax.ppo.trainable import Trainable

_PREFIX = {"policy": "actor", "value": "critic"}  # verl's names of metrics.


class TrainedModel:
  """Policy or value model with the programs that train it.

  Programs, compiled at their first call, of one shape each:

    forward(params, reference, micro) -> PolicyOutput or values
    zero(params) -> (gradients, metric sums)
    accumulate(params, reference, gradients, sums, micro, share)
      -> (gradients, sums)
    apply(trained, gradients, lr_scale) -> (trained, metrics)

  Explicit output shardings keep what one update returns a valid input of the
  next.
  """

  def __init__(
    self, trainable: Trainable, spec: specs.LearnerSpec,
    mesh: sharding.DeviceMesh,
  ):
    """Prepares the programs; nothing is compiled yet."""
    self.trainable = trainable
    self.role = trainable.role
    own = {"policy": spec.policy, "value": spec.value}[self.role]
    self.rate = optimizer.warmup_schedule(
      own.learning_rate, own.warmup, own.first_rate_zero
    )
    self._optimizer = optimizer.adamw(
      self.rate, own.weight_decay, own.grad_clip
    )
    self._spec = spec
    self._mesh = mesh
    self._replicated = sharding.replicated(mesh)
    self._place()
    self._compile()

  def _place(self) -> None:
    """Shapes of parameters and optimizer state, and where they live."""
    tx, shapes = self._optimizer, self.trainable.shapes()
    placed = self.trainable.shardings(self._mesh)
    opt = jax.eval_shape(tx.init, shapes)
    self._shapes = Trained(shapes, opt)
    self._placed = Trained(placed, optax.tree_map_params(
      tx, lambda _, where: where, opt, placed,
      transform_non_params=lambda _: self._replicated,
    ))

  def _compile(self) -> None:
    params, replicated = self._placed.params, self._replicated
    # Replicated: every process packs, unpacks and estimates the whole batch.
    self.forward = jax.jit(self._forward, out_shardings=replicated)
    self.zero = jax.jit(self._zero, out_shardings=(params, replicated))
    self.accumulate = jax.jit(
      self._accumulate, donate_argnums=(2, 3),
      out_shardings=(params, replicated),
    )
    self.apply = jax.jit(
      self._apply, donate_argnums=0, out_shardings=(self._placed, replicated)
    )

  def start(self, params: types.Tree) -> Trained:
    """A fresh optimizer around parameters, placed on the mesh.

    Args:
      params: see `Trainable.init`; copied, so that donating the result never
        frees the caller's arrays.
    """
    params = sharding.put(params, self._placed.params)
    init = jax.jit(self._optimizer.init, out_shardings=self._placed.opt)
    return Trained(params, init(params))

  def abstract(self) -> Trained:
    """Shapes and places of `start`'s result."""
    return jax.tree.map(sharding.abstract, self._shapes, self._placed)

  def update(
    self, trained: Trained, reference: types.Tree, micros: Sequence[MicroBatch],
    share: Share, lr_scale: float,
  ) -> tuple[Trained, dict[str, Any]]:
    """Takes one optimizer step.

    Args:
      trained: donated.
      reference: frozen policy parameters.
      micros: the micro-batches of the mini-batch.
      share: what each of them is part of.
      lr_scale: multiplies the learning rate.

    Returns:
      (trained, metrics by name, still on the device).
    """
    grads, sums = self.zero(trained.params)
    for micro in micros:
      grads, sums = self.accumulate(
        trained.params, reference, grads, sums, micro, share
      )
    trained, metrics = self.apply(trained, grads, np.float32(lr_scale))
    return trained, sums | metrics

  def lowered(
    self, lower: Callable[..., jax.stages.Lowered], reference: types.Tree,
    micro: MicroBatch,
  ) -> dict[str, jax.stages.Lowered]:
    """Its programs by name, lowered but not compiled.

    Args:
      lower: (program, *arguments) -> Lowered.
      reference: shapes of the frozen policy.
      micro: shapes of a micro-batch.
    """
    trained = self.abstract()
    one = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._replicated)
    grads, sums = jax.eval_shape(self.zero, trained.params)
    grads = sharding.abstract(grads, self._placed.params)
    sums = sharding.abstract(sums, self._replicated)
    found = {
      f"{self.role}_update": lower(
        self.accumulate, trained.params, reference, grads, sums, micro,
        Share(one, one, one),
      ),
      f"{self.role}_apply": lower(self.apply, trained, grads, one),
    }
    if self.role == "value" or self.trainable.adapter is not None:
      # A whole policy runs the program of the reference.
      found[f"{self.role}_forward"] = lower(
        self.forward, trained.params, reference, micro
      )
    return found

  def _forward(self, params, reference, micro):
    model, config = self.trainable.apart(params, reference), self._config
    if self.role == "value":
      return forward.values(model, micro, config)
    return forward.policy(model, micro, config, self._spec.temperature)

  @property
  def _config(self):
    return self.trainable.config

  def _loss(self, params, reference, micro, share):
    of_model = {"policy": model_losses.policy, "value": model_losses.value}
    found = of_model[self.role](
      self.trainable.apart(params, reference), micro, share,
      config=self._config, spec=self._spec,
    )
    return found.loss, found.metrics

  def _zero(self, params):
    names = model_losses.METRICS[self.role]
    sums = {name: jnp.float32(0) for name in names}
    return jax.tree.map(jnp.zeros_like, params), sums

  def _accumulate(self, params, reference, grads, sums, micro, share):
    new, parts = jax.grad(self._loss, has_aux=True)(
      params, reference, micro, share
    )
    return (
      jax.tree.map(jnp.add, grads, new),
      {name: sums[name] + parts[name] for name in sums},
    )

  def _apply(self, trained, grads, lr_scale):
    prefix = _PREFIX[self.role]
    rate = self.rate(optimizer.steps_taken(trained.opt))
    metrics = {
      f"{prefix}/grad_norm": optax.global_norm(grads),
      f"{prefix}/lr": lr_scale * rate,
    }
    updates, opt = self._optimizer.update(grads, trained.opt, trained.params)
    params = jax.tree.map(
      lambda p, u: p + lr_scale * u, trained.params, updates
    )
    # Finite exactly when the parameters are, before they reach a checkpoint.
    metrics[f"{prefix}/param_norm"] = optax.global_norm(params)
    return Trained(params, opt), metrics
