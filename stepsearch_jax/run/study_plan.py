"""A study's plan: its arms as the config lists them, checked to be comparable.

It knows configs and what a run may spend, not how runs are started or what came
out of them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping

from stepsearch_jax import types
from stepsearch_jax.run import identity
from stepsearch_jax.run.settings import Settings

# Of the study, not of an arm: figures are compared by question and by step.
_SHARED = ("eval.", "data.eval", "data.split", "data.world.")


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
    critic_warmup: steps that leave the policy alone.
    imitation: steps of imitation in front, behind the start's.
  """

  length: str
  rollouts: int
  trajectories: int
  mini_batch: int
  epochs: int
  critic_warmup: int
  imitation: int

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
      ppo["critic_warmup"], settings.warm_start.steps,
    )


def load(config: str) -> Plan:
  """Returns the checked plan of a config file.

  Args:
    config: path of the file, perhaps with `:arguments`.

  Raises:
    UserError: no study in it, an unknown field, arms that could not be told
      apart or were asked other questions, or learning arms that differ in what
      they may spend.
  """
  path, _, argument = config.partition(":")
  spec = importlib.util.spec_from_file_location("study_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for name in ("study", "BASELINES", "TUNING_SEED"):
    types.expect(hasattr(module, name), "--config",
                 f"a file of a study, with {name}", path)
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
  plan = Plan(config, tuple(arms), tuple(module.BASELINES), module.TUNING_SEED)
  _check_arms(plan, path)
  return plan


def _check_arms(plan: Plan, path: str) -> None:
  """Raises a UserError where arms could not be told apart or compared."""
  names = [arm.name for arm in plan.arms]
  for name in names:
    types.expect(names.count(name) == 1, path, "a name for every arm",
                 f"{name!r} twice")
  types.expect(set(plan.baselines) <= set(names), f"{path}: BASELINES",
               f"names among {names}", list(plan.baselines))
  choices = {arm.rates for arm in plan.arms if arm.rates}
  types.expect(len(choices) <= 1, f"{path}: rates",
               "the same values for every arm that chooses one",
               sorted(choices))
  for arm in plan.arms:
    where = f"{path}: arm {arm.name}"
    types.expect(len(set(arm.rates)) == len(arm.rates), where,
                 "every rate once", arm.rates)
    types.expect(plan.tuning_seed not in arm.seeds, where,
                 "seeds without TUNING_SEED", plan.tuning_seed)
    own = [field for field in arm.overrides
           if field == "seed" or field.startswith(_SHARED)]
    types.expect(not own, where, "the seeds, questions and evaluations of all "
                 "arms", own)


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
