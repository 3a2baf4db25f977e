"""Readings of a finished training run, from what it logged.

How far a step is from its own arithmetic compares the run's seconds with this
machine's rate, so it is to be read on the machine of the run, with nothing
beside it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.bench import accelerator, duel
from stepsearch_jax.models import decoder
from stepsearch_jax.plan import arithmetic
from stepsearch_jax.run import plots, saved

_WARM_UP, _STEPS = 4, 20
_SIDE = 4096  # Of the matrices whose product shows what the machine can do.


def gemm_rate(side: int) -> float:
  """Measures the machine's rate in a large float32 matrix product.

  Args:
    side: of both square matrices.

  Returns:
    FLOPs per second, the best of three products.
  """
  product = jax.jit(functools.partial(jnp.matmul, precision="highest"))
  given = jnp.ones((side, side), jnp.float32)
  jax.block_until_ready(product(given, given))  # Compiles.
  seconds = []
  for _ in range(3):
    began = time.perf_counter()
    jax.block_until_ready(product(given, given))
    seconds.append(time.perf_counter() - began)
  return 2.0 * side**3 / min(seconds)


def step_flops(
  record: dict[str, float], shape: decoder.DecoderConfig, rows: int, epochs: int
) -> dict[str, float]:
  """Counts the model FLOPs of a training step by phase.

  Matrix products and attention of what a step has to know: the policy reads
  or writes every token once, each model that scores reads it once, and an
  epoch is three passes of each model that is trained (a backward pass is
  two). The vocabulary is for sampled tokens only. Padding, recomputed
  activations, probes and the optimizer are not counted; a prefix that is
  computed once for several trajectories counts in each of them.

  Args:
    record: what the step logged.
    shape: of the models; all of each is trained.
    rows: trajectories of the step.
    epochs: times that it trains on them.

  Returns:
    FLOPs of "rollout", "scores" and "update".
  """
  length = record["perf/total_num_tokens"] / rows
  sampled = record["response_length/mean"] * rows
  policy = accelerator.forward_flops(shape, rows, length, sampled)
  value = accelerator.forward_flops(shape, rows, length, 0)
  value *= "timing_s/values" in record
  scored = sum(f"timing_s/{name}" in record for name in ("old_log_prob", "ref"))
  return {
    "rollout": policy,
    "scores": scored * policy + value,
    "update": 3.0 * epochs * (policy + value),
  }


def _own_arithmetic(
  path: str, steps: list[dict], work: str
) -> Iterator[duel.Reading]:
  """How many times longer steps took than their FLOPs at the GEMM rate."""
  config = saved.get_config(path)
  rows = config.batch.questions * config.batch.rollouts
  shape = arithmetic.model_shape(config)
  flops = [
    step_flops(record, shape, rows, config.ppo.epochs) for record in steps
  ]
  parts: dict[str, list[float]] = {
    "step": [sum(found.values()) for found in flops],
    "update": [found["update"] for found in flops],
  }

  def times(name):
    took = [record[f"timing_s/{name}"] for record in steps]
    each = [s / f for s, f in zip(took, parts[name], strict=True)]
    return statistics.median(each) * gemm_rate(_SIDE)

  work += f", {rows} trajectories each"
  for name, goal in (("step", "at most 1.8, aim 1.4"), ("update", "")):
    yield duel.Reading(
      f"{name} beside its own arithmetic", work,
      functools.partial(times, name), goal=goal, unit="x",
    )
  yield duel.Reading(
    "float32 matrix product", f"{_SIDE} x {_SIDE}",
    lambda: gemm_rate(_SIDE) / 1e9, unit="GFLOP/s",
  )


def readings(path: str | None) -> Iterator[duel.Reading]:
  """Recompilations and speed of a run's steps.

  Args:
    path: folder of the run.

  Raises:
    UserError: the run is absent or too short.
  """
  if path is None:
    raise types.UserError(
      "--suite=training reads a run: --input=runs/quickstart"
    )
  records = plots.read_metrics(epath.Path(path) / "metrics.jsonl")
  steps = [
    record for record in records
    if _WARM_UP < record["step"] <= _WARM_UP + _STEPS
  ]
  if len(steps) < _STEPS:
    raise types.UserError(
      f"{path} has {len(steps)} steps after the first {_WARM_UP}, "
      f"{_STEPS} are needed"
    )
  work = f"{_STEPS} training steps of {epath.Path(path).name}"
  for what, name, unit, total, goal in (
    ("recompilations after warm-up", "perf/compilations", "", sum, "0"),
    ("rollout, sampled and ingested tokens a second",
     "perf/tokens_per_second", "", statistics.median, ""),
  ):
    values = [record[name] for record in steps]
    found: Any = functools.partial(total, values)
    yield duel.Reading(what, work, found, goal=goal, unit=unit)
  yield from _own_arithmetic(path, steps, work)
