"""Parameter trees to Hugging Face folders that transformers loads unchanged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import numpy as safetensors_numpy

from stepsearch_jax import buckets, types
from stepsearch_jax.models import decoder, families
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.models.weights import hf as hf_weights
from stepsearch_jax.models.weights import hf_config


def written_config(
  config: decoder.DecoderConfig, tokenizer: tokenizer_lib.Tokenizer
) -> decoder.DecoderConfig:
  """Returns the shape under which a policy is written.

  Its arithmetic is the same, but transformers gives every folder of type
  "qwen2" the pre-tokenizer of Qwen2, whatever tokenizer.json says. With
  another tokenizer, a qwen2 is written as the llama that it equals: one whose
  four attention projections have a bias, that of the output zero.

  Args:
    config: shape of the policy.
    tokenizer: `models.tokenizer.Tokenizer` that goes with it.
  """
  if config.family == "qwen2" and not tokenizer.splits_like_qwen2:
    config = dataclasses.replace(config, family="llama")
  if families.FAMILIES[config.family].attention_bias and config.qkv_bias:
    config = dataclasses.replace(config, o_bias=True)
  return config


def tensors(
  params: types.Tree, config: decoder.DecoderConfig, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields a policy's tensors under Hugging Face names, in their layouts."""
  for entry in hf_weights.weight_table(config):
    leaf = params
    for key in entry.path[:-1]:
      leaf = leaf[key]
    # Only the bias that `written_config` adds is absent.
    leaf = leaf.get(entry.path[-1])
    if leaf is None:
      yield entry.name, np.zeros(entry.shape, jnp.dtype(dtype))
      continue
    leaf = np.asarray(leaf if entry.layer is None else leaf[entry.layer])
    yield entry.name, np.ascontiguousarray(
      entry.to_theirs(leaf).astype(jnp.dtype(dtype))
    )


def save_policy(
  folder: epath.PathLike, params: types.Tree, config: decoder.DecoderConfig,
  tokenizer: tokenizer_lib.Tokenizer, dtype: str = "bfloat16",
  shard_bytes: int = 4 * 10**9, texts: Mapping[str, str] | None = None,
) -> None:
  """Writes a whole Hugging Face folder, or nothing.

  Args:
    folder: must not exist.
    params: policy parameters.
    config: their shape.
    tokenizer: `models.tokenizer.Tokenizer`, chat template included.
    dtype: stored type, "bfloat16" or "float32".
    shard_bytes: a new safetensors file begins before this is exceeded.
    texts: further files by name, for instance README.md.

  Raises:
    UserError: the folder exists or the type is another one.
  """
  folder = epath.Path(folder)
  if folder.exists():
    raise types.UserError(f"{folder} exists; choose a new folder")
  if dtype not in ("bfloat16", "float32"):
    raise types.UserError(f"dtype must be bfloat16 or float32, got {dtype!r}")
  # safetensors writes local files only.
  temporary = buckets.new_scratch(folder.with_name(folder.name + ".tmp"))
  if temporary.exists():
    temporary.rmtree()
  temporary.mkdir(parents=True)
  config = written_config(config, tokenizer)
  _write_shards(temporary, tensors(params, config, dtype), shard_bytes)
  for name, content in (
    ("config.json", hf_config.write(config, dtype, tokenizer)),
    ("generation_config.json",
     {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id,
      "do_sample": True, "temperature": 1.0}),
  ):
    (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
  tokenizer.save(temporary)
  for name, text in (texts or {}).items():
    (temporary / name).write_text(text)
  buckets.publish(temporary, folder, last="config.json")
  if temporary.exists():
    temporary.rmtree()


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
