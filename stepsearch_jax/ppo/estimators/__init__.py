"""Advantage estimators by name, one file each.

A new one is a file with an `estimate` function and a line in `REGISTRY`. A
user's own is `config.estimator = "module:function"`, with the same signature.
"""

from __future__ import annotations

import dataclasses

from stepsearch_jax import types, user_functions
from stepsearch_jax.ppo.estimators import (
  bilevel_gae,
  gae,
  gigpo,
  grpo,
  grpo_no_std,
  ig_search,
  igpo,
  maxrl,
  reinforce,
  rloo,
  stratified,
  turn_gae,
  turn_rloo,
)
from stepsearch_jax.ppo.estimators.interface import (
  Estimates,
  Estimator,
  Inputs,
  estimator,
)

__all__ = ["REGISTRY", "Estimates", "Estimator", "Inputs", "estimator", "find"]

REGISTRY = {
  "bilevel_gae": bilevel_gae.estimate,
  "gae": gae.estimate,
  "gigpo": gigpo.estimate,
  "grpo": grpo.estimate,
  "grpo_no_std": grpo_no_std.estimate,
  "ig_search": ig_search.estimate,
  "igpo": igpo.estimate,
  "maxrl": maxrl.estimate,
  "reinforce": reinforce.estimate,
  "rloo": rloo.estimate,
  "stratified": stratified.estimate,
  "turn_gae": turn_gae.estimate,
  "turn_rloo": turn_rloo.estimate,
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
  types.expect(
    ":" in name, "estimator",
    f"one of {', '.join(sorted(REGISTRY))} or module:function", name,
  )
  found = user_functions.load("estimator", name)
  if not isinstance(found, Estimator):
    found = Estimator(found)
  return dataclasses.replace(found, name=name)
