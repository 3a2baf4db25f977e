"""Runs a study: arms that differ in what they say, over shared seeds.

  stepsearch study --config=configs/credit_study.py --workdir=studies/credit
  stepsearch study --config=... --workdir=/shared/study --commands | parallel

The config's `study(add, config)` lists the arms. Every seed has one start,
which all arms that begin from it share; arms with several learning rates choose
one on the validation split; the last evaluation is the figure. The same command
goes on with a stopped study. One commit, one jax and, for a seed, one kind of
machine: anything else is refused. A table and a plot end it, --report=FILE.md
also puts the table between the markers in that file, <!-- NAME --> and
<!-- /NAME --> for a config NAME.py.

--record=FILE.jsonl keeps what came out of every run, a line each: enough for
the table. A study goes on from a record without the folders, in a checkout and
an environment of its commit, perhaps with other seeds on another kind of
machine: --seeds=5,6,7.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
from absl import flags
from etils import epath

from stepsearch_jax import buckets, cli, files, types
from stepsearch_jax.evaluation import card, study
from stepsearch_jax.plan import machines
from stepsearch_jax.run import study_plan
from stepsearch_jax.run.study_book import (
  Book,
  is_finished,
  rate_folder,
  run_folder,
)
from stepsearch_jax.run.study_plan import ArmPlan, Plan

_CONFIG = flags.DEFINE_string(
  "config", None, "Name or path of a config with a study, perhaps with "
  ":arguments."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.")
_COMMANDS = flags.DEFINE_bool(
  "commands", False, "Print the commands that can run now, one per line."
)
_ONLY = flags.DEFINE_list("only", [], "Play these arms only, for instance ppo.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time.", 1)
_TABLE = flags.DEFINE_bool("table", False, "Only tell what is finished.")
_ALLOW_DIRTY = flags.DEFINE_bool(
  "allow_dirty", False, "Accept edited files; the table then says so."
)
_REPORT = flags.DEFINE_string("report", None, "Also write the table there.")
_RECORD = flags.DEFINE_string(
  "record", None, "JSONL file of finished runs, read first and written last."
)
_SEEDS = flags.DEFINE_list("seeds", [], "Play these seeds, not the first ones.")


def facts(config: str) -> dict[str, str]:
  """Returns what all runs of a study that begin here have in common.

  Raises:
    UserError: the checkout is edited.
  """
  here = {
    "config": config, "commit": card.commit(), "jax": jax.__version__,
    "python": platform.python_version(), "machine": machines.here(),
  }
  if here["commit"].endswith("-dirty") and not _ALLOW_DIRTY.value:
    raise types.UserError(
      f"the checkout is edited ({here['commit']}): commit first, or "
      "--allow_dirty"
    )
  return here


def claim(workdir: epath.Path, here: dict[str, str]) -> None:
  """Writes down, or compares, the facts that a study began with."""
  path = workdir / "study.json"
  if not path.exists():
    files.write_text(path, json.dumps(here, indent=2) + "\n")
    return
  there = json.loads(path.read_text())
  for name, value in here.items():
    types.expect(there.get(name) == value, f"{workdir}: {name}",
                 f"{there.get(name)!r}, with which the study began", value)


def command(
  plan: Plan, workdir: epath.Path, arm: ArmPlan, seed: int,
  folder: epath.Path, extra: Sequence[str] = (),
) -> list[str]:
  """The command of one run."""
  start = plan.arms[0]
  fields = {"seed": seed} | arm.fields(start, run_folder(workdir, start, seed))
  arguments = [f"--config={plan.config}", f"--workdir={folder}"]
  arguments += [f"--config.{k}={v}" for k, v in fields.items()]
  return [sys.executable, "-m", "stepsearch_jax.train", *arguments, *extra]


def ready(
  plan: Plan, workdir: epath.Path, arms: Sequence[ArmPlan], book: Book
) -> list[list[str]]:
  """Commands of the runs that are not finished and wait for no other.

  Those that choose learning rates come first, then one seed after the other,
  so that a study that is stopped has the same seeds of every arm.
  """
  start, tuning = plan.arms[0], plan.tuning_seed
  others = [arm for arm in arms if arm.name != start.name]
  found: list[tuple[int, list[str]]] = []

  def add(arm, seed, folder, extra=()):
    """Adds a run, unless it waits for its start."""
    if not arm.from_start or arm is start or is_finished(
      run_folder(workdir, start, seed)
    ):
      turn = -1 if seed == tuning else seed
      found.append((turn, command(plan, workdir, arm, seed, folder, extra)))

  # A start that only a record knows is played again for those that need it.
  seeds = {s for a in others if a.from_start for s in a.seeds
           if not book.has(a, s)}
  if any(book.chosen_rate(a, tuning) is None for a in others if a.rates):
    seeds.add(tuning)
  if not others:
    seeds = {seed for seed in arms[0].seeds if not book.has(start, seed)}
  for seed in sorted(seeds):
    folder = run_folder(workdir, start, seed)
    if not is_finished(folder):
      add(start, seed, folder)
  for arm in others:
    extra = []
    if arm.rates:
      best = book.chosen_rate(arm, tuning)
      if best is None:
        for rate in sorted(set(arm.rates) - set(book.tried(arm, tuning))):
          add(arm, tuning, rate_folder(workdir, arm, rate),
              [f"--config.ppo.policy_lr={rate}",
               "--config.data.split=validation"])
        continue
      extra = [f"--config.ppo.policy_lr={best}"]
    for seed in arm.seeds:
      if not book.has(arm, seed):
        add(arm, seed, run_folder(workdir, arm, seed), extra)
  return [line for _, line in sorted(found, key=lambda pair: pair[0])]


def play(
  plan: Plan, workdir: epath.Path, arms: Sequence[ArmPlan], book: Book,
  parallel: int,
) -> None:
  """Plays all runs, `parallel` of them at a time.

  Raises:
    UserError: a run failed; those that were under way have ended.
  """
  running: dict[str, subprocess.Popen] = {}
  failed: list[str] = []
  try:
    while True:
      # Reads many files, perhaps in a bucket: only when a run has ended.
      waiting = [
        line for line in ready(plan, workdir, arms, book)
        if shlex.join(line) not in running
      ]
      while waiting and len(running) < parallel and not failed:
        print(f"{len(waiting)} runs can start", flush=True)
        line = waiting.pop(0)
        running[shlex.join(line)] = _begin(line, quiet=parallel > 1)
      if not running:
        break
      while all(process.poll() is None for process in running.values()):
        time.sleep(0.2)
      for text in [t for t, run in running.items() if run.poll() is not None]:
        if code := running.pop(text).returncode:
          failed.append(f"{text} ended with code {code}")
  finally:
    for process in running.values():  # Where this process is stopped.
      process.terminate()
      process.wait()
  if failed:
    raise types.UserError(f"{failed[0]}; the same study goes on from there")


def _begin(line: Sequence[str], quiet: bool) -> subprocess.Popen:
  """Starts a run; its output goes to a file if others run beside it."""
  if not quiet:
    return subprocess.Popen(line)
  flag = next(x for x in line if x.startswith("--workdir="))
  log = pathlib.Path(flag.removeprefix("--workdir=")) / "log.txt"
  log.parent.mkdir(parents=True, exist_ok=True)
  with log.open("a") as out:
    return subprocess.Popen(line, stdout=out, stderr=out)


def report(plan: Plan, workdir: epath.Path, book: Book) -> list[str]:
  """Draws the curves, writes the record and returns the table.

  Raises:
    UserError: none of the study's runs is finished.
  """
  rows, arms = book.rows(plan), []
  for arm in plan.arms:
    runs = {row["seed"]: row for row in rows
            if row["arm"] == arm.name and row["seed"] != plan.tuning_seed}
    if runs:
      rate = book.chosen_rate(arm, plan.tuning_seed)
      note = f"policy_lr {rate:g}" if rate else ""
      arms.append(study.gather(arm.name, runs, note))
  types.expect(bool(arms), "--workdir", "at least one finished run", workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  study.plot(arms, workdir / "study.png")
  if _RECORD.value:
    files.write_text(epath.Path(_RECORD.value), files.to_jsonl(rows))
  head = "`{config}`, commit {commit}, jax {jax}, ".format_map(rows[0])
  head += " and ".join(sorted({row["machine"] for row in rows}))
  return [head, "", *study.table(arms, plan.baselines)]


def _arms(plan: Plan) -> list[ArmPlan]:
  """The arms to play, with the seeds to play."""
  names = [arm.name for arm in plan.arms]
  strange = set(_ONLY.value) - set(names)
  types.expect(not strange, "--only", f"names among {names}", sorted(strange))
  try:
    seeds = tuple(map(int, _SEEDS.value))
  except ValueError:
    raise types.UserError(
      f"--seeds: expected numbers, for instance 5,6,7, got {_SEEDS.value}"
    ) from None
  return [
    dataclasses.replace(arm, seeds=seeds or arm.seeds) for arm in plan.arms
    if not _ONLY.value or arm.name in (names[0], *_ONLY.value)
  ]


def main() -> None:
  """Entry; see the module docstring."""
  plan = study_plan.load(cli.find_config(_CONFIG.value))
  workdir, arms = epath.Path(_WORKDIR.value), _arms(plan)
  record = epath.Path(_RECORD.value) if _RECORD.value else None
  types.expect(record is None or record.name.endswith(".jsonl"), "--record",
               "the name of a .jsonl file", record)
  book = Book(workdir, record)
  if _TABLE.value:
    return tell(plan, workdir, book)
  alone = _PARALLEL.value == 1 or not buckets.is_bucket(workdir)
  types.expect(alone, "--parallel", "1 in a bucket", _PARALLEL.value)
  here = facts(plan.config)
  book.check(here, arms)
  claim(workdir, here)
  if _COMMANDS.value:
    print(*map(shlex.join, ready(plan, workdir, arms, book)), sep="\n")
    return
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  play(plan, workdir, arms, book, _PARALLEL.value)
  tell(plan, workdir, book)


def tell(plan: Plan, workdir: epath.Path, book: Book) -> None:
  """Writes and prints the table; see `report`."""
  lines = report(plan, workdir, book)
  files.write_text(workdir / "study.md", "\n".join(lines) + "\n")
  print("\n".join(lines))
  if _REPORT.value:
    name = pathlib.Path(plan.config.partition(":")[0]).stem
    _fill(epath.Path(_REPORT.value), f"<!-- {name} -->", f"<!-- /{name} -->",
          lines)


def _fill(
  path: epath.Path, begin: str, end: str, lines: Sequence[str]
) -> None:
  """Puts lines between the markers of a file."""
  head, begun, rest = path.read_text().partition(begin)
  _, ended, tail = rest.partition(end)
  types.expect(bool(begun and ended), "--report",
               f"a file with {begin} and {end}", str(path))
  files.write_text(path, "\n".join([head + begin, *lines, end + tail]))


if __name__ == "__main__":
  cli.run(main, required=["config", "workdir"])
