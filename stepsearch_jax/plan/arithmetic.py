"""The arithmetic of a plan: bytes per chip and roofline times.

Memory is exact for what stays resident (parameters, optimizers, slot cache,
by their shardings); a program's temporaries come from the compiler where there
is one, else from the estimate in `_temporary`. Times are lower bounds: every
phase at the machine's peak compute or memory rate, whichever is slower.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from stepsearch_jax.models import attention, decoder, heads
from stepsearch_jax.models.weights import hf
from stepsearch_jax.parallel import sharding
from stepsearch_jax.plan import rows as packed_rows
from stepsearch_jax.plan.machines import Machine
from stepsearch_jax.ppo import estimators, learner, logprobs, specs, trainable
from stepsearch_jax.rollout import layout
from stepsearch_jax.rollout import programs as rollout_programs
from stepsearch_jax.run.settings import Settings

_STATES = 64  # Upper bound for the stop automaton of the usual tags.


def resolve_mesh(config: ml_collections.ConfigDict, chips: int) -> None:
  """Replaces -1 in `config.mesh` by what `chips` devices leave, and checks."""
  sizes = sharding.mesh_shape(
    chips, *(config.mesh[axis] for axis in sharding.AXES)
  )
  config.mesh.update(dict(zip(sharding.AXES, sizes, strict=True)))
  Settings.from_config(config, devices=chips)


class Built(NamedTuple):
  """Programs of a run on described devices, and its largest chunk [B, S]."""

  training: learner.Learner
  rollout: rollout_programs.RolloutPrograms
  chunk: tuple[int, int]


def _settings(config) -> Settings:
  """The checked settings; `resolve_mesh` has named every axis."""
  return Settings.from_config(config, devices=0)


@functools.lru_cache
def _at_hand(reference: str) -> decoder.DecoderConfig | None:
  return hf.shape_at_hand(reference)


def model_shape(config: ml_collections.ConfigDict) -> decoder.DecoderConfig:
  """Returns the policy's shape: its reference's, else that of `model.size`.

  Nothing is downloaded; `shape_source` says which of the two it is.
  """
  settings = _settings(config)
  spec = settings.model
  found = _at_hand(spec.reference) if spec.reference else None
  if found is None:
    return settings.decoder(spec.size.vocab)
  return dataclasses.replace(
    found, dtype=jnp.dtype(spec.dtype), remat=decoder.Remat(spec.remat)
  )


def shape_source(config: ml_collections.ConfigDict) -> str:
  """Returns where `model_shape` has its numbers from, in words."""
  reference = config.model.reference
  if not reference:
    return "model.size"
  if _at_hand(reference) is None:
    return (f"model.size, ASSUMED: the config.json of {reference} is not on "
            "this machine")
  return f"read from {reference}"


def build(
  config: ml_collections.ConfigDict, machine: Machine,
  devices: Sequence[jax.Device],
) -> Built:
  """Returns the programs of a run, which need devices as descriptions only."""
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  model = dataclasses.replace(
    model_shape(config), attention=attention.backend_of(machine.platform)
  )
  settings = _settings(config)
  spec = settings.learner(settings.total_steps(1))
  table = np.zeros((_STATES, model.vocab_size), np.int32)
  programs = rollout_programs.RolloutPrograms(
    model, settings.sampler, table, _STATES - 1, mesh
  )
  rollout = config.rollout
  chunk = (rollout.extend_rows[-1], rollout.extend_tokens[-1])
  return Built(learner.Learner(model, model, spec, mesh), programs, chunk)


def _bytes(shapes, shardings) -> int:
  """Bytes of a tree on one chip."""
  sizes = jax.tree.map(
    lambda x, where: int(np.prod(where.shard_shape(x.shape)))
    * jnp.dtype(x.dtype).itemsize,
    shapes, shardings,
  )
  return sum(jax.tree.leaves(sizes))


def parameter_count(model: decoder.DecoderConfig) -> int:
  """Returns the number of a policy's parameters."""
  shapes = trainable.Trainable("policy", model).shapes()
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def needs_values(config: ml_collections.ConfigDict) -> bool:
  """Whether the run trains a value model."""
  return estimators.find(_settings(config).config["estimator"]).needs_values


