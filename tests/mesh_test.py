"""Every mesh of eight virtual devices trains and plays the same."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOISE = 1e-6  # A hundred times Adam's epsilon.
MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]


def launch(folder, mesh):
  """Starts the worker in its own process: device counts are fixed at start."""
  count = int(np.prod(mesh))
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
  }
  output = folder / ("x".join(map(str, mesh)) + ".npz")
  worker = str(ROOT / "tests/mesh_worker.py")
  process = subprocess.Popen(
    [sys.executable, worker, str(output), *map(str, mesh)], env=environment,
    stderr=subprocess.PIPE, text=True,
  )
  return process, output


def result(process, output):
  _, errors = process.communicate(timeout=900)
  assert process.returncode == 0, errors[-3000:]
  return dict(np.load(output))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
  return result(*launch(tmp_path_factory.mktemp("single"), (1, 1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_mesh_gives_the_same_rollouts_and_update(single, tmp_path, mesh):
  ours = result(*launch(tmp_path, mesh))
  assert single["sampled/searches"] > 4  # The comparison covers searches.
  for name in ("greedy", "sampled"):
    np.testing.assert_array_equal(
      ours[f"{name}/tokens"], single[f"{name}/tokens"], name
    )
  for name, want in single.items():
    if name.endswith("/probe"):
      np.testing.assert_allclose(ours[name], want, rtol=1e-4, atol=1e-4,
                                 err_msg=name)
    elif name.startswith("metric/"):
      np.testing.assert_allclose(ours[name], want, rtol=1e-4, atol=1e-5,
                                 err_msg=name)
    elif name.startswith("gradient/"):
      np.testing.assert_allclose(
        ours[name], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=name
      )
    elif name.startswith(("policy", "value")):
      # Adam divides by |gradient| + 1e-8: an entry whose gradient is rounding
      # noise moves by that noise, so there the gradient is what must agree.
      size = np.abs(single[f"gradient/{name}"])
      kept = (size == 0) | (size > NOISE)
      assert kept.mean() > 0.95, name
      np.testing.assert_allclose(
        ours[name][kept], want[kept], atol=1e-5, err_msg=name
      )
  spread = [bool(ours[name]) for name in ours if name.startswith("replicated")]
  if mesh[1] * mesh[2] > 1:
    assert not all(spread), "no parameter is sharded on this mesh"
