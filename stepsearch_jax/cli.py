"""How every command starts and fails: flags, quiet logs, one-line errors."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from stepsearch_jax import metrics

# Tells a scheduler to run the same command again (BSD's EX_TEMPFAIL).
EXIT_PREEMPTED = 75


class PreemptedError(RuntimeError):
  """The run was asked to stop, has saved, and can go on later."""


# What bad input raises; anything else is a bug and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, metrics.NonFiniteError)


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
    return main()
  except PreemptedError as error:
    logging.warning("%s", error)
    return EXIT_PREEMPTED
  except _USER_ERRORS as error:
    logging.debug("where it happened", exc_info=True)
    sys.exit(f"error: {error}")
