"""The rules table: what is split, what stays whole, what is refused."""

import logging
import os
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from absl import logging as absl_logging

from stepsearch_jax import types
from stepsearch_jax.models import heads
from stepsearch_jax.parallel import sharding


def spec(mesh, names, shape):
  """What each dimension is split over, as plain tuples."""
  found = sharding.named(mesh, names, shape).spec
  return tuple(
    (axes,) if isinstance(axes, str) else axes or () for axes in found
  )


# (2, 3, 4) has another number on each axis, so that none stands for another.
MESH = sharding.abstract_mesh(2, 3, 4)


@pytest.mark.parametrize("names, shape, expected", [
  (("batch", "length"), (6, 5), (("data", "fsdp"), ())),
  (("vocab", "embed"), (8, 9), (("tensor",), ("fsdp",))),
  (("embed", "heads", "head_dim"), (9, 4, 4), (("fsdp",), ("tensor",), ())),
  (("layers", "embed", "mlp"), (12, 9, 8), ((), ("fsdp",), ("tensor",))),
  ((None, "slots"), (12, 12), ((), ("data", "fsdp"))),
  # What does not divide stays whole, the other dimensions do not.
  (("vocab", "embed"), (9, 9), ((), ("fsdp",))),
  (("batch", "heads"), (4, 8), ((), ("tensor",))),
])
def test_dimensions_are_split_by_the_table(names, shape, expected):
  assert spec(MESH, names, shape) == expected


def test_what_does_not_divide_is_logged_once_with_both_numbers(caplog):
  sharding._say_whole.cache_clear()
  absl_logging.use_absl_handler()
  with caplog.at_level(logging.WARNING, logger="absl"):
    for _ in range(3):
      spec(MESH, ("kv_heads", "embed"), (2, 9))
    spec(MESH, ("kv_heads",), (8,))
  assert [record.getMessage() for record in caplog.records] == [
    "kv_heads = 2 is not divisible by mesh tensor = 4: every device holds all "
    "of it"
  ]


def test_a_mesh_axis_never_splits_two_dimensions():
  with pytest.raises(types.UserError) as error:
    spec(MESH, ("batch", "embed"), (6, 9))
  assert "both batch and embed over the mesh axis fsdp" in str(error.value)
  # Also where it would make no difference on this mesh: another may follow.
  with pytest.raises(types.UserError, match="both vocab and mlp over"):
    spec(sharding.abstract_mesh(1, 1, 1), ("vocab", "mlp"), (8, 8))


def test_an_axis_without_a_rule_is_named():
  with pytest.raises(types.UserError, match="'width' is not in sharding.RULES"):
    spec(MESH, ("width",), (8,))


def test_rules_can_be_changed_one_by_one():
  mesh = sharding.abstract_mesh(2, 3, 4, "vocab=fsdp, mlp=fsdp+tensor,embed=")
  assert spec(mesh, ("vocab", "embed"), (9, 8)) == (("fsdp",), ())
  assert spec(mesh, ("embed", "mlp"), (9, 24)) == ((), ("fsdp", "tensor"))
  assert spec(mesh, ("heads",), (8,)) == (("tensor",),)  # As before.


@pytest.mark.parametrize("text, message", [
  ("width=fsdp", "AXIS one of batch, slots, .*, got 'width=fsdp'"),
  ("vocab", "expected AXIS=MESH_AXES .* got 'vocab'"),
  ("vocab=model", "vocab must be split over axes of data .* got 'model'"),
  ("vocab=fsdp+fsdp", "each once, got 'fsdp.fsdp'"),
])
def test_rules_that_mean_nothing_are_refused(text, message):
  with pytest.raises(types.UserError, match=message):
    sharding.parse_rules(text)


@pytest.mark.parametrize("rules, rows", [
  ("", 4), ("batch=data", 12), ("batch=data+tensor", 3), ("batch=", 24),
])
def test_batches_are_split_by_their_rule(rules, rows):
  found = sharding.batch(sharding.abstract_mesh(2, 3, 4, rules))
  assert found.shard_shape((24, 5)) == (rows, 5)


def test_changed_rules_hold_while_tracing():
  mesh = sharding.make_mesh(1, 1, 1, "heads=data", devices=jax.devices()[:1])
  with sharding.scope(mesh):
    assert dict(sharding._rules_in_scope()) == dict(mesh.rules)
    # The form that flax expects: names, tuples of several, None.
    flax = dict(nn.get_logical_axis_rules())
  assert (flax["heads"], flax["mlp"]) == ("data", "tensor")
  assert (flax["batch"], flax["norm"]) == (("data", "fsdp"), None)


def test_decoding_gathers_what_is_split_over_fsdp_and_nothing_else():
  mesh = sharding.abstract_mesh(2, 3, 4, "mlp=fsdp+tensor,embed=,vocab=data")
  shapes = {"a": jax.ShapeDtypeStruct((8, 24), np.float32)}
  placed = sharding.decode_shardings(mesh, {"a": ("vocab", "mlp")}, shapes)
  assert tuple(placed["a"].spec) == ("data", "tensor")
  placed = sharding.decode_shardings(MESH, {"a": ("mlp", "embed")}, shapes)
  assert tuple(placed["a"].spec) == ("tensor", None)


@pytest.mark.parametrize("given, expected", [
  ((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 2, 4), (1, 2, 4)),
])
def test_minus_one_takes_the_devices_that_are_left(given, expected):
  assert sharding.mesh_shape(8, *given) == expected
  with pytest.raises(types.UserError, match="needs 3 devices, there are 8"):
    sharding.mesh_shape(8, 3, 1, 1)


def test_every_model_can_be_placed_by_the_table():
  import fakes

  model = fakes.make_model(512, num_heads=4, num_kv_heads=4)
  policy = jax.eval_shape(lambda: fakes.make_policy(model))
  mesh = sharding.abstract_mesh(1, 2, 4)
  placed = sharding.tree_shardings(mesh, heads.logical_axes(model), policy)
  split = [any(leaf.spec) for leaf in jax.tree.leaves(placed)]
  assert sum(split) > len(split) / 2


DONATES = """
import jax, numpy as np
from stepsearch_jax.parallel import sharding
mesh = sharding.make_mesh(1, 2, 1)
everywhere = sharding.named(mesh, (None,), (4,))
source = jax.numpy.arange(4.0)
first, second = (sharding.put(source, everywhere) for _ in range(2))
jax.jit(lambda x: x + 1, donate_argnums=0)(first)
assert first.is_deleted()
for kept in (source, second):
  np.testing.assert_array_equal(kept, np.arange(4.0))
"""


def test_donating_what_was_placed_frees_neither_source_nor_twin():
  done = subprocess.run(
    [sys.executable, "-c", DONATES], capture_output=True, text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
  )
  assert done.returncode == 0, done.stderr[-2000:]
