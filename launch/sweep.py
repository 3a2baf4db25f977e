"""Runs a config's `sweep(add)`, one run after the other.

  python launch/sweep.py --config=configs/quickstart.py --workdir=runs/sweep
  python launch/sweep.py --config=configs/quickstart.py --workdir=W --dry_run

Every run gets a folder of its own; the same command resumes what was
interrupted and skips what is finished. A table of all summaries ends it.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping

from absl import app, flags

_CONFIG = flags.DEFINE_string("config", None, "Config file with a sweep(add).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run folders.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands only.")


def flatten(overrides: Mapping, prefix: str = "") -> dict[str, object]:
  """{"ppo": {"lr": 1}} to {"ppo.lr": 1}."""
  flat = {}
  for name, value in overrides.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat


def runs(path: str) -> list[tuple[str, list[str]]]:
  """(name, flags) of every run that the config's sweep adds.

  Raises:
    ValueError: the file has no sweep, or it sets a field that does not exist.
  """
  spec = importlib.util.spec_from_file_location("sweep_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "sweep"):
    raise ValueError(f"{path} has no sweep(add)")
  found: dict[str, list[str]] = {}

  def add(arg: str = "", **overrides):
    flat = flatten(overrides)
    config = module.get_config(arg or None)
    for field in flat:
      node = config
      for key in field.split("."):
        if key not in node:
          raise ValueError(f"{path}: sweep sets {field}, which is no field")
        node = node[key]
    parts = [arg.replace("=", "-").replace(",", "_")] if arg else []
    parts += [f"{k.rsplit('.')[-1]}-{v}" for k, v in flat.items()]
    name = "_".join(parts) or "default"
    if name in found:
      raise ValueError(f"{path}: sweep adds {name} twice")
    found[name] = [f"--config={path}{':' + arg if arg else ''}"] + [
      f"--config.{k}={v}" for k, v in flat.items()
    ]

  module.sweep(add)
  return list(found.items())


def _table(workdir: pathlib.Path, names: list[str]) -> None:
  columns = ("em_before", "em_after", "f1_after", "searches_per_question",
             "train_seconds")
  print(f"\n{'run':40}" + "".join(f"{c:>24}" for c in columns))
  for name in names:
    summary = json.loads((workdir / name / "summary.json").read_text())
    print(f"{name:40}" + "".join(f"{summary[c]:24.3f}" for c in columns))


def main(argv) -> None:
  """Entry; see the module docstring."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  workdir = pathlib.Path(_WORKDIR.value)
  try:
    planned = runs(_CONFIG.value)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  for number, (name, arguments) in enumerate(planned, 1):
    command = [sys.executable, "-m", "stepsearch_jax.train", *arguments,
               f"--workdir={workdir / name}"]
    print(f"[{number}/{len(planned)}] {shlex.join(command)}", flush=True)
    if _DRY_RUN.value or (workdir / name / "summary.json").exists():
      continue
    code = subprocess.run(command).returncode
    if code:
      sys.exit(f"error: run {name} ended with code {code}; the same command "
               "goes on from there")
  if not _DRY_RUN.value:
    _table(workdir, [name for name, _ in planned])


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
