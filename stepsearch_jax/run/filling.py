"""Fills the batch of a step: which questions are asked and which are kept.

With `batch.dynamic` (dynamic sampling of DAPO, arXiv 2503.14476) a question is
kept where its rollouts differ in reward: of equal ones no comparison learns.
Further questions are asked in place of the others, in rounds.

What is asked depends on the place in the question stream and on rewards alone,
and its place numbers a question's rollouts, so a resumed run repeats an
uninterrupted one to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.data import input_pipeline
from stepsearch_jax.rewards import token_rewards
from stepsearch_jax.rollout import records
from stepsearch_jax.run import metrics, probing, specs
from stepsearch_jax.run.experiment import Experiment

# Sums of float32 rewards in another order differ by less than this, of the
# largest one or of 1; the estimators draw the same line.
_ROUNDING = 1e-6

Play = Callable[[Sequence[types.Question], Sequence[int]], records.Rollout]
Score = Callable[
  [Sequence[types.Trajectory]], list[token_rewards.TrajectoryReward]
]


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """Scored trajectories, those of one question side by side."""

  trajectories: list[types.Trajectory]
  rewards: list[token_rewards.TrajectoryReward]


@dataclasses.dataclass(frozen=True)
class Filled:
  """What a step has to learn from, and what it took.

  Attributes:
    batch: rollouts of `batch.questions` questions, in the order of asking.
    played: rollouts of all questions that were asked.
    asked: how many these are.
    differing: how many of them have rollouts that differ in reward.
    stats: of all rounds together.
  """

  batch: Rollouts
  played: Rollouts
  asked: int
  differing: int
  stats: records.RolloutStats

  def metrics(self) -> dict[str, float]:
    """Share of questions that groups can learn from; empty without groups."""
    if len(self.played.rewards) == self.asked:
      return {}
    return {
      "batch/questions_asked": self.asked,
      "batch/differing_share": self.differing / self.asked,
    }


def play_batch(
  experiment: Experiment, stream: input_pipeline.QuestionStream, first: int,
  make_policy: Callable[[], types.Tree], reference: types.Tree,
  watch: metrics.Stopwatch,
) -> Filled:
  """Plays and scores a batch, and further questions where one is chosen.

  Args:
    experiment: the run's parts.
    stream, first: see `fill`.
    make_policy: returns the whole policy, which is let go afterwards.
    reference: parameters of the frozen reference, for probes.
    watch: receives the time of playing and of scoring.
  """
  settings = experiment.settings
  with watch.time("gen"):
    policy = make_policy()

  def rollout(asked, episodes):
    with watch.time("gen"):
      return probing.play(experiment, policy, reference, asked, episodes)

  def score(trajectories):
    with watch.time("reward"):
      return token_rewards.score_trajectories(
        settings.reward, trajectories, experiment.tokenizer
      )

  return fill(settings.batch, stream, first, rollout, score)


def fill(
  spec: specs.BatchSpec, stream: input_pipeline.QuestionStream, first: int,
  play: Play, score: Score,
) -> Filled:
  """Plays questions until the batch is full.

  A batch that is not full after `dynamic_limit` times its questions is filled
  up with the earliest of the others, so that its size never changes.

  Args:
    spec: size of the batch, and whether it is chosen.
    stream: the questions.
    first: place in the stream from which on to ask.
    play: plays questions under episode numbers.
    score: rewards rollouts.
  """
  played, stats = Rollouts([], []), records.RolloutStats()
  differs: list[bool] = []  # Per question that was asked.
  while count := _missing(spec, differs):
    place = first + len(differs)
    asked = [
      question for question in stream.take(place, count)
      for _ in range(spec.rollouts)
    ]
    episode = place * spec.rollouts
    rollout = play(asked, range(episode, episode + len(asked)))
    rewards = score(rollout.trajectories)
    played.trajectories.extend(rollout.trajectories)
    played.rewards.extend(rewards)
    stats += rollout.stats
    differs += [
      _differ(rewards[start : start + spec.rollouts])
      for start in range(0, len(rewards), spec.rollouts)
    ]
  return Filled(
    _chosen(spec, played, differs), played, len(differs), sum(differs), stats
  )


def _missing(spec: specs.BatchSpec, differs: Sequence[bool]) -> int:
  """Questions of the next round; as many are asked as will probably do."""
  if not differs:
    return spec.questions
  lacking = spec.questions - sum(differs)
  left = spec.dynamic_limit * spec.questions - len(differs)
  if not spec.dynamic or lacking <= 0:
    return 0
  expected = -(-lacking * len(differs) // max(sum(differs), 1))
  return min(expected, spec.questions, left)


def _differ(rewards: Sequence[token_rewards.TrajectoryReward]) -> bool:
  """Whether trajectories differ in their sums of rewards, beyond rounding."""
  totals = np.array([reward.tokens.sum(dtype=np.float64) for reward in rewards])
  return bool(np.ptp(totals) > _ROUNDING * max(np.abs(totals).max(), 1.0))


def _chosen(
  spec: specs.BatchSpec, played: Rollouts, differs: Sequence[bool]
) -> Rollouts:
  """The batch: questions that differ before others, in order of asking."""
  by_worth = sorted(range(len(differs)), key=lambda place: not differs[place])
  rows = [
    place * spec.rollouts + i
    for place in sorted(by_worth[: spec.questions])
    for i in range(spec.rollouts)
  ]
  return Rollouts(
    [played.trajectories[row] for row in rows],
    [played.rewards[row] for row in rows],
  )
