"""Runs a study: arms that differ in what they say, over shared seeds.

  stepsearch study --config=configs/credit_study.py --workdir=studies/credit
  stepsearch study --config=... --workdir=/shared/study --commands | parallel

The config's `study(add, config)` lists the arms. Every seed has one start,
which all arms that begin from it share; arms with several learning rates choose
one on the validation split; the last evaluation is the figure. The same command
goes on with a stopped study. One commit, one jax and one kind of machine:
anything else is refused. A table and a plot end it, --report=FILE.md also puts
the table between the markers in that file.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import jax
from absl import flags
from etils import epath

from stepsearch_jax import buckets, cli, files, types
from stepsearch_jax.evaluation import card, study
from stepsearch_jax.plan import machines
from stepsearch_jax.run import identity
from stepsearch_jax.run.settings import Settings

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

BEGIN, END = "<!-- study -->", "<!-- /study -->"


@dataclasses.dataclass(frozen=True)
class ArmPlan:
  """One arm of a study.

  Attributes:
    name: of the arm.
    seeds: of its runs.
    overrides: fields in which it differs from the config.
    from_start: begins from its seed's shared start.
    rates: values of ppo.policy_lr to choose from; () keeps the config's.
  """

  name: str
  seeds: tuple[int, ...]
  overrides: dict[str, object]
  from_start: bool
  rates: tuple[float, ...]

  def fields(self, start: ArmPlan, folder: object) -> dict[str, object]:
    """Returns all fields that it sets, `folder` being its start's run."""
    if not self.from_start or self is start:
      return self.overrides
    return {"warm_start.policy": folder, "warm_start.steps": 0} | self.overrides


@dataclasses.dataclass(frozen=True)
class Plan:
  """A study as its config file describes it.

  Attributes:
    config: path of the config, with its argument.
    arms: in the order of the table; the first one is the start.
    baselines: arms that the others are compared with.
    tuning_seed: seed of the runs that choose learning rates.
  """

  config: str
  arms: tuple[ArmPlan, ...]
  baselines: tuple[str, ...]
  tuning_seed: int


@dataclasses.dataclass(frozen=True)
class Effort:
  """What a learning arm may spend; equal for all of them.

  Attributes:
    length: of a run, in steps or in passes over the questions.
    rollouts: that a step plays at most, those of dynamic sampling included.
    trajectories: that a step learns from.
    mini_batch, epochs: how it learns from them.
  """

  length: str
  rollouts: int
  trajectories: int
  mini_batch: int
  epochs: int

  @classmethod
  def of(cls, settings: Settings) -> Effort:
    """Returns what a run with these settings spends."""
    schedule, batch = settings.schedule, settings.batch
    length = f"{schedule.steps} steps"
    if schedule.epochs:  # How many steps these are depends on the batch.
      length = (f"{schedule.epochs:g} passes, {batch.questions} questions a "
                "step")
    ppo = settings.config["ppo"]
    return cls(
      length,
      batch.trajectories * (batch.dynamic_limit if batch.dynamic else 1),
      batch.trajectories, ppo["mini_batch"], ppo["epochs"],
    )


def load(config: str) -> Plan:
  """Returns the checked plan of a config file.

  Raises:
    UserError: no study in it, an unknown field, or learning arms that differ
      in what they may spend.
  """
  config = cli.find_config(config)
  path, _, argument = config.partition(":")
  spec = importlib.util.spec_from_file_location("study_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  types.expect(hasattr(module, "study"), "--config", "a file with a study",
               path)
  arms: list[ArmPlan] = []

  def add(name, seeds, from_start=True, rates=(), **overrides):
    arms.append(ArmPlan(
      name, tuple(range(seeds)), identity.flat(overrides), from_start,
      tuple(rates),
    ))

  module.study(add, module.get_config(argument or None))
  efforts = {}
  for arm in arms:
    known = module.get_config(argument or None)
    for field, value in arm.fields(arms[0], "its folder").items():
      _set(known, f"{path}: arm {arm.name}", field, value)
    checked = Settings.from_config(known)
    if checked.schedule.trains:
      efforts[arm.name] = Effort.of(checked)
  _check_equal(efforts, path)
  return Plan(config, tuple(arms), tuple(module.BASELINES), module.TUNING_SEED)


def _check_equal(efforts: Mapping[str, Effort], path: str) -> None:
  """Raises a UserError that names two arms of other efforts, if there are."""
  for name, effort in efforts.items():
    first, wanted = next(iter(efforts.items()))
    for field, value in dataclasses.asdict(wanted).items():
      types.expect(
        getattr(effort, field) == value, f"{path}: arms differ in {field}",
        f"{value!r} as in {first}", f"{getattr(effort, field)} in {name}",
      )


def _set(config, where: str, field: str, value: object) -> None:
  """Sets a field that the config must have, with a value of its type."""
  *outer, last = field.split(".")
  node = config
  for name in outer:
    node = node.get(name, {})
  types.expect(last in node, where, "fields of the config only", field)
  try:
    node[last] = value
  except TypeError as error:
    raise types.UserError(f"{where}: {field}: {error}") from error


def claim(workdir: epath.Path, config: str) -> None:
  """Writes down, or compares, what all runs of a study have in common."""
  here = {
    "config": config, "commit": card.commit(), "jax": jax.__version__,
    "python": platform.python_version(), "machine": machines.here(),
  }
  if here["commit"].endswith("-dirty") and not _ALLOW_DIRTY.value:
    raise types.UserError(
      f"the checkout is edited ({here['commit']}): commit first, or "
      "--allow_dirty"
    )
  path = workdir / "study.json"
  if not path.exists():
    files.write_text(path, json.dumps(here, indent=2) + "\n")
    return
  there = json.loads(path.read_text())
  for name, value in here.items():
    types.expect(there.get(name) == value, f"{workdir}: {name}",
                 f"{there.get(name)!r}, with which the study began", value)


