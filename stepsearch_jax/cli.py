"""How every command starts and fails: flags, quiet logs, one-line errors."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence

# Read when transformers is imported: no note that torch is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
from absl import app, flags, logging
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.parallel import distributed
from stepsearch_jax.run import interrupts, metrics
from stepsearch_jax.run import monitor as sentinel

_MULTIHOST = flags.DEFINE_bool(
  "multihost", False,
  "One of several processes; which one, the environment says (TPU pod, SLURM, "
  "GKE, MPI).",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None,
  "host:port of process 0, where the environment does not say it.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes; goes with --coordinator."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which one this is; goes with --coordinator."
)
_SHARED_FLAGS = [
  flags.FLAGS[name]
  for name in ("multihost", "coordinator", "num_processes", "process_id")
]

# Fields of earlier versions.
_RENAMED = {
  "wandb_project": "it is log.project now, with log.tracker = wandb or trackio",
}

# What a user can mend (a setting, a full disk, a collapse); anything else is a
# bug and keeps its traceback.
_USER_ERRORS = (
  types.UserError, OSError, metrics.NonFiniteError, sentinel.CollapseError,
)


def run(
  main: Callable[..., int | None], required: Sequence[str] = (),
  arguments: bool = False,
) -> None:
  """Parses flags and runs a command.

  Bad input ends in one line on stderr and exit code 1 (`--verbosity=1` adds
  the traceback), a preempted run in exit code 75, Ctrl-C elsewhere in one line.

  Args:
    main: the command; its return value is the exit code.
    required: flags that must be given.
    arguments: the command takes words behind its flags, as a list.
  """
  flags.mark_flags_as_required(required)
  app.run(
    lambda argv: _guarded(main, argv, arguments),
    flags_parser=functools.partial(_parse, main),
  )


def _cache_compilations() -> None:
  """Keeps compiled programs for the next start, where only the user reads."""
  if jax.config.values["jax_compilation_cache_dir"] is not None:
    return
  folder = epath.Path("~/.cache/stepsearch_jax/xla").expanduser()
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  except OSError as error:
    logging.info("no compilation cache: %s", error)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))


def _value(argv: Sequence[str], name: str) -> str | None:
  """Value of --name=value or --name value, before flags are parsed."""
  for i, argument in enumerate(argv):
    for dashes in ("--", "-"):
      if argument == dashes + name and i + 1 < len(argv):
        return argv[i + 1]
      if argument.startswith(f"{dashes}{name}="):
        return argument.partition("=")[2]
  return None


def _with_found_config(argv: Sequence[str]) -> list[str]:
  """Adds a config where none is given: that of --workdir, or of --model."""
  if "config" not in flags.FLAGS or _value(argv, "config"):
    return list(argv)
  run = epath.Path(__file__).parent / "run"
  workdir, model = _value(argv, "workdir"), _value(argv, "model")
  if workdir and (epath.Path(workdir) / "config.json").exists():
    return [argv[0], f"--config={run / 'saved.py'}:{workdir}", *argv[1:]]
  if model and "index" in flags.FLAGS:
    find_config("common")  # Can be imported from now on.
    return [argv[0], f"--config={run / 'exported.py'}:{model}", *argv[1:]]
  return list(argv)


def _config_folders() -> list[epath.Path]:
  """Where configs are looked for by name: here, a checkout, an installation."""
  package = epath.Path(__file__).parent
  return [
    epath.Path("configs"), package.parent / "configs",
    package / "shipped" / "configs",
  ]


def find_config(value: str) -> str:
  """Returns the path of a config that is given by name or by path.

  Its neighbors can be imported as `configs` afterwards. Ends the program where
  there is no such config.

  Args:
    value: NAME or a path, perhaps with :argument, which stays.
  """
  name, colon, argument = value.partition(":")
  if not (name.endswith(".py") and epath.Path(name).exists()):
    stem = epath.Path(name).name.removesuffix(".py")
    folders = [f for f in _config_folders() if (f / f"{stem}.py").exists()]
    if not folders:
      known = sorted({
        path.stem for folder in _config_folders() if folder.exists()
        for path in folder.glob("*.py")
        if path.stem not in ("__init__", "arguments", "common")
      })
      near = difflib.get_close_matches(stem, known, 1)
      sys.exit(
        f"error: --config={value}: there is no such config; "
        + (f"did you mean {near[0]}?" if near else f"there are {known}")
      )
    name = str(folders[0] / f"{stem}.py")
  sys.path.insert(0, str(epath.Path(name).parent.resolve().parent))
  return f"{name}{colon}{argument}"


def _with_config_path(argv: Sequence[str]) -> list[str]:
  """Replaces --config=NAME[:argument] by the path of a shipped config."""
  value = _value(argv, "config")
  if value is None:
    return list(argv)
  given = ("--config", "-config")
  rest = [
    a for i, a in enumerate(argv)
    if i and a not in given and argv[i - 1] not in given
    and not a.startswith(tuple(f"{flag}=" for flag in given))
  ]
  # In front, because overrides of fields are refused before it.
  return [argv[0], f"--config={find_config(value)}", *rest]


def help_if_asked(main: Callable, argv: Sequence[str]) -> None:
  """Prints what a command does and its flags, and ends it, if asked to."""
  if not {"--help", "-h", "-help", "--helpshort"} & set(argv):
    return
  module = sys.modules[main.__module__]
  print((module.__doc__ or "").strip(), "\n\nflags:")
  own = flags.FLAGS.get_key_flags_for_module(module.__name__) or (
    flags.FLAGS.get_key_flags_for_module(sys.argv[0])
  )
  for flag in [*own, *_SHARED_FLAGS]:
    default = "" if flag.default in (None, False, "") else (
      f" (default {flag.default_as_str})"
    )
    if flag.name.startswith("config."):
      continue
    print(f"  --{flag.name}\n" + textwrap.fill(
      (flag.help or "") + default, 76, initial_indent="      ",
      subsequent_indent="      ",
    ))
  sys.exit(0)


def _unknown_field(error: Exception, argv: Sequence[str]) -> str:
  """Returns the line about an override of a field that no config has."""
  # ml_collections: a name in quotes, perhaps 'Did you mean "policy_lr" ...'.
  text = str(error.args[0])
  field = re.findall(r"\w+", text)[0]
  near = re.search('Did you mean "([^"]+)"', text)
  wrong = [arg for arg in argv if f".{field}" in arg]
  known = f"did you mean {near[1]}?" if near else "see configs/README.md"
  return (f"{' '.join(wrong) or field}: the config has no field {field!r}; "
          f"{_RENAMED.get(field, known)}")


def _wrong_flags(error: flags.Error) -> str:
  """Returns what is wrong with flags, in one line.

  Of a config that refuses its argument, its own error; of one that is broken,
  the whole traceback.
  """
  # ml_collections raises the error of a config once more, with the traceback
  # as its text; where a class takes more than a text, that is a TypeError.
  own = getattr(error.__context__, "__context__", None)
  if own is not None and str(error).startswith("flag --config="):
    return f"--config: {own}" if isinstance(own, ValueError) else str(error)
  lines = [
    re.sub(r"^flag (--\S+)=None: .* other than None\.", r"\1 is missing",
           line.strip())
    for line in str(error).splitlines()
  ]
  return "; ".join([*lines, "--help shows the flags"])


def _parse(main: Callable, argv: Sequence[str]) -> list[str]:
  help_if_asked(main, argv)
  argv = _with_found_config(_with_config_path(argv))
  sys.argv[:] = argv  # Where ml_collections looks for overrides of fields.
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    sys.exit(f"error: {_wrong_flags(error)}")
  except (AttributeError, KeyError) as error:
    sys.exit(f"error: {_unknown_field(error, argv)}")


def _guarded(
  main: Callable, argv: Sequence[str], arguments: bool
) -> int | None:
  if len(argv) > 1 and not arguments:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  metrics.quiet_libraries()
  try:
    if _MULTIHOST.value or _COORDINATOR.value:
      distributed.initialize(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
      )
    _cache_compilations()
    return main(list(argv[1:])) if arguments else main()
  except interrupts.PreemptedError as error:
    stopped = str(error)
  except KeyboardInterrupt:
    sys.exit("interrupted")
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    # Leaving in order would wait for the process that is gone.
    logging.error(
      "a collective failed, so another process of this run is gone (%s); the "
      "same command on all of them resumes", types.first_line(error)[:200],
    )
    logging.flush()
    os._exit(interrupts.EXIT_PREEMPTED)
  except _USER_ERRORS as error:
    logging.debug("where it happened", exc_info=True)
    sys.exit(f"error: {error}")
  # The frames that were left are gone here, and with them their progress bars,
  # which write once more as they end.
  logging.warning("%s%s", stopped, interrupts.how_to_go_on())
  return interrupts.EXIT_PREEMPTED
