"""Runs a config's `sweep(add)`: here, N at a time, or on any scheduler.

  stepsearch sweep --config=quickstart --workdir=runs/sweep \
    --config.total_steps=20
  stepsearch sweep --config=... --workdir=gs://... --dry_run | parallel

Every run gets a numbered folder; the same command resumes what was interrupted
and skips what is finished with the same settings (what was finished with other
settings is started, so that the trainer says what differs). Overrides, and
arguments behind the config's name (configs/x.py:runlocal), go to every run.
Runs of like data, retrieval and tokenizer share what the first of them builds.
A table with means over seeds and a plot (`sweep.png`) end it; both compare all
algorithms by the same numbers, F1 and exact match of the answer. --dry_run
prints one command per line instead.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import importlib.util
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from stepsearch_jax import cli
from stepsearch_jax.run import identity, methods

_CONFIG = flags.DEFINE_string(
  "config", None, "Name or path of a config with a sweep(add), perhaps with "
  ":arguments."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run folders.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time.",
                                 lower_bound=1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands only.")

# Answer F1 of the training rollouts: what every algorithm is meant to raise,
# whatever else its reward holds.
_CURVE = "critic/answer_correct/mean"
_COLUMNS = ("em_before", "em_after", "f1_after", "searches_per_question",
            "train_seconds")
# What of a run's folder depends on these fields alone.
_BUILT = ("world", "tokenizer", "index")
_BUILT_FROM = ("data", "retrieval", "model.reference", "model.tokenizer",
               "model.size.vocab", "rollout.template")


class SweepError(ValueError):
  """A sweep that cannot be planned."""


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a sweep.

  Attributes:
    name: of its folder.
    arm: what it compares: all that the sweep varies except the seed.
    arguments: flags of the trainer, without --workdir.
    config: its settings, nested, with what its method chooses, as the
      trainer will write them into config.json.
  """

  name: str
  arm: str
  arguments: list[str]
  config: dict[str, Any]

  @property
  def built_from(self) -> str:
    """Equal for runs that can share what they build."""
    values = identity.flat(self.config)
    return json.dumps({
      field: value for field, value in sorted(values.items())
      if any(field == f or field.startswith(f + ".") for f in _BUILT_FROM)
    }, default=str)


def _config(path: str, arguments: Sequence[str]) -> ml_collections.ConfigDict:
  """Returns a config with overrides, as the trainer's own flags read them.

  Args:
    path: of the file, for messages.
    arguments: --config=FILE and the overrides of its fields.

  Raises:
    SweepError: a field does not exist, or its value is of another type.
  """
  values = flags.FlagValues()
  argv = [path, *arguments]
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    values(argv)
  except flags.Error as error:
    raise SweepError(f"{path}: {error}") from error
  return values.config


def _check_fields(config: ml_collections.ConfigDict, where: str,
                  fields: Iterable[str]) -> None:
  """Raises a SweepError that names the first field the config lacks."""
  known = identity.flat(config.to_dict())
  for field in fields:
    if field not in known:
      raise SweepError(f"{where} sets {field}, which is no field")


