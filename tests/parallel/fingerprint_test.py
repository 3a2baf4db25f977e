"""Fingerprints tell parameters apart, wherever they lie."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch_jax.parallel.fingerprint import fingerprint


def tree(dtype=np.float32):
  values = np.random.default_rng(0).normal(size=(8, 6))
  return {"a": {"kernel": values.astype(dtype)}, "b": np.ones(4, dtype)}


def test_host_and_device_arrays_have_one_fingerprint():
  want = fingerprint(tree())
  assert len(want) == 16
  assert fingerprint(jax.tree.map(jnp.asarray, tree())) == want


SHARDED = """
import fingerprint_test
from stepsearch_jax.parallel import sharding
mesh = sharding.make_mesh(data=2, fsdp=2)
placed = sharding.put(fingerprint_test.tree(), {
  "a": {"kernel": sharding.named(mesh, ("embed", None), (8, 6))},
  "b": sharding.replicated(mesh),
})
assert not placed["a"]["kernel"].is_fully_replicated
print(fingerprint_test.fingerprint(placed))
"""


def test_sharded_arrays_have_the_same_one():
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "PYTHONPATH": os.pathsep.join((
      os.environ["PYTHONPATH"], str(pathlib.Path(__file__).parent)
    )),
  }
  found = subprocess.run(
    [sys.executable, "-c", SHARDED], env=environment, check=True,
    capture_output=True, text=True,
  )
  assert found.stdout.strip() == fingerprint(tree())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_one_bit_changes_the_fingerprint(dtype):
  other = tree(dtype)
  kernel = other["a"]["kernel"]
  kernel[7, 5] = np.nextafter(kernel[7, 5], kernel.dtype.type(9))
  assert fingerprint(other) != fingerprint(tree(dtype))


def moved(found):
  found["a"]["kernel"][[0, 1]] = found["a"]["kernel"][[1, 0]]
  return found


@pytest.mark.parametrize("change", [
  moved,
  lambda found: {**found, "b": np.append(found["b"], np.float32(0))},
  lambda found: {**found, "b": found["b"].view(np.int32)},
  lambda found: {"a": found["a"], "c": found["b"]},
  lambda found: {**found, "b": -found["b"]},
  lambda found: {"a": {"kernel": found["a"]["kernel"].T}, "b": found["b"]},
])
def test_places_shapes_types_names_and_signs_count(change):
  assert fingerprint(change(tree())) != fingerprint(tree())


def test_no_parameters_have_a_fingerprint_too():
  assert fingerprint(None) == fingerprint({})
