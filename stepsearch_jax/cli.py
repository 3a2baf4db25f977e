"""How every command starts and fails: flags, quiet logs, one-line errors."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.parallel import distributed
from stepsearch_jax.run import metrics
from stepsearch_jax.run import monitor as sentinel

_MULTIHOST = flags.DEFINE_bool(
  "multihost", False,
  "One of several processes; which one, the environment says (TPU pod, SLURM, "
  "GKE, MPI).",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0, where the environment is mute."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With it.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With it.")

# Tells a scheduler to run the same command again (BSD's EX_TEMPFAIL).
EXIT_PREEMPTED = 75


class PreemptedError(RuntimeError):
  """The run was asked to stop, has saved, and can go on later."""


# What a user can mend (a setting, a full disk, a collapse); anything else is a
# bug and keeps its traceback.
_USER_ERRORS = (
  types.UserError, OSError, metrics.NonFiniteError, sentinel.CollapseError,
)


def run(main: Callable[[], int | None], required: Sequence[str] = ()) -> None:
  """Parses flags and runs a command.

  Bad input ends in one line on stderr and exit code 1 (`--verbosity=1` adds
  the traceback), a preempted run in exit code 75.

  Args:
    main: the command; its return value is the exit code.
    required: flags that must be given.
  """
  flags.mark_flags_as_required(required)
  app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def stop_on_sigterm() -> threading.Event:
  """An event that SIGTERM sets, for loops that save before they stop."""
  event = threading.Event()
  signal.signal(signal.SIGTERM, lambda signum, frame: event.set())
  return event


def _cache_compilations() -> None:
  """Keeps compiled programs for the next start, where only the user reads."""
  if jax.config.jax_compilation_cache_dir is not None:
    return
  folder = epath.Path("~/.cache/stepsearch_jax/xla").expanduser()
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  except OSError as error:
    logging.info("no compilation cache: %s", error)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:
    # ml_collections refuses unknown fields with a bare key.
    field = str(error).strip("\"'")
    given = [arg for arg in argv if f".{field}" in arg]
    sys.exit(
      f"error: {' '.join(given) or field}: the config has no field "
      f"{field!r}; all fields are in configs/common.py"
    )


def _guarded(main, argv) -> int | None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  metrics.quiet_libraries()
  try:
    if _MULTIHOST.value or _COORDINATOR.value:
      distributed.initialize(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
      )
    _cache_compilations()
    return main()
  except PreemptedError as error:
    logging.warning("%s", error)
    return EXIT_PREEMPTED
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    # Leaving in order would wait for the process that is gone.
    logging.error(
      "a collective failed, so another process of this run is gone (%s); the "
      "same command on all of them resumes", str(error).splitlines()[0][:200],
    )
    logging.flush()
    os._exit(1)
  except _USER_ERRORS as error:
    logging.debug("where it happened", exc_info=True)
    sys.exit(f"error: {error}")
