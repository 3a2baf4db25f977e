"""Says before a run whether it fits a machine, and what will bind it.

  python -m stepsearch_jax.tools.plan --topology=v5e:4x4 \\
    --config=configs/stepsearch_qwen2_5_3b.py

compiles every program of the run with the real TPU compiler (package libtpu;
no TPU needed) and prints memory per chip, the roofline of a step and whether
it fits. `--topology=gpu-h100x8` or `cpu` does the arithmetic without compiling.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib

import jax
import tqdm
from absl import flags
from ml_collections import config_flags

from stepsearch_jax import cli
from stepsearch_jax.tools import planning

_CONFIG = config_flags.DEFINE_config_file("config", None, "Run settings.")
_TOPOLOGY = flags.DEFINE_string(
  "topology", None,
  "TPU slice such as v5e:4x4 or v5p:2x2x4 (compiled), gpu-h100x8, gpu-a100x8, "
  "or cpu (arithmetic only).",
)
_TOKENS = flags.DEFINE_integer(
  "tokens", 0, "Tokens of a mean trajectory; 0 = half the context."
)
_POLICY_SHARE = flags.DEFINE_float(
  "policy_share", 0.15, "Share of them that the policy writes."
)
_COMPILE = flags.DEFINE_bool("compile", True, "False: arithmetic only.")
_JSON = flags.DEFINE_string("json", None, "Also write the plan to this file.")


def topology_devices(machine: planning.Machine):
  """Device descriptions of a TPU slice that need not exist here.

  Raises:
    ValueError: libtpu is missing or does not know the topology.
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
    raise ValueError(
      f"--topology={machine.topology}: the TPU compiler is not available "
      f"({str(error).splitlines()[0][:120]}); pip install libtpu, or use "
      "--nocompile"
    ) from error


def compile_programs(config, machine: planning.Machine):
  """Bytes per chip of every program, by the TPU compiler.

  Returns:
    {program: {"arguments", "outputs", "aliased", "temporary"}}.
  """
  learner, sampler, chunk = planning.build(
    config, machine, topology_devices(machine)
  )
  lowered = learner.lowered()
  policy = learner.abstract_state()["policy"]
  lowered = sampler.lowered(*chunk, policy) | lowered
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


def main() -> None:
  """Entry; see the module docstring."""
  jax.config.update("jax_platforms", "cpu")
  config = _CONFIG.value
  machine = planning.parse_topology(_TOPOLOGY.value)
  planning.resolve_mesh(config, machine.chips)
  programs = {}
  if machine.topology and _COMPILE.value:
    with contextlib.ExitStack() as stack:
      # Programs of another machine are of no use to the next start here.
      stack.callback(jax.config.update, "jax_enable_compilation_cache", True)
      jax.config.update("jax_enable_compilation_cache", False)
      programs = compile_programs(config, machine)
  plan = planning.make_plan(
    config, machine, programs,
    _TOKENS.value or config.rollout.context // 2, _POLICY_SHARE.value,
  )
  print(planning.render(plan))
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(plan, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main, required=["config", "topology"])
