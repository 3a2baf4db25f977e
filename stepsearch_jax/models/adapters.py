"""Low-rank adapters on a frozen trunk (LoRA, arXiv 2106.09685).

    W' = W + alpha / rank * A B      for every matrix W of the layers

with A drawn and B zero at first, so that W' = W. Embeddings, norms and biases
stay as they are.

Training never forms W': the forward pass adds x A B to x W (`collection`). A
merged matrix in bfloat16 would lose every update below half a unit in its last
place, and its gradient would be as large as the trunk. For decoding and export
`merge` forms W' once, in float32; what is decoded in bfloat16 is rounded then.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from stepsearch_jax import types
from stepsearch_jax.models import decoder

# Matrix: (module, leading input axes behind the layer axis).
_TARGETS = {
  "q_kernel": ("attention", 1),
  "k_kernel": ("attention", 1),
  "v_kernel": ("attention", 1),
  "o_kernel": ("attention", 2),
  "gate_kernel": ("mlp", 1),
  "up_kernel": ("mlp", 1),
  "down_kernel": ("mlp", 1),
}


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
  """Size of the adapters.

  Attributes:
    rank: columns of A.
    alpha: strength; the update is scaled by alpha / rank.
  """

  rank: int = 32
  alpha: float = 32.0

  def __post_init__(self):
    if self.rank < 1 or self.alpha <= 0:
      raise types.UserError(
        f"adapters need rank >= 1 and alpha > 0, got {self}"
      )


def init(
  config: decoder.DecoderConfig, spec: AdapterSpec, key: jax.Array
) -> types.Tree:
  """Adapters that change nothing yet.

  Returns:
    {matrix: {"a": [L, *inputs, rank], "b": [L, rank, *outputs]}}.
  """
  m, f = config.hidden_size, config.intermediate_size
  heads, kv, dim = config.num_heads, config.num_kv_heads, config.head_dim
  shapes = {
    "q_kernel": ((m,), (heads, dim)),
    "k_kernel": ((m,), (kv, dim)),
    "v_kernel": ((m,), (kv, dim)),
    "o_kernel": ((heads, dim), (m,)),
    "gate_kernel": ((m,), (f,)),
    "up_kernel": ((m,), (f,)),
    "down_kernel": ((f,), (m,)),
  }
  layers, dtype = config.num_layers, config.param_dtype
  tree = {}
  for (name, (inputs, outputs)), own in zip(
    shapes.items(), jax.random.split(key, len(shapes)), strict=True
  ):
    a = jax.random.normal(own, (layers, *inputs, spec.rank), dtype)
    tree[name] = {
      "a": a * math.prod(inputs) ** -0.5,
      "b": jnp.zeros((layers, spec.rank, *outputs), dtype),
    }
  return tree


def logical_axes(trunk_axes: types.Tree) -> types.Tree:
  """Axis names of adapters, from those of the trunk they adapt."""
  tree = {}
  for name, (module, inputs) in _TARGETS.items():
    layer, *axes = trunk_axes["layers"][module][name]
    tree[name] = {
      "a": (layer, *axes[:inputs], "rank"),
      "b": (layer, "rank", *axes[inputs:]),
    }
  return tree


def collection(adapters: types.Tree, spec: AdapterSpec) -> types.Tree:
  """Returns adapters as the decoder's collection "adapters", unmerged.

  Args:
    adapters: from `init`, trained or not.
    spec: their size; B comes scaled by alpha / rank.
  """
  layers: dict = {}
  for name, pair in adapters.items():
    scaled = {"a": pair["a"], "b": pair["b"] * (spec.alpha / spec.rank)}
    layers.setdefault(_TARGETS[name][0], {})[name] = scaled
  return {"layers": layers}


def merge(
  trunk: types.Tree, adapters: types.Tree, spec: AdapterSpec,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> types.Tree:
  """Returns a tree like `trunk` whose layer matrices have the adapters added.

  The sum is formed in float32.

  Args:
    trunk: frozen parameters.
    adapters: from `init`, trained or not.
    spec: their size.
    dtype: of the merged matrices.
  """
  layers = {k: dict(v) for k, v in trunk["layers"].items()}
  scale = spec.alpha / spec.rank
  for name, pair in adapters.items():
    module = _TARGETS[name][0]
    frozen = layers[module][name]
    a, b = (pair[side].astype(jnp.float32) for side in "ab")
    delta = jax.vmap(
      lambda a, b: jnp.tensordot(a, b, 1, precision="highest")
    )(a, b)
    merged = frozen.astype(jnp.float32) + scale * delta
    layers[module][name] = merged.astype(dtype)
  return {**trunk, "layers": layers}
