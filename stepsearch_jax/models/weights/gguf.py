"""GGUF files: metadata, decoder shape and dequantised tensors.

Tensors come out under their Hugging Face names and in Hugging Face layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.models import decoder


class WeightError(types.UserError):
  """A checkpoint does not fit the model; the message names the tensor."""


def fields(path: str) -> dict[str, Any]:
  """Metadata of a GGUF file."""
  reader = gguf.GGUFReader(path)
  return {name: value.contents() for name, value in reader.fields.items()}


def load_config(path: str) -> decoder.DecoderConfig:
  """Shape of the decoder in a GGUF file."""
  metadata = fields(path)
  family = metadata["general.architecture"]
  if family not in decoder.FAMILIES:
    raise types.UserError(
      f"{path}: architecture {family!r} is not supported, "
      f"expected one of {decoder.FAMILIES}"
    )

  def get(name, default=None):
    return metadata.get(f"{family}.{name}", default)

  tensors = {t.name for t in gguf.GGUFReader(path).tensors}
  heads, width = get("attention.head_count"), get("embedding_length")
  return decoder.DecoderConfig(
    family=family,
    vocab_size=len(metadata["tokenizer.ggml.tokens"]),
    hidden_size=width,
    intermediate_size=get("feed_forward_length"),
    num_layers=get("block_count"),
    num_heads=heads,
    num_kv_heads=get("attention.head_count_kv", heads),
    head_dim=get("attention.key_length", width // heads),
    rope_theta=float(get("rope.freq_base", 10000.0)),
    rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
    tie_embeddings="output.weight" not in tensors,
    qkv_bias="blk.0.attn_q.bias" in tensors,
    qk_norm="blk.0.attn_q_norm.weight" in tensors,
    max_positions=get("context_length"),
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
  (r"blk\.(\d+)\.attn_output\.weight",
   r"model.layers.\1.self_attn.o_proj.weight"),
  (r"blk\.(\d+)\.ffn_(gate|up|down)\.weight",
   r"model.layers.\1.mlp.\2_proj.weight"),
)


def _hf_name(name: str) -> str:
  for pattern, replacement in _GGUF_NAMES:
    match = re.fullmatch(pattern, name)
    if match:
      return match.expand(replacement)
  return name


def names(path: str) -> dict[str, str]:
  """Hugging Face name -> GGUF name; rope tables carry no weights."""
  found: dict[str, str] = {}
  for tensor in gguf.GGUFReader(path).tensors:
    if tensor.name.startswith("rope_freqs"):
      continue
    if _hf_name(tensor.name) in found:
      raise WeightError(f"tensor {tensor.name} is stored twice in {path}")
    found[_hf_name(tensor.name)] = tensor.name
  return found


def read(
  path: str, config: decoder.DecoderConfig
) -> Iterator[tuple[str, np.ndarray]]:
  """Dequantised tensors; llama's rotary pairs are put in halves again."""
  for tensor in gguf.GGUFReader(path).tensors:
    if tensor.name.startswith("rope_freqs"):
      continue
    name = _hf_name(tensor.name)
    value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    value = np.asarray(value, np.float32)
    if config.family == "llama" and re.search(r"\.[qk]_proj\.", name):
      heads = value.shape[0] // config.head_dim
      value = value.reshape(heads, config.head_dim // 2, 2, -1)
      value = value.swapaxes(1, 2).reshape(heads * config.head_dim, -1)
    yield name, value
