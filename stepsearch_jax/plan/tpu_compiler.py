"""Compiles a run's programs for a TPU that need not be there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import tqdm
from absl import logging

from stepsearch_jax import types
from stepsearch_jax.plan import arithmetic as planning
from stepsearch_jax.plan import machines, remat

# Estimates of less than this many times the memory are worth a look.
_DOUBT = 1.25


def topology_devices(machine: machines.Machine) -> Sequence[jax.Device]:
  """Device descriptions of a TPU slice that need not exist here.

  Raises:
    UserError: libtpu is missing or does not know the topology.
  """
  from jax.experimental import topologies

  # Keeps libtpu from asking a metadata server for the TPU that is not there.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
  # Several plans may run side by side: no chip is used, nothing to lock.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    return topologies.get_topology_desc(machine.topology, "tpu").devices
  except Exception as error:  # The plugin raises whatever it likes.
    raise types.UserError(
      f"--topology={machine.topology}: the TPU compiler is not available "
      f"({types.first_line(error)[:120]}); pip install libtpu, or use "
      "--nocompile"
    ) from error


def compile_programs(
  config: ml_collections.ConfigDict, machine: machines.Machine
) -> dict[str, dict[str, int]]:
  """Bytes per chip of every program, by the TPU compiler.

  Returns:
    {program: {"arguments", "outputs", "aliased", "temporary"}}; temporaries of
    all of a chip's memory where the compiler refuses a program for its memory.
  """
  learner, rollout, chunk = planning.build(
    config, machine, topology_devices(machine)
  )
  lowered = learner.lowered()
  state = learner.abstract_state()
  # With adapters, rollouts run on the merged policy: shaped like the reference.
  adapter = learner.spec.policy.adapter
  policy = state.policy.params if adapter is None else state.reference
  return compiled_memory(rollout.lowered(*chunk, policy) | lowered, machine)


def compile_faster(
  config: ml_collections.ConfigDict, machine: machines.Machine,
  programs: remat.Programs,
) -> dict[remat.Remat, dict[str, dict[str, int]]]:
  """Compiles the updates of runs that rematerialize less than this one.

  The fastest comes first, and none behind the first that fits. What would need
  far more than a chip has, by the estimate, is left out.

  Args:
    config: run settings.
    machine: where they run.
    programs: from `compile_programs`.

  Returns:
    {value of `model.remat`: updates as in `compile_programs`}.
  """
  found = {}
  order = remat.FASTEST_FIRST
  for word in order[: order.index(config.model.remat)]:
    guess = remat.choose(config, machine, word, programs)
    if guess.peak > _DOUBT * machine.memory:
      continue
    learner = planning.build(
      remat.with_remat(config, word), machine, topology_devices(machine)
    ).training
    updates = {
      name: program for name, program in learner.lowered().items()
      if remat.is_update(name)
    }
    found[word] = compiled_memory(updates, machine)
    if remat.choose(config, machine, word, programs, found[word]).fits:
      break
  return found


def compiled_memory(
  lowered: Mapping[str, jax.stages.Lowered], machine: machines.Machine
) -> dict[str, dict[str, int]]:
  """Compiles programs; see `compile_programs`."""
  found = {}
  bar = tqdm.tqdm(lowered.items(), desc="compile", unit="program")
  for name, program in bar:
    bar.set_postfix_str(name)
    try:
      memory = program.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      logging.warning("%s: %s", name, types.first_line(error))
      found[name] = dict(
        arguments=0, outputs=0, aliased=0, temporary=int(machine.memory)
      )
      continue
    found[name] = {
      "arguments": memory.argument_size_in_bytes,
      "outputs": memory.output_size_in_bytes,
      "aliased": memory.alias_size_in_bytes,
      "temporary": memory.temp_size_in_bytes,
    }
  return found
