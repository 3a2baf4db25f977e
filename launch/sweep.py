"""Runs a config's `sweep(add)`: here, N at a time, or on any scheduler.

  python launch/sweep.py --config=configs/quickstart.py --workdir=runs/sweep
  python launch/sweep.py --config=... --workdir=gs://... --dry_run | parallel

Every run gets a numbered folder; the same command resumes what was interrupted
and skips what is finished. A table and a plot over the sweep (`sweep.png`) end
it. --dry_run prints one command a line instead.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from absl import app, flags

_CONFIG = flags.DEFINE_string("config", None, "Config file with a sweep(add).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run folders.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time.",
                                 lower_bound=1)
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
  return [
    (f"{number:03d}_{name}", arguments)
    for number, (name, arguments) in enumerate(found.items())
  ]


def table(workdir: pathlib.Path, names: Sequence[str]) -> str:
  """Summaries of the finished runs, one a line."""
  columns = ("em_before", "em_after", "f1_after", "searches_per_question",
             "train_seconds")
  lines = [f"{'run':40}" + "".join(f"{c:>24}" for c in columns)]
  for name in names:
    summary = json.loads((workdir / name / "summary.json").read_text())
    lines.append(
      f"{name:40}" + "".join(f"{summary[c]:24.3f}" for c in columns)
    )
  return "\n".join(lines)


def plot(workdir: pathlib.Path, names: Sequence[str]) -> None:
  """Draws the reward curves and the final scores of all runs."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, (curves, bars) = plt.subplots(
    1, 2, figsize=(14, 5), layout="constrained"
  )
  before, after = [], []
  for name in names:
    lines = (workdir / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    points = [(r["step"], r["critic/score/mean"]) for r in records
              if "critic/score/mean" in r]
    if points:
      curves.plot(*zip(*points, strict=True), label=name)
    summary = json.loads((workdir / name / "summary.json").read_text())
    before.append(summary["em_before"])
    after.append(summary["em_after"])
  curves.set(title="reward per question", xlabel="step")
  curves.legend(fontsize=7)
  places = range(len(names))
  bars.barh([p + 0.2 for p in places], before, 0.4, label="before")
  bars.barh([p - 0.2 for p in places], after, 0.4, label="after")
  bars.set_yticks(list(places), names, fontsize=7)
  bars.set(title="held-out EM")
  bars.legend()
  figure.savefig(workdir / "sweep.png", dpi=100)
  plt.close(figure)


def _run(workdir: pathlib.Path, name: str, command: list[str],
         quiet: bool) -> int:
  """Exit code of one run; its output goes to a file if others run beside it."""
  if (workdir / name / "summary.json").exists():
    return 0
  print(f"[{name}] {shlex.join(command)}", flush=True)
  if not quiet:
    return subprocess.run(command).returncode
  (workdir / name).mkdir(parents=True, exist_ok=True)
  with (workdir / name / "log.txt").open("a") as log:
    return subprocess.run(command, stdout=log, stderr=log).returncode


def main(argv) -> None:
  """Entry; see the module docstring."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  workdir = pathlib.Path(_WORKDIR.value)
  try:
    planned = runs(_CONFIG.value)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  names = [name for name, _ in planned]
  # As a string: a bucket path must keep both slashes of its scheme.
  base = _WORKDIR.value.rstrip("/")
  commands = [
    [sys.executable, "-m", "stepsearch_jax.train", *arguments,
     f"--workdir={base}/{name}"]
    for name, arguments in planned
  ]
  if _DRY_RUN.value:
    print("\n".join(shlex.join(command) for command in commands))
    return
  with concurrent.futures.ThreadPoolExecutor(_PARALLEL.value) as pool:
    codes = list(pool.map(
      lambda name, command: _run(workdir, name, command, _PARALLEL.value > 1),
      names, commands,
    ))
  finished = [
    name for name in names if (workdir / name / "summary.json").exists()
  ]
  print("\n" + table(workdir, finished))
  if finished:
    plot(workdir, finished)
  failed = [
    f"{name} (code {code})" for name, code in zip(names, codes, strict=True)
    if code
  ]
  if failed:
    sys.exit(f"error: {', '.join(failed)} did not finish; the same command "
             "goes on from there")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
