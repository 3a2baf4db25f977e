"""SmolLM2-135M in three systems with the same random weights."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.models import decoder, heads

# Tunix ignores the rotary base of a config and takes this one.
_ROPE_THETA = 1e6


def smollm2(vocab_size: int = 49_152) -> decoder.DecoderConfig:
  """Shape of SmolLM2-135M, float32."""
  return decoder.DecoderConfig(
    family="llama", vocab_size=vocab_size, hidden_size=576,
    intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
    head_dim=64, rope_theta=_ROPE_THETA, rms_norm_eps=1e-5, dtype=jnp.float32,
  )


def policy(config: decoder.DecoderConfig) -> types.Tree:
  """Our parameters."""
  return heads.init_policy(config, jax.random.key(0))


def torch_config(config: decoder.DecoderConfig, **changes: Any) -> Any:
  """The same shape as a transformers config."""
  import transformers

  from stepsearch_jax.models.weights import hf_config

  ends = SimpleNamespace(eos_ids=(0,), pad_id=0)
  fields = hf_config.write(config, "float32", ends)
  # Nothing may end a turn early, and padding is told by masks.
  fields |= {"eos_token_id": None, "pad_token_id": None, **changes}
  return transformers.LlamaConfig(**fields)


def torch_policy(params: types.Tree, config: decoder.DecoderConfig) -> Any:
  """transformers' model with our weights."""
  import torch
  import transformers

  from stepsearch_jax.models.weights import export as hf_export

  model = transformers.LlamaForCausalLM(torch_config(config))
  found = {
    name: torch.from_numpy(np.array(value))
    for name, value in hf_export.tensors(params, config, "float32")
  }
  missing, unknown = model.load_state_dict(found, strict=False)
  if unknown or set(missing) - {"lm_head.weight"}:
    raise types.UserError(f"weights do not match: {missing} {unknown}")
  model.tie_weights()
  return model.eval()


class Numbers:
  """A tokenizer whose texts are the token ids themselves."""

  def encode(self, text: str, **unused: Any) -> list[int]:
    """Ids written in `text`."""
    return [int(word) for word in text.split()]

  def decode(self, ids: Iterable[int], **unused: Any) -> str:
    """Ids as words."""
    return " ".join(map(str, ids))

  def bos_id(self) -> int:
    """No token is put in front."""
    return 0

  def eos_id(self) -> int:
    """An id that no model chooses."""
    return -1

  def pad_id(self) -> int:
    """An id that no prompt contains."""
    return 0


def tunix_sampler(
  params: types.Tree, config: decoder.DecoderConfig, cache_size: int
) -> Any:
  """Tunix's vanilla sampler with our weights; its texts are token ids."""
  from flax import nnx
  from tunix.generate import sampler
  from tunix.models.llama3 import model as llama

  shape = llama.ModelConfig(
    num_layers=config.num_layers, vocab_size=config.vocab_size,
    embed_dim=config.hidden_size, hidden_dim=config.intermediate_size,
    num_heads=config.num_heads, head_dim=config.head_dim,
    num_kv_heads=config.num_kv_heads, rope_theta=int(config.rope_theta),
    norm_eps=config.rms_norm_eps, weight_tying=True,
  )
  model = llama.Llama3(shape, rngs=nnx.Rngs(0))
  trunk = params["trunk"]

  def put(variable, value):
    if variable.shape != value.shape:
      raise types.UserError(f"{variable.shape} expected, got {value.shape}")
    variable[...] = value

  put(model.embedder.input_embedding, trunk["embedding"])
  put(model.final_norm.w, trunk["final_norm"]["scale"])
  for i, layer in enumerate(model.layers):
    ours = jax.tree.map(lambda x, i=i: x[i], trunk["layers"])
    for name in "qkvo":
      put(getattr(layer.attn, f"{name}_proj").w,
          ours["attention"][f"{name}_kernel"])
    for name in ("gate", "up", "down"):
      put(getattr(layer.mlp, f"{name}_proj").kernel,
          ours["mlp"][f"{name}_kernel"])
    put(layer.input_layernorm.w, ours["attention_norm"]["scale"])
    put(layer.post_attention_layernorm.w, ours["mlp_norm"]["scale"])
  return sampler.Sampler(
    model, Numbers(),
    sampler.CacheConfig(cache_size, config.num_layers, config.num_kv_heads,
                        config.head_dim),
  )