def plan(given: str, overrides: Sequence[str]) -> list[Run]:
  """Returns the runs that a config's sweep adds.

  Args:
    given: path or name of the config, perhaps with :arguments.
    overrides: --config.FIELD=VALUE flags for every run.

  Raises:
    SweepError: the file has no sweep, a field does not exist, or both the
      sweep and an override set it.
  """
  path, _, common = cli.find_config(given).partition(":")
  spec = importlib.util.spec_from_file_location("sweep_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "sweep"):
    raise SweepError(f"{path} has no sweep(add)")
  fixed = dict(
    flag.removeprefix("--config.").split("=", 1) for flag in overrides
  )
  runs: list[Run] = []

  def add(arg: str = "", **varied):
    flat = identity.flat(varied)
    both = sorted(flat.keys() & fixed.keys())
    if both:
      raise SweepError(f"--config.{both[0]}: the sweep itself varies it")
    whole = ",".join(filter(None, (common, arg)))
    base = module.get_config(whole or None)
    _check_fields(base, "the command", fixed)
    _check_fields(base, f"{path}: sweep", flat)
    arguments = [f"--config={path}{':' + whole if whole else ''}"]
    arguments += [f"--config.{k}={v}" for k, v in flat.items()]
    config = methods.filled(_config(path, [*arguments, *overrides]))
    name = _name(arg, flat)
    if any(run.name.partition("_")[2] == name for run in runs):
      raise SweepError(f"{path}: sweep adds {name} twice")
    seedless = {k: v for k, v in flat.items() if k != "seed"}
    runs.append(Run(
      f"{len(runs):03d}_{name}", _name(arg, seedless),
      [*arguments, *overrides], config.to_dict(),
    ))

  module.sweep(add)
  return runs


def _name(arg: str, flat: Mapping[str, object]) -> str:
  parts = [arg.replace("=", "-").replace(",", "_")] if arg else []
  parts += [f"{k.rsplit('.')[-1]}-{v}" for k, v in flat.items()]
  return "_".join(parts) or "default"


def _json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text())


def table(workdir: pathlib.Path, runs: Sequence[Run]) -> str:
  """Summaries of the finished runs, one per line, then means over seeds."""
  width = max([len(run.name) for run in runs] + [24]) + 2
  lines = [f"{'run':{width}}" + "".join(f"{c:>24}" for c in _COLUMNS)]
  arms: dict[str, list[dict]] = collections.defaultdict(list)
  for run in runs:
    summary = _json(workdir / run.name / "summary.json")
    arms[run.arm].append(summary)
    lines.append(f"{run.name:{width}}" + "".join(
      f"{summary[c]:24.3f}" for c in _COLUMNS
    ))
  lines.append(f"\n{'mean over seeds (+- deviation)':{width}}")
  for arm, found in arms.items():
    cells = ""
    for column in _COLUMNS:
      values = [summary[column] for summary in found]
      spread = statistics.stdev(values) if len(values) > 1 else 0.0
      cells += f"{statistics.mean(values):15.3f} +- {spread:5.3f}"
    lines.append(f"{arm + f' ({len(found)})':{width}}{cells}")
  return "\n".join(lines)


