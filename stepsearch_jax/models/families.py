"""What a model family is: the one table that loaders and exporters read."""

from __future__ import annotations

import dataclasses

from stepsearch_jax import types


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture of decoder.

  Attributes:
    architecture: class name in transformers, for config.json.
    qkv_bias: queries, keys and values always have a bias.
    attention_bias: config.json's `attention_bias` gives all four projections
      of the attention a bias.
    mlp_bias: config.json's `mlp_bias` gives the MLP's matrices a bias.
    qk_norm: queries and keys are normalized per head.
  """

  architecture: str
  qkv_bias: bool
  attention_bias: bool
  mlp_bias: bool
  qk_norm: bool


FAMILIES = {
  "qwen2": Family("Qwen2ForCausalLM", True, False, False, False),
  "qwen3": Family("Qwen3ForCausalLM", False, True, False, True),
  "llama": Family("LlamaForCausalLM", False, True, True, False),
}


def find(name: str, where: str) -> Family:
  """Returns the family called `name`.

  Args:
    name: as in `FAMILIES`.
    where: the field or file that says so, for the message.

  Raises:
    UserError: there is no such family.
  """
  if name not in FAMILIES:
    raise types.UserError(
      f"{where} must be one of {', '.join(FAMILIES)}, got {name!r}"
    )
  return FAMILIES[name]
