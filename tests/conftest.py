"""Shared fixtures: strict promotion, float32 matmuls, the shared data."""

import os
import pathlib

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_dtype_promotion", "strict")

_DEFAULT_SHARED = pathlib.Path(__file__).parents[2] / "shared"


@pytest.fixture
def compilations():
  """A list that grows by one entry whenever XLA compiles a program."""
  compiled = []

  def hears(name, seconds, **unused):
    del seconds, unused
    if name.endswith("backend_compile_duration"):
      compiled.append(name)

  jax.monitoring.register_event_duration_secs_listener(hears)
  jax.jit(lambda x: x * 3)(1.0)
  assert len(compiled) == 1, "compilations are reported under another name"
  compiled.clear()
  yield compiled
  jax.monitoring.unregister_event_duration_listener(hears)


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """Recorded golden outputs and real data, kept outside the project."""
  path = pathlib.Path(os.environ.get("STEPSEARCH_SHARED", _DEFAULT_SHARED))
  if not path.is_dir():
    pytest.skip(f"shared data absent: set STEPSEARCH_SHARED (tried {path})")
  return path
