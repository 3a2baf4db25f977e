"""GGUF files: metadata, decoder shape and dequantised tensors.

Tensors come out under their Hugging Face names and in Hugging Face layout.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.models import decoder, families, rope


class WeightError(types.UserError):
  """A checkpoint does not fit the model; the message names the tensor."""


def fields(path: str) -> dict[str, Any]:
  """Returns the metadata of a GGUF file.

  Raises:
    UserError: it is no GGUF file.
  """
  return dict(_open(path).metadata)


@dataclasses.dataclass(frozen=True)
class _File:
  """What a GGUF file says; the data of its tensors stays on disk."""

  metadata: dict[str, Any]
  tensors: list[gguf.ReaderTensor]


def _open(path: str) -> _File:
  stat = os.stat(path)
  return _parse(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)  # A start reads a file five times.
def _parse(path: str, changed: int, size: int) -> _File:
  """Reads a file, once unless it changes."""
  del changed, size
  try:
    reader = gguf.GGUFReader(path)
  except (ValueError, IndexError) as error:
    raise types.UserError(f"{path}: not a GGUF file ({error})") from error
  metadata = {name: value.contents() for name, value in reader.fields.items()}
  return _File(metadata, reader.tensors)


class _Settings:
  """Metadata of one architecture; every error names the file and the key."""

  def __init__(self, path: str, metadata: dict[str, Any]):
    self.path = path
    self.family = metadata.get("general.architecture")
    families.find(self.family, f"{path}: general.architecture")
    self._metadata = metadata

  def get(self, name: str, default=None):
    """Returns `<architecture>.<name>`, or the default."""
    return self._metadata.get(f"{self.family}.{name}", default)

  def number(self, name: str):
    """Returns a positive number that must be there."""
    value = self.get(name)
    if not isinstance(value, (int, float)) or value <= 0:
      raise self.wrong(name, "a positive number")
    return value

  def wrong(self, name: str, expected: str) -> types.UserError:
    """Returns the error of a key that cannot be used."""
    given = self.get(name)
    return types.UserError(
      f"{self.path}: {self.family}.{name} must be {expected}, got "
      f"{'nothing' if given is None else repr(given)}"
    )


def load_config(path: str) -> decoder.DecoderConfig:
  """Returns the shape of the decoder in a GGUF file.

  Raises:
    UserError: a key is missing or asks for what the decoder does not compute.
  """
  file = _open(path)
  metadata = file.metadata
  given = _Settings(path, metadata)
  tensors = {tensor.name: tensor for tensor in file.tensors}
  if "tokenizer.ggml.tokens" not in metadata:
    raise types.UserError(f"{path}: tokenizer.ggml.tokens is missing")
  heads, width = given.number("attention.head_count"), given.number(
    "embedding_length"
  )
  dim = given.get("attention.key_length", width // heads)
  length = given.number("context_length")
  for name, value in (
    ("rope.dimension_count", dim), ("attention.value_length", dim),
    ("expert_count", 0),
  ):
    if given.get(name, value) != value:
      raise given.wrong(name, str(value))
  if (given.get("attention.sliding_window") or length) < length:
    raise given.wrong("attention.sliding_window", "absent")
  theta = float(given.get("rope.freq_base", 10000.0))
  return decoder.DecoderConfig(
    family=given.family,
    vocab_size=len(metadata["tokenizer.ggml.tokens"]),
    hidden_size=width,
    intermediate_size=given.number("feed_forward_length"),
    num_layers=given.number("block_count"),
    num_heads=heads,
    num_kv_heads=given.get("attention.head_count_kv", heads),
    head_dim=dim,
    rope_theta=theta,
    rope_scaling=_rope_scaling(
      given, dim, theta, tensors.get("rope_freqs.weight")
    ),
    rms_norm_eps=given.number("attention.layer_norm_rms_epsilon"),
    tie_embeddings="output.weight" not in tensors,
    qkv_bias="blk.0.attn_q.bias" in tensors,
    qk_norm="blk.0.attn_q_norm.weight" in tensors,
    o_bias="blk.0.attn_output.bias" in tensors,
    mlp_bias="blk.0.ffn_up.bias" in tensors,
    max_positions=length,
  )


def _rope_scaling(
  given: _Settings, dim: int, theta: float, table
) -> rope.RopeScaling | None:
  """Returns the context extension that the metadata or a tensor describes."""
  kind = given.get("rope.scaling.type", "none")
  factor = float(given.get("rope.scaling.factor", 0.0))
  if kind == "none" and (old := given.get("rope.scale_linear")):
    kind, factor = "linear", float(old)
  original = int(
    given.get("rope.scaling.original_context_length")
    or given.number("context_length")
  )
  if kind not in ("none", "linear", "yarn"):
    raise given.wrong("rope.scaling.type", "none, linear or yarn")
  if kind != "none" and factor <= 0:
    raise given.wrong("rope.scaling.factor", "a positive number")
  if table is not None:
    if kind != "none" and factor != 1:
      raise given.wrong("rope.scaling.type", "none beside rope_freqs.weight")
    factors = np.asarray(table.data, np.float32).reshape(-1)
    return _tabled(factors, dim, theta, original)
  if kind == "none" or factor == 1:
    return None
  if kind == "linear":
    return rope.RopeScaling("linear", factor, original)
  if given.get("rope.scaling.yarn_log_multiplier"):
    raise given.wrong("rope.scaling.yarn_log_multiplier", "absent")
  scale = 1.0
  for name in ("attn_factor", "yarn_attn_factor"):
    scale *= given.get(f"rope.scaling.{name}", 1.0)
  return rope.RopeScaling(
    "yarn", factor, original,
    float(given.get("rope.scaling.yarn_beta_slow", 1.0)),
    float(given.get("rope.scaling.yarn_beta_fast", 32.0)),
    0.0 if scale == 1 else scale * rope.yarn_scale(factor),
  )


def _tabled(factors, dim, theta, original) -> rope.RopeScaling | None:
  """Returns the scaling behind `rope_freqs`: frequencies are divided by it.

  Llama 3's own formula where it gives the same numbers, so that it can be
  written to config.json again; else the numbers themselves.
  """
  if (factors == 1).all():
    return None
  plain, _ = rope.frequencies(dim, theta, None)
  for length in (original, 8192):
    llama = rope.RopeScaling("llama3", float(factors.max()), length, 1.0, 4.0)
    scaled, _ = rope.frequencies(dim, theta, llama)
    if np.allclose(plain / scaled, factors, rtol=1e-4):
      return llama
  return rope.RopeScaling(
    "factors", 1.0, original, factors=tuple(float(x) for x in factors)
  )


_GGUF_NAMES = (
  (r"token_embd\.weight", "model.embed_tokens.weight"),
  (r"output_norm\.weight", "model.norm.weight"),
  (r"output\.weight", "lm_head.weight"),
  (r"blk\.(\d+)\.attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
  (r"blk\.(\d+)\.ffn_norm\.weight",
   r"model.layers.\1.post_attention_layernorm.weight"),
  (r"blk\.(\d+)\.attn_([qkv])\.(weight|bias)",
   r"model.layers.\1.self_attn.\2_proj.\3"),
  (r"blk\.(\d+)\.attn_([qk])_norm\.weight",
   r"model.layers.\1.self_attn.\2_norm.weight"),
  (r"blk\.(\d+)\.attn_output\.(weight|bias)",
   r"model.layers.\1.self_attn.o_proj.\2"),
  (r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)",
   r"model.layers.\1.mlp.\2_proj.\3"),
)


def _hf_name(name: str) -> str:
  for pattern, replacement in _GGUF_NAMES:
    match = re.fullmatch(pattern, name)
    if match:
      return match.expand(replacement)
  return name


def names(path: str) -> dict[str, str]:
  """Hugging Face name -> GGUF name; `load_config` reads the rope table."""
  found: dict[str, str] = {}
  for tensor in _open(path).tensors:
    if tensor.name == "rope_freqs.weight":
      continue
    if _hf_name(tensor.name) in found:
      raise WeightError(f"tensor {tensor.name} is stored twice in {path}")
    found[_hf_name(tensor.name)] = tensor.name
  return found


def read(
  path: str, config: decoder.DecoderConfig
) -> Iterator[tuple[str, np.ndarray]]:
  """Dequantised tensors; llama's rotary pairs are put in halves again."""
  for tensor in _open(path).tensors:
    if tensor.name == "rope_freqs.weight":
      continue
    name = _hf_name(tensor.name)
    value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    value = np.asarray(value, np.float32)
    if config.family == "llama" and re.search(r"\.[qk]_proj\.", name):
      heads = value.shape[0] // config.head_dim
      pairs = value.reshape(heads, config.head_dim // 2, 2, -1)
      value = pairs.swapaxes(1, 2).reshape(value.shape)
    yield name, value
