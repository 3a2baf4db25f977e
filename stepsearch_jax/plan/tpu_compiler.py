"""Compiles a run's programs for a TPU that need not be there."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import ml_collections
import tqdm

from stepsearch_jax import types
from stepsearch_jax.plan import arithmetic as planning
from stepsearch_jax.plan import machines


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
    {program: {"arguments", "outputs", "aliased", "temporary"}}.
  """
  learner, rollout, chunk = planning.build(
    config, machine, topology_devices(machine)
  )
  lowered = learner.lowered()
  state = learner.abstract_state()
  # With adapters, rollouts run on the merged policy: shaped like the reference.
  adapter = learner.spec.policy.adapter
  policy = state.policy.params if adapter is None else state.reference
  lowered = rollout.lowered(*chunk, policy) | lowered
  found = {}
  bar = tqdm.tqdm(lowered.items(), desc="compile", unit="program")
  for name, program in bar:
    bar.set_postfix_str(name)
    memory = program.compile().memory_analysis()
    found[name] = {
      "arguments": memory.argument_size_in_bytes,
      "outputs": memory.output_size_in_bytes,
      "aliased": memory.alias_size_in_bytes,
      "temporary": memory.temp_size_in_bytes,
    }
  return found
