"""Shared fixtures: strict promotion, float32 matmuls, the shared data."""

import atexit
import os
import pathlib
import shutil
import tempfile

import jax
import pytest
from absl import flags

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A program that several tests, workers or commands compile is compiled once per
# session: the first of them leaves it in a folder that goes with the session.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
if _CACHE not in os.environ:
  os.environ[_CACHE] = tempfile.mkdtemp(prefix="stepsearch_jax_xla_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  atexit.register(shutil.rmtree, os.environ[_CACHE], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ[_CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# Commands define flags of the same name (config, input, ...). Each is a process
# of its own; only here do several share one, where the last definition counts.
_define = flags.FlagValues.__setitem__


def _define_again(self, name, flag):
  if name in self:
    delattr(self, name)
  _define(self, name, flag)


flags.FlagValues.__setitem__ = _define_again

# So that commands which tests start find the package from any folder.
_ROOT = pathlib.Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
  filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))
)
_DEFAULT_SHARED = _ROOT.parent / "shared"


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