def run_folder(workdir: epath.Path, arm: ArmPlan, seed: int) -> epath.Path:
  """Folder of one run."""
  return workdir / arm.name / f"seed_{seed}"


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


def is_finished(folder: epath.Path) -> bool:
  """Whether a run has ended."""
  return (folder / "summary.json").exists()


def chosen_rate(workdir: epath.Path, arm: ArmPlan) -> float | None:
  """The rate with the best validation EM; None while one is missing."""
  scores = {}
  for rate in arm.rates:
    folder = workdir / "rates" / arm.name / f"{rate:g}"
    if not is_finished(folder):
      return None
    scores[rate] = json.loads((folder / "summary.json").read_text())["em_after"]
  return max(scores, key=lambda rate: scores[rate])


def ready(
  plan: Plan, workdir: epath.Path, arms: Sequence[ArmPlan]
) -> list[list[str]]:
  """Commands of the runs that are not finished and wait for no other.

  Those that choose learning rates come first, then one seed after the other,
  so that a study that is stopped has the same seeds of every arm.
  """
  found: list[tuple[int, list[str]]] = []
  start, first = plan.arms[0], -1
  for arm in arms:
    rate = []
    if arm.rates:
      best = chosen_rate(workdir, arm)
      if best is None:
        seed = plan.tuning_seed
        if is_finished(run_folder(workdir, start, seed)):
          found += [
            (first, command(plan, workdir, arm, seed, folder, [
              f"--config.ppo.policy_lr={value}",
              "--config.data.split=validation",
            ]))
            for value in arm.rates
            if not is_finished(
              folder := workdir / "rates" / arm.name / f"{value:g}")
          ]
        continue
      rate = [f"--config.ppo.policy_lr={best}"]
    seeds = arm.seeds
    if arm is start:  # As many as the others need.
      others = [a for a in arms if a is not start] or [start]
      seeds = {plan.tuning_seed, *(s for a in others for s in a.seeds)}
    for seed in seeds:
      folder = run_folder(workdir, arm, seed)
      waits = arm.from_start and arm is not start and not is_finished(
        run_folder(workdir, start, seed))
      if not is_finished(folder) and not waits:
        turn = first if seed == plan.tuning_seed else seed
        found.append((turn, command(plan, workdir, arm, seed, folder, rate)))
  return [line for _, line in sorted(found, key=lambda pair: pair[0])]


def play(
  plan: Plan, workdir: epath.Path, arms: Sequence[ArmPlan], parallel: int
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
        line for line in ready(plan, workdir, arms)
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


def report(plan: Plan, workdir: epath.Path) -> list[str]:
  """Draws the curves and returns the table of what is finished.

  Raises:
    UserError: no study has begun there, or none of its runs is finished.
  """
  about, arms = workdir / "study.json", []
  types.expect(about.exists(), "--workdir", "the folder of a study", workdir)
  for arm in plan.arms:
    runs = {
      seed: folder for seed in arm.seeds
      if is_finished(folder := run_folder(workdir, arm, seed))
    }
    if runs:
      rate = chosen_rate(workdir, arm) if arm.rates else None
      note = f"policy_lr {rate:g}" if rate else ""
      arms.append(study.read_arm(arm.name, runs, note))
  types.expect(bool(arms), "--workdir", "at least one finished run", workdir)
  study.plot(arms, workdir / "study.png")
  head = "`{config}`, commit {commit}, jax {jax}, {machine}".format_map(
    json.loads(about.read_text()))
  return [head, "", *study.table(arms, plan.baselines)]


def main() -> None:
  """Entry; see the module docstring."""
  plan, workdir = load(_CONFIG.value), epath.Path(_WORKDIR.value)
  names = [arm.name for arm in plan.arms]
  strange = set(_ONLY.value) - set(names)
  types.expect(not strange, "--only", f"names among {names}", sorted(strange))
  if _TABLE.value:
    return tell(plan, workdir)
  alone = _PARALLEL.value == 1 or not buckets.is_bucket(workdir)
  types.expect(alone, "--parallel", "1 in a bucket", _PARALLEL.value)
  workdir.mkdir(parents=True, exist_ok=True)
  claim(workdir, plan.config)
  arms = [a for a in plan.arms if not _ONLY.value or a.name in _ONLY.value
          or a is plan.arms[0]]
  if _COMMANDS.value:
    print(*map(shlex.join, ready(plan, workdir, arms)), sep="\n")
    return
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  play(plan, workdir, arms, _PARALLEL.value)
  tell(plan, workdir)


def tell(plan: Plan, workdir: epath.Path) -> None:
  """Writes and prints the table; see `report`."""
  lines = report(plan, workdir)
  files.write_text(workdir / "study.md", "\n".join(lines) + "\n")
  print("\n".join(lines))
  if _REPORT.value:
    _fill(epath.Path(_REPORT.value), lines)


def _fill(path: epath.Path, lines: Sequence[str]) -> None:
  """Puts lines between the markers of a file."""
  head, begin, rest = path.read_text().partition(BEGIN)
  _, end, tail = rest.partition(END)
  types.expect(bool(begin and end), "--report",
               f"a file with {BEGIN} and {END}", str(path))
  files.write_text(path, "\n".join([head + BEGIN, *lines, END + tail]))


if __name__ == "__main__":
  cli.run(main, required=["config", "workdir"])
