"""Compiles scoring and updates for three meshes and counts their arithmetic.

  python tests/ppo/replication_worker.py

Wants eight devices. Prints, as JSON, {program: {mesh: FLOPs per device}}.
"""

import json

import fakes
import jax
from ppo import parts

from stepsearch_jax.bench import hlo_costs
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import learner

MESHES = {"one": (1, 1), "data": (8, 1), "fsdp": (1, 8)}
PROGRAMS = ("reference_forward", "value_forward", "policy_update",
            "value_update")
ROWS, LENGTH = 8, 64


def main():
  # The vocabulary matrix is as large as the layer. One layer and one chunk of
  # tokens: no loop runs more than once.
  model = fakes.make_model(
    2048, hidden_size=128, intermediate_size=512, head_dim=32, num_layers=1,
  )
  spec = parts.learner_spec(
    batch__mini_batch=ROWS, batch__micro_rows=ROWS, batch__row_length=LENGTH,
  )
  found = {name: {} for name in PROGRAMS}
  for mesh, (data, fsdp) in MESHES.items():
    devices = jax.devices()[: data * fsdp]
    ours = learner.Learner(
      model, model, spec, sharding.make_mesh(data, fsdp, devices=devices)
    )
    lowered = ours.lowered()
    for name in PROGRAMS:
      program = hlo_costs.Program(lowered[name].compile().as_text())
      found[name][mesh] = program.costs(unknown_trips=1).flops
  print(json.dumps(found))


if __name__ == "__main__":
  main()
