"""Each device projects its own tokens onto the vocabulary, and no others."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("mesh", [
  (2, 2),
  pytest.param((4, 1), marks=pytest.mark.slow),
  pytest.param((1, 4), marks=pytest.mark.slow),
], ids=str)
def test_no_device_computes_the_logits_of_another(mesh):
  done = subprocess.run(
    [sys.executable, str(ROOT / "tests/ppo/vocabulary_worker.py"),
     *map(str, mesh)],
    env=os.environ | {
      "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4",
      "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    },
    capture_output=True, text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  # Forward and backward: 8 rows of 192 tokens over 4 devices.
  assert found == {"rows": [384, 384], "collectives": []}
