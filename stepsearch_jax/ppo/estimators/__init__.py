"""Advantage estimators by name, one file each.

A new one is a file with an `estimate` function and a line in `REGISTRY`. A
user's own is `config.estimator = "module:function"`, with the same signature.
"""

from __future__ import annotations

import dataclasses
import importlib

from stepsearch_jax import types
from stepsearch_jax.ppo.estimators import gae, grpo, reinforce
from stepsearch_jax.ppo.estimators.interface import (
  Estimates,
  Estimator,
  Inputs,
  estimator,
)

__all__ = ["REGISTRY", "Estimates", "Estimator", "Inputs", "estimator", "find"]

REGISTRY = {
  "gae": gae.estimate,
  "grpo": grpo.estimate,
  "reinforce": reinforce.estimate,
}


def find(name: str) -> Estimator:
  """Returns the estimator of a name, or of "module:function".

  A plain function of a user needs neither values nor groups; one that does is
  decorated with `estimator(needs_values=True)`.

  Raises:
    UserError: there is none.
  """
  if name in REGISTRY:
    return dataclasses.replace(REGISTRY[name], name=name)
  module, _, attribute = name.partition(":")
  if not attribute:
    raise types.UserError(
      f"estimator must be one of {', '.join(sorted(REGISTRY))} or "
      f"module:function, got {name!r}"
    )
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise types.UserError(
      f"estimator = {name!r} cannot be imported: {error}"
    ) from error
  if not isinstance(found, Estimator):
    found = Estimator(found)
  return dataclasses.replace(found, name=name)
