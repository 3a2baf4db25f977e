"""The plain settings of a run, one record per section of the config.

A record has no defaults (the config has them, once) and checks itself. The
sections that a folder of its own acts on (retrieval, rollout, reward, ppo)
have their records there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import Any

from stepsearch_jax.data import world
from stepsearch_jax.models import decoder, families
from stepsearch_jax.parallel import sharding
from stepsearch_jax.rollout import controls
from stepsearch_jax.run import trackers
from stepsearch_jax.sft import scripted
from stepsearch_jax.types import expect

DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How long a run trains; one of the two is 0, and both where it only
  imitates.

  Attributes:
    steps: training steps.
    epochs: passes over the training questions.
  """

  steps: int
  epochs: float

  def __post_init__(self):
    expect(
      min(self.steps, self.epochs) == 0 <= max(self.steps, self.epochs),
      "total_steps, total_epochs", "one of the two to be positive",
      (self.steps, self.epochs),
    )

  @property
  def trains(self) -> bool:
    """Whether anything follows the warm start."""
    return self.steps > 0 or self.epochs > 0

  def total(self, questions: int, per_step: int) -> int:
    """Training steps; an epoch asks every question at least once."""
    if not self.epochs:
      return self.steps
    return max(math.ceil(self.epochs * questions / per_step), 1)


@dataclasses.dataclass(frozen=True)
class SizeSpec:
  """Shape of a model that starts from random weights; see `model.size`."""

  family: str
  hidden: int
  mlp: int
  layers: int
  heads: int
  kv_heads: int
  vocab: int
  tied: bool

  def __post_init__(self):
    expect(self.family in families.FAMILIES, "model.size.family",
           f"one of {tuple(families.FAMILIES)}", self.family)
    for name in ("hidden", "mlp", "layers", "heads", "kv_heads", "vocab"):
      value = getattr(self, name)
      expect(value > 0, f"model.size.{name}", "a positive number", value)
    for whole, part in (("hidden", "heads"), ("heads", "kv_heads")):
      expect(
        getattr(self, whole) % getattr(self, part) == 0,
        f"model.size.{part}",
        f"a divisor of model.size.{whole} = {getattr(self, whole)}",
        getattr(self, part),
      )


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """Which policy is trained; see `configs/common.py`."""

  reference: str
  tokenizer: str
  dtype: str
  remat: str
  size: SizeSpec
  chat: dict[str, Any]

  def __post_init__(self):
    expect(self.dtype in DTYPES, "model.dtype", f"one of {DTYPES}", self.dtype)
    words = " | ".join(decoder.Remat)
    before = {"true": "full", "false": "none"}.get(str(self.remat).lower())
    if before:  # What the field held once.
      words += f" ({self.remat} is now {before})"
    expect(self.remat in list(decoder.Remat), "model.remat", words, self.remat)


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """Questions and passages; see `configs/common.py`."""

  train: str
  eval: str
  corpus: str
  limit: int
  eval_limit: int
  holdout: float
  split: str
  world: world.WorldSpec

  def __post_init__(self):
    expect(self.split in world.SPLITS, "data.split",
           f"one of {world.SPLITS}", self.split)
    for name in ("limit", "eval_limit"):
      value = getattr(self, name)
      expect(value >= 0, f"data.{name}", "0 (all) or more", value)
    expect(0 < self.holdout < 1, "data.holdout", "a share between 0 and 1",
           self.holdout)


@dataclasses.dataclass(frozen=True)
class BatchSpec:
  """Trajectories of a step.

  Attributes:
    questions: different ones.
    rollouts: of each question.
    dynamic: keeps questions whose rollouts differ in reward and asks further
      ones in place of the others.
    dynamic_limit: questions asked at most then, in multiples of `questions`.
  """

  questions: int
  rollouts: int
  dynamic: bool
  dynamic_limit: int

  def __post_init__(self):
    for name in ("questions", "rollouts", "dynamic_limit"):
      value = getattr(self, name)
      expect(value > 0, f"batch.{name}", "a positive number", value)
    expect(
      not self.dynamic or self.rollouts > 1, "batch.rollouts",
      "2 or more, because batch.dynamic compares rollouts of one question",
      self.rollouts,
    )

  @property
  def trajectories(self) -> int:
    """Trajectories of a step."""
    return self.questions * self.rollouts


@dataclasses.dataclass(frozen=True)
class ProtocolSpec:
  """What the policy is told and how often it may search."""

  template: str
  max_turns: int
  topk: int
  documents: str

  def __post_init__(self):
    expect(self.documents in list(controls.Documents), "rollout.documents",
           f"one of {', '.join(controls.Documents)}", self.documents)
    expect(self.max_turns >= 0, "rollout.max_turns", "0 or more",
           self.max_turns)
    expect(self.topk >= 1, "retrieval.topk", "1 or more", self.topk)


