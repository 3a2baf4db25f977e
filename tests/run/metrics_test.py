"""The compilation counter against programs that are known to be new or old;
what goes to wandb.
"""

import gc
import sys
import types

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


def test_a_resumed_run_goes_on_with_its_page_and_tells_no_secrets(
  tmp_path, monkeypatch
):
  opened = []
  page = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
  fake = types.SimpleNamespace(init=lambda **k: opened.append(k) or page)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  config = {"retrieval": {
    "remote": "https://me:secret@host:81/retrieve?key=hidden", "topk": 3,
  }, "urls": ("http://a:b@c/d",), "seed": 0}
  for folder in ("a", "a", "b"):
    metrics.MetricsWriter(tmp_path / folder, 0, "project", config).close()
  first, again, other = opened
  assert first["id"] == again["id"] != other["id"]
  assert {o["resume"] for o in opened} == {"allow"}
  assert first["config"] == {
    "retrieval": {"remote": "https://host:81/retrieve", "topk": 3},
    "urls": ["http://c/d"], "seed": 0,
  }