def plot(workdir: pathlib.Path, runs: Sequence[Run]) -> None:
  """Draws learning curves and final scores, one color per arm."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
  arms = list(dict.fromkeys(run.arm for run in runs))
  finals: dict[str, list[float]] = collections.defaultdict(list)
  for run in runs:
    text = (workdir / run.name / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    color = f"C{arms.index(run.arm) % 10}"
    label = None if run.arm in finals else run.arm
    for axis, metric in ((axes[0], _CURVE), (axes[1], "val/em")):
      points = [(r["step"], r[metric]) for r in records if metric in r]
      if points:
        axis.plot(*zip(*points, strict=True), color=color, label=label)
    finals[run.arm].append(
      _json(workdir / run.name / "summary.json")["em_after"]
    )
  axes[0].set(title="F1 of the training rollouts' answers", xlabel="step")
  axes[0].legend(fontsize=7)
  axes[1].set(title="exact match, held-out questions", xlabel="step")
  for place, arm in enumerate(arms):
    axes[2].barh(place, statistics.mean(finals[arm]), color=f"C{place % 10}")
    axes[2].plot(finals[arm], [place] * len(finals[arm]), "k.")
  axes[2].set_yticks(range(len(arms)), arms, fontsize=7)
  axes[2].set(title="held-out exact match after training, mean over seeds")
  figure.savefig(workdir / "sweep.png", dpi=100)
  plt.close(figure)


class Builder:
  """Lets runs of like data and retrieval build world and index once."""

  def __init__(self, workdir: pathlib.Path):
    """Knows of no run yet."""
    self._workdir = workdir
    self._lock = threading.Lock()
    self._leaders: dict[str, str] = {}
    self._done: set[str] = set()

  def prepare(self, run: Run) -> None:
    """Links what an earlier run has built; waits until it has."""
    with self._lock:
      leader = self._leaders.setdefault(run.built_from, run.name)
    if leader == run.name:
      return
    theirs, ours = self._workdir / leader, self._workdir / run.name
    while not (
      leader in self._done or (theirs / "metrics.jsonl").exists()
      or (theirs / "index/manifest.json").exists()
    ):
      time.sleep(0.1)
    ours.mkdir(parents=True, exist_ok=True)
    for name in _BUILT:
      if (theirs / name).exists() and not (ours / name).exists():
        (ours / name).symlink_to(pathlib.Path("..") / leader / name)

  def finish(self, run: Run) -> None:
    """Says that a run will build nothing more."""
    self._done.add(run.name)


def _is_finished(folder: pathlib.Path, run: Run) -> bool:
  """Whether the folder holds this run, to its end, with these settings."""
  if not (folder / "summary.json").exists():
    return False
  planned = json.loads(json.dumps(run.config))
  return _json(folder / "config.json")["config"] == planned


def _start(folder: pathlib.Path, run: Run, command: list[str],
           quiet: bool) -> int:
  """Exit code of one run; its output goes to a file if others run beside it."""
  if _is_finished(folder, run):
    return 0
  print(f"[{run.name}] {shlex.join(command)}", flush=True)
  if not quiet:
    return subprocess.run(command).returncode
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "log.txt").open("a") as log:
    return subprocess.run(command, stdout=log, stderr=log).returncode


def main(argv: Sequence[str]) -> None:
  """Entry; see the module docstring."""
  overrides = argv[1:]
  strange = [a for a in overrides
             if not a.startswith("--config.") or "=" not in a]
  if strange:
    sys.exit(f"error: {strange[0]}: expected --config.FIELD=VALUE")
  try:
    runs = plan(_CONFIG.value, overrides)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  # As a string: a bucket path must keep both slashes of its scheme.
  base = _WORKDIR.value.rstrip("/")
  commands = {
    run.name: [sys.executable, "-m", "stepsearch_jax.train", *run.arguments,
               f"--workdir={base}/{run.name}"]
    for run in runs
  }
  if _DRY_RUN.value:
    print("\n".join(shlex.join(command) for command in commands.values()))
    return
  if "://" in base:
    sys.exit(f"error: --workdir={base}: runs in a bucket are started by a "
             "scheduler: --dry_run prints their commands")
  _play(pathlib.Path(base), runs, commands)


def _play(workdir: pathlib.Path, runs: Sequence[Run],
          commands: Mapping[str, list[str]]) -> None:
  """Plays all runs, prints the table, and fails if one of them failed."""
  builder = Builder(workdir)

  def play(run: Run) -> int:
    builder.prepare(run)
    code = _start(workdir / run.name, run, commands[run.name],
                  _PARALLEL.value > 1)
    builder.finish(run)
    return code

  with concurrent.futures.ThreadPoolExecutor(_PARALLEL.value) as pool:
    codes = list(pool.map(play, runs))
  failed = [f"{run.name} (code {code})"
            for run, code in zip(runs, codes, strict=True) if code]
  finished = [run for run, code in zip(runs, codes, strict=True) if not code]
  if finished:
    print("\n" + table(workdir, finished))
    plot(workdir, finished)
  if failed:
    sys.exit(f"error: {', '.join(failed)} did not finish; the same command "
             "goes on from there")


def _parse(argv: Sequence[str]) -> list[str]:
  """Reads this command's flags; the others are overrides."""
  cli.help_if_asked(main, argv)
  return flags.FLAGS(argv, known_only=True)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=_parse)
