"""Says before a run whether it fits a machine, and what will bind it.

  stepsearch plan --topology=v5e:4x4 --config=stepsearch_qwen2_5_3b

compiles every program of the run with the real TPU compiler (package libtpu;
no TPU needed) and prints memory per chip, the roofline of a step, whether it
fits and which `model.remat` is the fastest that does. `--topology=gpu-h100x8`
or `cpu` does the arithmetic without compiling.
"""

from __future__ import annotations

import contextlib
import json
import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from stepsearch_jax import cli
from stepsearch_jax.plan import arithmetic as planning
from stepsearch_jax.plan import machines, report, tpu_compiler

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


def main() -> None:
  """Entry; see the module docstring."""
  jax.config.update("jax_platforms", "cpu")
  config = _CONFIG.value
  machine = machines.parse_topology(_TOPOLOGY.value)
  planning.resolve_mesh(config, machine.chips)
  programs, updates = {}, {}
  if machine.topology and _COMPILE.value:
    with contextlib.ExitStack() as stack:
      # Programs of another machine are of no use to the next start here.
      stack.callback(jax.config.update, "jax_enable_compilation_cache", True)
      jax.config.update("jax_enable_compilation_cache", False)
      programs = tpu_compiler.compile_programs(config, machine)
      updates = tpu_compiler.compile_faster(config, machine, programs)
  plan = report.make_plan(
    config, machine, programs,
    _TOKENS.value or config.rollout.context // 2, _POLICY_SHARE.value, updates,
  )
  print(report.render(plan))
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(plan, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main, required=["config", "topology"])
