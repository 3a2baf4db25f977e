"""A model and recorded lengths so small that a suite can be rehearsed."""

import json

import jax.numpy as jnp

from stepsearch_jax.models import decoder

MODEL = decoder.DecoderConfig(
  family="llama", vocab_size=512, hidden_size=16, intermediate_size=24,
  num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, dtype=jnp.float32,
  remat="none",
)


def workloads(folder):
  """Writes workloads of 8, 32 and 64 short trajectories; returns the path."""
  rows = [
    {"prompt_len": 15 + i % 3, "turns": [[3, 20 + i % 5], [2, 0]][i % 2 :]}
    for i in range(64)
  ]
  found = {str(n): {"trajectories": rows[:n]} for n in (8, 32, 64)}
  path = folder / "workload.json"
  path.write_text(json.dumps({"workloads": found}))
  return str(path)
