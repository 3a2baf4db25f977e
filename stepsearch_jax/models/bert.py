"""BERT encoder (E5, BGE, MiniLM and kin) to sentence embeddings."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.models.weights import hf as hf_weights

POOLINGS = ("mean", "cls")


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Shape of a BERT encoder; hashable."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  max_positions: int
  type_vocab_size: int
  layer_norm_eps: float


def _norm(config: BertConfig, name: str):
  return nn.LayerNorm(epsilon=config.layer_norm_eps, name=name)


class BertLayer(nn.Module):
  """Post-norm transformer layer."""

  config: BertConfig

  @nn.compact
  def __call__(self, x, mask):
    """Maps [B, S, M] to the same; `mask` [B, S] is True on tokens."""
    c = self.config
    heads = (c.num_heads, c.hidden_size // c.num_heads)
    # One product: three of a short query's size would not fill a core.
    qkv = nn.DenseGeneral((3, *heads), name="qkv")(x)
    query, key, value = (qkv[:, :, i] for i in range(3))
    scores = jnp.einsum("bshd,bthd->bhst", query, key)
    scores = scores / jnp.sqrt(jnp.float32(heads[1]))
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    mixed = jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores), value)
    out = nn.DenseGeneral(c.hidden_size, axis=(-2, -1), name="output")(mixed)
    x = _norm(c, "attention_norm")(x + out)
    inner = nn.Dense(c.intermediate_size, name="up")(x)
    inner = jax.nn.gelu(inner, approximate=False)
    out = nn.Dense(c.hidden_size, name="down")(inner)
    return _norm(c, "mlp_norm")(x + out)


class Bert(nn.Module):
  """Token ids to hidden states."""

  config: BertConfig

  @nn.compact
  def __call__(self, tokens, mask, kinds=None):
    """Returns hidden states [B, S, M].

    Args:
      tokens: [B, S] int32.
      mask: [B, S] bool, True on tokens.
      kinds: [B, S] int32, 0 for the first text, 1 for the second; None = 0.
    """
    c = self.config

    def table(name, rows):
      init = nn.initializers.normal(0.02)
      return self.param(name, init, (rows, c.hidden_size), jnp.float32)

    x = table("word", c.vocab_size)[tokens]
    x = x + table("position", c.max_positions)[None, : tokens.shape[1]]
    kind = table("type", c.type_vocab_size)
    x = x + (kind[0] if kinds is None else kind[kinds])
    x = _norm(c, "norm")(x)
    # Not scanned: a short query costs less than copying the stacked weights.
    for i in range(c.num_layers):
      x = BertLayer(c, name=f"layer_{i}")(x, mask)
    return x


def embed(
  params: types.Tree, tokens: jax.Array, mask: jax.Array, *, config: BertConfig,
  pooling: str,
) -> jax.Array:
  """Unit sentence embeddings.

  Args:
    params: from `load_bert`.
    tokens: [B, S] int32.
    mask: [B, S] bool, True on tokens; at least one per row.
    config: shape.
    pooling: "mean" over tokens, or "cls": the first token.

  Returns:
    [B, M] float32 of norm 1.
  """
  hidden: Any = Bert(config).apply({"params": params}, tokens, mask)
  if pooling == "cls":
    pooled = hidden[:, 0]
  else:
    weight = mask[..., None].astype(jnp.float32)
    pooled = (hidden * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
  norm = jnp.linalg.norm(pooled, axis=-1, keepdims=True)
  return pooled / jnp.maximum(norm, 1e-12)


def relevance(
  params: types.Tree, tokens: jax.Array, kinds: jax.Array, mask: jax.Array, *,
  config: BertConfig,
) -> jax.Array:
  """Scores of query-passage pairs by a cross-encoder.

  Args:
    params: from `load_cross_encoder`.
    tokens: [B, S] int32.
    kinds: [B, S] int32, 0 on the query, 1 on the passage.
    mask: [B, S] bool.
    config: shape.

  Returns:
    [B] float32 logits.
  """
  bert = {"params": params["bert"]}
  hidden: Any = Bert(config).apply(bert, tokens, mask, kinds)
  head = params["head"]
  pooled = jnp.tanh(hidden[:, 0] @ head["pooler"] + head["pooler_bias"])
  return (pooled @ head["classifier"] + head["classifier_bias"])[:, 0]


def load_cross_encoder(path: str) -> tuple[BertConfig, dict]:
  """Reads a BertForSequenceClassification folder with one output.

  Raises:
    hf_weights.WeightError: a tensor is missing or misshapen.
    UserError: the folder holds another architecture.
  """
  config, params = load_bert(path)
  tensors = hf_weights.read_tensors(path)
  width = config.hidden_size
  names = {
    "pooler": ("bert.pooler.dense.weight", (width, width)),
    "pooler_bias": ("bert.pooler.dense.bias", (width,)),
    "classifier": ("classifier.weight", (width, 1)),
    "classifier_bias": ("classifier.bias", (1,)),
  }
  head = {
    ours: _fit(tensors, name, shape, path)
    for ours, (name, shape) in names.items()
  }
  return config, {"bert": params, "head": head}


def load_bert(path: str) -> tuple[BertConfig, dict]:
  """Reads a Hugging Face BERT folder.

  Raises:
    hf_weights.WeightError: a tensor is missing or misshapen.
    UserError: the folder holds another architecture.
  """
  raw = json.loads((epath.Path(path) / "config.json").read_text())
  if raw.get("model_type") != "bert":
    raise types.UserError(
      f"{path}: model_type {raw.get('model_type')!r} is not supported as an "
      "encoder, expected 'bert'"
    )
  config = BertConfig(
    vocab_size=raw["vocab_size"],
    hidden_size=raw["hidden_size"],
    intermediate_size=raw["intermediate_size"],
    num_layers=raw["num_hidden_layers"],
    num_heads=raw["num_attention_heads"],
    max_positions=raw["max_position_embeddings"],
    type_vocab_size=raw["type_vocab_size"],
    layer_norm_eps=raw["layer_norm_eps"],
  )
  tensors = hf_weights.read_tensors(path)
  # Some checkpoints keep the wrapper's prefix.
  tensors = {name.removeprefix("bert."): t for name, t in tensors.items()}
  zeros = (jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
  shapes = jax.eval_shape(Bert(config).init, jax.random.key(0), *zeros)

  def read(where, shape):
    outer, *inner = [entry.key for entry in where]
    if not outer.startswith("layer_"):
      return _fit(tensors, _outer_name([outer, *inner]), shape.shape, path)
    index, kind = int(outer.removeprefix("layer_")), inner[1]
    if inner[0] != "qkv":
      return _fit(tensors, _layer_name(index, inner), shape.shape, path)
    at = -3  # [M, 3, H, D] or [3, H, D]
    one = shape.shape[:at] + shape.shape[at + 1 :]
    return np.stack([
      _fit(tensors, _layer_name(index, (part, kind)), one, path)
      for part in ("query", "key", "value")
    ], axis=at)

  return config, jax.tree_util.tree_map_with_path(read, shapes["params"])


def _outer_name(keys) -> str:
  if keys[0] == "norm":
    suffix = "weight" if keys[1] == "scale" else "bias"
    return f"embeddings.LayerNorm.{suffix}"
  kind = "token_type" if keys[0] == "type" else keys[0]
  return f"embeddings.{kind}_embeddings.weight"


_LAYER_NAMES = {
  "query": "attention.self.query",
  "key": "attention.self.key",
  "value": "attention.self.value",
  "output": "attention.output.dense",
  "attention_norm": "attention.output.LayerNorm",
  "up": "intermediate.dense",
  "down": "output.dense",
  "mlp_norm": "output.LayerNorm",
}


def _layer_name(index: int, keys) -> str:
  suffix = "bias" if keys[1] == "bias" else "weight"
  return f"encoder.layer.{index}.{_LAYER_NAMES[keys[0]]}.{suffix}"


def _fit(tensors, name: str, shape, path: str) -> np.ndarray:
  """A tensor in our layout: matrices transposed, heads split."""
  if name not in tensors:
    raise hf_weights.WeightError(f"{path}: tensor {name} is missing")
  value = tensors[name].astype(np.float32)
  if value.ndim == 2 and "embeddings" not in name:
    value = value.T
  if value.size != int(np.prod(shape)):
    raise hf_weights.WeightError(
      f"{path}: tensor {name} has shape {value.shape}, expected {shape}"
    )
  return value.reshape(shape)
