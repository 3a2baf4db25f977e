"""The compilation counter against programs that are known to be new or old."""

import gc

import jax
import jax.numpy as jnp
from jax._src import monitoring  # Only here: the public module has no getter.

from stepsearch_jax.run import metrics


def test_every_new_shape_counts_once_and_a_known_one_never():
  program = jax.jit(lambda x: x * 2 + 1)
  ones = {n: jax.block_until_ready(jnp.ones(n)) for n in (3, 5)}
  program(ones[3])
  counter = metrics.Compilations()
  program(ones[3])
  assert counter.take() == 0
  program(ones[5])
  assert counter.take() == 1
  assert counter.take() == 0


def test_a_counter_leaves_no_listener_behind():
  listeners = monitoring.get_event_duration_listeners
  before = len(listeners())
  counter = metrics.Compilations()
  assert len(listeners()) == before + 1
  del counter
  gc.collect()
  assert len(listeners()) == before


def test_a_stopwatch_also_has_the_whole():
  watch = metrics.Stopwatch()
  with watch.time("gen"):
    pass
  found = watch.metrics()
  assert set(found) == {"timing_s/gen", "timing_s/step"}
  assert 0 <= found["timing_s/gen"] <= found["timing_s/step"]