def resident(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Bytes per chip of what a run keeps, by part."""
  model = model_shape(config)
  mesh = sharding.abstract_mesh(**config.mesh)
  settings = _settings(config)
  spec = settings.learner(settings.total_steps(1))
  adapters = {"policy": spec.policy.adapter, "value": spec.value.adapter}
  parts: dict[str, float] = {}
  kinds = ["policy", "value"] if needs_values(config) else ["policy"]
  for kind in kinds:
    part = trainable.Trainable(kind, model, adapters[kind])
    parts[kind] = _bytes(part.shapes(), part.shardings(mesh))
    # Two float32 moments, sharded like the parameters.
    parts[f"{kind} optimizer"] = 2 * parts[kind]
  frozen = trainable.abstract_reference(model, mesh)
  parts["reference"] = _bytes(
    frozen, jax.tree.map(lambda x: x.sharding, frozen)
  )
  decoding = _bytes(
    frozen, sharding.decode_shardings(mesh, heads.logical_axes(model), frozen)
  )
  cache = jax.eval_shape(
    lambda: decoder.init_cache(
      model, config.rollout.slots, config.rollout.context, model.dtype
    )
  )
  placed = layout.cache_shardings(mesh, cache)
  # Only while a rollout runs.
  if adapters["policy"] is not None:
    parts["merged policy"] = parts["reference"]
  return parts | {
    "decode weights": decoding, "slot cache": _bytes(cache, placed)
  }


_ROLLOUT_PARTS = ("merged policy", "decode weights", "slot cache")


def _has_kernel(model, platform, length) -> bool:
  """Whether attention of packed rows is one kernel, as it says itself."""
  backend = attention.backend_of(platform)
  if backend == "cudnn":
    return jnp.dtype(model.dtype).itemsize == 2
  return backend == "splash" and length % 128 == model.head_dim % 64 == 0


def layer_bytes(
  model: decoder.DecoderConfig, platform: str, length: int, tensor: int
) -> dict[decoder.Remat, float]:
  """Returns what training keeps of a layer, bytes per token and chip.

  Args:
    model: the decoder.
    platform: that it runs on.
    length: tokens of a packed row.
    tensor: chips that share heads and MLP.
  """
  width = jnp.dtype(model.dtype).itemsize
  hidden, mlp = model.hidden_size, model.intermediate_size / tensor
  heads = model.num_heads / tensor
  query = heads * model.head_dim
  key = model.num_kv_heads / tensor * model.head_dim
  # The layer's input; and what goes into and comes out of q, k, v, o, gate and
  # up, apart from what a norm or the attention makes of it.
  dots = 2 * hidden + query + 2 * key + 2 * mlp
  # Both norms: their input in float32, its multiple and the result in `width`.
  # MLP: gate, its sigmoid, their product, up, both factors of down.
  every = 2 * hidden * (4 + 2 * width) + 6 * mlp * width
  if _has_kernel(model, platform, length):
    # q, k, v, the result in two layouts, the logarithm of its norm.
    every += (3 * query + 2 * key) * width + 4 * heads
  else:
    # Blocks of queries, each with a copy of the keys that it sees; weights in
    # float32 and as factors.
    seen = (length + min(length, 128)) / 2
    every += (2 * query + 2 * key * seen / min(length, 128)) * width
    every += heads * seen * (4 + width)
  return {
    decoder.Remat.FULL: hidden * width, decoder.Remat.DOTS: dots * width,
    decoder.Remat.NONE: every,
  }


def _temporary(
  config: ml_collections.ConfigDict, machine: Machine,
  parts: Mapping[str, float],
) -> dict[str, float]:
  """Estimated temporaries of each program, in bytes per chip.

  Update: what every layer keeps, one layer's own activations and gathered
  weights, a chunk of logits.
  """
  model = model_shape(config)
  mesh = config.mesh
  width = jnp.dtype(model.dtype).itemsize
  rows = config.ppo.micro_rows / (mesh.data * mesh.fsdp)
  tokens = rows * config.rollout.context
  layer = 3 * model.hidden_size * model.intermediate_size / mesh.tensor
  hidden = tokens * model.hidden_size * width
  inside = tokens * (
    8 * model.hidden_size + 4 * model.intermediate_size / mesh.tensor
  ) * width
  vocab = model.vocab_size / mesh.tensor
  chunk = 4 * 4 * logprobs.chunk_size(model.vocab_size) * vocab
  gathered = 2 * 4 * layer + width * vocab * model.hidden_size
  forward = 2 * hidden + inside + chunk + gathered
  of_layer = layer_bytes(
    model, machine.platform, config.rollout.context, mesh.tensor
  )
  kept = tokens * model.num_layers * of_layer[model.remat]
  if model.remat == decoder.Remat.NONE:
    kept += parts["reference"]  # Its weights in the compute type.
  # The head's gradient is summed over the chips at the end, not per chunk.
  head = 4 * vocab * model.hidden_size
  # Scores are more than all else where no kernel keeps them to itself.
  own = max(2 * inside, tokens * of_layer[decoder.Remat.NONE])
  update = kept + own + chunk + 2 * gathered + head

  shards = mesh.data * mesh.fsdp
  rollout = config.rollout
  extend = rollout.extend_rows[-1] * rollout.extend_tokens[-1] * (
    8 * model.hidden_size + 4 * model.intermediate_size / mesh.tensor
  ) * width + rollout.extend_rows[-1] * model.num_heads * 4 * 128 * (
    rollout.context
  )
  decode = 4 * 3 * rollout.slots / shards * vocab
  found = {
    "extend": extend, "decode_block": decode, "reference_forward": forward,
    # Gradients: the sum so far, and those of the micro-batch.
    "policy_update": update + 2 * parts["policy"],
  }
  if "value" in parts:
    found |= {
      "value_forward": forward, "value_update": update + 2 * parts["value"]
    }
  return found


def program_peaks(
  config: ml_collections.ConfigDict, machine: Machine,
  programs: Mapping[str, Mapping[str, int]],
) -> dict[str, float]:
  """Bytes per chip while each program runs: resident parts and its own."""
  parts = resident(config)
  always = sum(v for k, v in parts.items() if k not in _ROLLOUT_PARTS)
  rolling = sum(parts.get(k, 0) for k in _ROLLOUT_PARTS)
  if programs:
    own: dict[str, float] = {
      name: max(p["outputs"] - p["aliased"], 0) + p["temporary"]
      for name, p in programs.items()
    }
    for name in own:
      if name.endswith(("_update", "_apply")):
        own[name] += parts[name.split("_")[0]]  # The gradients.
  else:
    own = _temporary(config, machine, parts)
  in_rollout = ("extend", "decode_block")
  return {
    name: always + size + (rolling if name in in_rollout else 0.0)
    for name, size in own.items()
  }


def step_rows(
  config: ml_collections.ConfigDict, tokens: int
) -> dict[str, packed_rows.Rows]:
  """Returns the packed rows of a step's scoring and of an epoch of updates.

  Args:
    config: run settings with a resolved mesh.
    tokens: mean tokens of a trajectory.
  """
  settings = _settings(config)
  return packed_rows.of_batch(
    settings.learner(settings.total_steps(1)), settings.batch.trajectories,
    tokens, sharding.batch_shards(sharding.abstract_mesh(**config.mesh)),
  )


def step_times(
  config: ml_collections.ConfigDict, machine: Machine, tokens: int, share: float
) -> dict[str, dict[str, Any]]:
  """Roofline of a step's phases, the padding of packed rows included.

  Args:
    config: run settings with a resolved mesh.
    machine: where it runs.
    tokens: mean tokens of a trajectory.
    share: part of them that the policy writes.

  Returns:
    {phase: {"flops", "seconds", "bound"}} over all chips.
  """
  model, parts = model_shape(config), resident(config)
  trajectories = config.batch.questions * config.batch.rollouts
  total = trajectories * tokens
  written = total * share
  # Each token meets half its context in attention, on average.
  attending = 4 * model.num_layers * model.num_heads * model.head_dim * (
    tokens / 2
  )
  per_token = 2 * parameter_count(model) + attending
  models = 2 if "value" in parts else 1
  slots = min(config.rollout.slots, trajectories)
  cache = parts["slot cache"] * tokens / 2 / config.rollout.context
  decode_steps = written / slots
  rows = step_rows(config, tokens)
  # Forward and backward (twice the forward), and what is computed again.
  trained = 3 * per_token + {
    decoder.Remat.FULL: per_token, decoder.Remat.DOTS: attending,
    decoder.Remat.NONE: 0.0,
  }[model.remat]
  # The policy's, unless recorded while sampling, the reference's, the values.
  passes = models + (config.ppo.old_logp != specs.OldLogp.ROLLOUT)
  work = {
    # Phase: (FLOPs of all chips, bytes of one chip).
    "rollout extend": (per_token * (total - written), 0.0),
    "rollout decode": (
      per_token * written, decode_steps * (parts["decode weights"] + cache)
    ),
    "scores": (passes * per_token * rows["scores"].tokens, 0.0),
    "updates": (
      models * trained * rows["updates"].tokens * config.ppo.epochs, 0.0
    ),
  }
  found = {}
  for phase, (flops, moved) in work.items():
    compute = flops / (machine.chips * machine.flops)
    memory = moved / machine.bandwidth
    found[phase] = {
      "flops": flops, "seconds": max(compute, memory),
      "bound": "memory" if memory > compute else "compute",
    }
  return found