@dataclasses.dataclass(frozen=True)
class WarmStartSpec:
  """Where the policy starts: another run's, imitation (or neither).

  Attributes:
    policy: work directory of the other run, empty for none.
    steps: of imitation; 0 leaves it out.
    traces: file of traces that are imitated, empty for scripted ones.
    min_f1: of a trace's answer.
    rows, row_length, lr, trajectories: of imitation.
    habits: how the demonstrators search.
  """

  policy: str
  steps: int
  traces: str
  min_f1: float
  rows: int
  row_length: int
  lr: float
  trajectories: int
  habits: scripted.Habits

  def __post_init__(self):
    expect(self.steps >= 0, "warm_start.steps", "0 (none) or more", self.steps)
    expect(self.steps > 0 or not self.traces, "warm_start.steps",
           "a positive number of imitation steps for warm_start.traces",
           self.steps)
    expect(0 <= self.min_f1 <= 1, "warm_start.min_f1", "a share in [0, 1]",
           self.min_f1)
    for name in ("rows", "row_length", "trajectories", "lr"):
      value = getattr(self, name)
      expect(value > 0, f"warm_start.{name}", "a positive number", value)


@dataclasses.dataclass(frozen=True)
class EvalSpec:
  """Evaluation during training."""

  every: int

  def __post_init__(self):
    expect(self.every >= 0, "eval.every", "0 (first and last) or more",
           self.every)

  def is_due(self, step: int) -> bool:
    """Whether the policy is evaluated after `step` steps."""
    return self.every > 0 and step % self.every == 0


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
  """How often a run saves and how many checkpoints it keeps."""

  every: int
  keep: int

  def __post_init__(self):
    for name in ("every", "keep"):
      value = getattr(self, name)
      expect(value >= 1, f"checkpoint.{name}", "1 or more", value)

  def is_due(self, step: int) -> bool:
    """Whether a checkpoint is written after `step` steps."""
    return step % self.every == 0


@dataclasses.dataclass(frozen=True)
class MeshSpec:
  """Sizes of the device axes; -1 takes the devices that the others leave.

  `rules` changes what is split over which axis; see `sharding.parse_rules`.
  """

  data: int
  fsdp: int
  tensor: int
  rules: str

  def __post_init__(self):
    for name in ("data", "fsdp"):
      value = getattr(self, name)
      expect(value == -1 or value > 0, f"mesh.{name}", "-1 or more than 0",
             value)
    expect(self.tensor > 0, "mesh.tensor", "more than 0", self.tensor)
    sharding.parse_rules(self.rules)

  def axes(self, name: str) -> tuple[str, ...]:
    """Mesh axes that split the logical axis `name`."""
    return dict(sharding.parse_rules(self.rules))[name]

  def shards(self, name: str, devices: int) -> int:
    """Parts into which the logical axis `name` is split over `devices`."""
    sizes = {axis: getattr(self, axis) for axis in sharding.AXES}
    for axis, size in sizes.items():
      if size == -1:
        others = math.prod(sizes[a] for a in sizes if sizes[a] != -1)
        sizes[axis] = max(devices // others, 1)
    return math.prod(sizes[axis] for axis in self.axes(name))


@dataclasses.dataclass(frozen=True)
class LogSpec:
  """Where metrics go, and which steps are profiled.

  Attributes:
    tracker: package of a tracker, "" logs to files only.
    project: of the tracker.
    profile: (first, last) step of a profile in `profile/`; () writes none.
    trajectories: rollouts kept of a step in `trajectories/`; 0 keeps none.
    trajectories_every: steps between two that keep some, besides the first.
  """

  tracker: str
  project: str
  profile: tuple[int, ...]
  trajectories: int
  trajectories_every: int

  def keeps_rollouts(self, step: int, last: int) -> bool:
    """Whether rollouts of `step` are kept in a run of `last` steps."""
    due = step in (1, last) or step % self.trajectories_every == 0
    return self.trajectories > 0 and due

  def __post_init__(self):
    expect(self.tracker in ("", *trackers.NAMES), "log.tracker",
           f"empty or one of {trackers.NAMES}", self.tracker)
    # Found now and not behind the warm start.
    expect(
      not self.tracker or importlib.util.find_spec(self.tracker) is not None,
      "log.tracker",
      f'the package {self.tracker}: pip install -e ".[{self.tracker}]"',
      "no such package",
    )
    expect(bool(self.project or not self.tracker), "log.project",
           "a name, because log.tracker is set", self.project)
    expect(self.trajectories >= 0, "log.trajectories", "0 (none) or more",
           self.trajectories)
    expect(self.trajectories_every >= 1, "log.trajectories_every",
           "1 or more steps", self.trajectories_every)
    expect(
      self.profile == ()
      or (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]),
      "log.profile", "() or (first, last) with 1 <= first <= last",
      self.profile,
    )
