"""Parameter trees to Hugging Face folders that transformers loads unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import numpy as safetensors_numpy

from stepsearch_jax import types
from stepsearch_jax.models import decoder
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.models.weights import hf as hf_weights

_ARCHITECTURES = {
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "llama": "LlamaForCausalLM",
}


def hf_config(
  config: decoder.DecoderConfig, dtype: str, eos_ids: Iterable[int], pad_id: int
) -> dict[str, Any]:
  """`config.json` of a policy, the inverse of `hf_weights.load_config`."""
  rope: dict[str, Any] = {"rope_type": "default"}
  if scaling := config.rope_scaling:
    rope = {
      "rope_type": scaling.kind,
      "factor": scaling.factor,
      "original_max_position_embeddings": scaling.original,
    }
    if scaling.kind == "llama3":
      rope |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    else:
      rope |= {"beta_slow": scaling.low, "beta_fast": scaling.high}
      if scaling.attention_factor:
        rope["attention_factor"] = scaling.attention_factor
  rope["rope_theta"] = config.rope_theta
  out = {
    "architectures": [_ARCHITECTURES[config.family]],
    "model_type": config.family,
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.rms_norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "rope_parameters": rope,
    # Readers before transformers 5 look here.
    "rope_theta": config.rope_theta,
    "dtype": dtype,
    "torch_dtype": dtype,
    "eos_token_id": list(eos_ids),
    "pad_token_id": pad_id,
  }
  if config.family != "qwen2":
    out["attention_bias"] = config.qkv_bias
  if scaling := config.rope_scaling:
    out["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
  return out


def tensors(
  params: types.Tree, config: decoder.DecoderConfig, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Tensors of a policy under their Hugging Face names and layouts."""
  for entry in hf_weights.weight_table(config):
    leaf = params
    for key in entry.path:
      leaf = leaf[key]
    leaf = np.asarray(leaf if entry.layer is None else leaf[entry.layer])
    yield entry.name, np.ascontiguousarray(
      entry.to_theirs(leaf).astype(jnp.dtype(dtype))
    )


def save_policy(
  folder: epath.PathLike, params: types.Tree, config: decoder.DecoderConfig,
  tokenizer: tokenizer_lib.Tokenizer, dtype: str = "bfloat16",
  shard_bytes: int = 4 * 10**9,
) -> None:
  """Writes a whole Hugging Face folder, or nothing.

  Args:
    folder: must not exist.
    params: policy parameters.
    config: their shape.
    tokenizer: `models.tokenizer.Tokenizer`, chat template included.
    dtype: stored type, "bfloat16" or "float32".
    shard_bytes: a new safetensors file begins before this is exceeded.

  Raises:
    UserError: the folder exists or the type is another one.
  """
  folder = epath.Path(folder)
  if folder.exists():
    raise types.UserError(f"{folder} exists; choose a new folder")
  if dtype not in ("bfloat16", "float32"):
    raise types.UserError(f"dtype must be bfloat16 or float32, got {dtype!r}")
  temporary = folder.with_name(folder.name + ".tmp")
  if temporary.exists():
    temporary.rmtree()
  temporary.mkdir(parents=True)
  _write_shards(temporary, tensors(params, config, dtype), shard_bytes)
  for name, content in (
    ("config.json",
     hf_config(config, dtype, tokenizer.eos_ids, tokenizer.pad_id)),
    ("generation_config.json",
     {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id,
      "do_sample": True, "temperature": 1.0}),
  ):
    (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
  tokenizer.save(temporary)
  temporary.rename(folder)


def _write_shards(folder, stream, shard_bytes: int) -> None:
  """Fills safetensors files one after the other, then names and lists them."""
  weight_map: dict[str, int] = {}
  shard: dict[str, np.ndarray] = {}
  total = size = count = 0

  def flush():
    nonlocal shard, size, count
    path = folder / f"shard-{count}.safetensors"
    safetensors_numpy.save_file(shard, str(path), metadata={"format": "pt"})
    shard, size, count = {}, 0, count + 1

  for name, value in stream:
    if shard and size + value.nbytes > shard_bytes:
      flush()
    shard[name], weight_map[name] = value, count
    size, total = size + value.nbytes, total + value.nbytes
  flush()
  if count == 1:
    (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
    return
  names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors"
           for i in range(count)]
  for i, name in enumerate(names):
    (folder / f"shard-{i}.safetensors").rename(folder / name)
  index = {
    "metadata": {"total_size": total},
    "weight_map": {k: names[i] for k, i in weight_map.items()},
  }
  (folder / "model.safetensors.index.json").write_text(
    json.dumps(index, indent=2) + "\n"
  )
