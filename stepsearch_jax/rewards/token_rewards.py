"""The seam between rewards and tokens: rewards go to the tokens that earned
them.

By default everything follows provenance: a query or answer counts only where
the policy sampled it, a document only where the retriever returned it. What a
document says about itself earns nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.rewards import (
  probe_rewards,
  released,
  step_rewards,
  user_reward,
)


@dataclasses.dataclass(frozen=True)
class TurnReward:
  """What one policy turn earned, and the parts that it was made from.

  Attributes:
    position: token that closed the turn's action; step rewards fall on it.
    gain: G_t of the documents that the turn was shown, paid or not.
    redundancy: P_t of them, paid or not.
    key: what the turn's query added to the search-key score, paid or not.
    step: paid for the search, scale and bonus included; what the probe or a
      user's own function pays for the turn.
    paid: sum of the token rewards of the turn; the last turn's has the
      outcome.
  """

  position: int
  gain: float
  redundancy: float
  key: float
  step: float
  paid: float


@dataclasses.dataclass(frozen=True)
class TrajectoryReward:
  """What one trajectory earned.

  Attributes:
    parts: outcome and parts per search.
    tokens: [T] float32, what is paid at each token.
    turns: the same per policy turn.
  """

  parts: step_rewards.RewardParts
  tokens: np.ndarray
  turns: tuple[TurnReward, ...]


def evidence(trajectory: types.Trajectory) -> step_rewards.Evidence:
  """Returns what the policy and the retriever did, by provenance.

  A search that failed, or that no turn was left for, is none.
  """
  turns = trajectory.turns
  searched = [turn for turn in turns if turn.retrieved]
  last = turns[-1] if turns else None
  return step_rewards.Evidence(
    queries=[turn.content for turn in searched],
    documents=[
      [passage.text for passage in turn.documents] for turn in searched
    ],
    answer=trajectory.answer,
    well_formed=last is not None
    and last.action == types.Action.ANSWER
    and last.text.rstrip().endswith("</answer>"),
    shown=[turn.shown_texts for turn in searched],
  )


def gold(question: types.Question) -> step_rewards.Gold:
  """Returns what a question is scored against."""
  return step_rewards.Gold(
    answers=question.answers,
    search_keys=question.search_keys or None,
    support=[passage.text for passage in question.support],
  )


def reward(
  spec: step_rewards.RewardSpec,
  trajectory: types.Trajectory,
  parts: step_rewards.RewardParts,
  positions: Sequence[int] | None = None,
  tokenizer: types.TextCodec | None = None,
) -> TrajectoryReward:
  """Returns the parts of a trajectory's reward spread over its tokens.

  Args:
    spec: reward settings.
    trajectory: a finished rollout.
    parts: what it earned.
    positions: tokens of the step rewards; None for the sampled tokens that
      closed the retrieved searches.
    tokenizer: needed where rewards go to the tokens of a query.
  """
  searched = [turn for turn in trajectory.turns if turn.retrieved]
  sampled = [turn.action_position for turn in searched]
  if positions is None:
    positions = sampled
  tokens = np.zeros(len(trajectory.tokens), np.float32)
  for position, step in zip(positions, parts.step_scores, strict=False):
    if position < len(tokens):
      tokens[position] += spec.step_scale * step
  tokens[sampled] += spec.search_bonus
  tokens += probe_rewards.on_tokens(spec.probe, trajectory, tokenizer)
  written = np.nonzero(trajectory.policy_mask)[0]
  if len(written):
    if spec.outcome_on_step == "overwrite":
      tokens[written[-1]] = parts.score
    else:
      tokens[written[-1]] += parts.score
  return TrajectoryReward(
    parts, tokens, _turn_rewards(spec, trajectory, parts, tokens)
  )


def _turn_rewards(
  spec: step_rewards.RewardSpec,
  trajectory: types.Trajectory,
  parts: step_rewards.RewardParts,
  tokens: np.ndarray,
) -> tuple[TurnReward, ...]:
  """Returns what each turn earned; parts go to searches in their order."""
  columns = [
    iter(column or ()) for column in (
      parts.information_gains, parts.redundancy_penalty, parts.key_gains,
      parts.step_scores,
    )
  ]
  probed = probe_rewards.per_turn(spec.probe, trajectory)
  out = []
  for number, turn in enumerate(trajectory.turns):
    gain = redundancy = key = step = 0.0
    if turn.retrieved:
      gain, redundancy, key, step = (next(c, 0.0) for c in columns)
      step = spec.step_scale * step + spec.search_bonus
    step += probed[number]
    own = trajectory.policy_mask & (trajectory.turn_index == number)
    out.append(TurnReward(
      turn.action_position, gain, redundancy, key, step,
      paid=float(tokens[own].sum()),
    ))
  return tuple(out)


def score_trajectories(
  spec: step_rewards.RewardSpec, trajectories: Sequence[types.Trajectory],
  tokenizer: types.TextCodec,
) -> list[TrajectoryReward]:
  """Returns the rewards of a batch of rollouts, in their order.

  Args:
    spec: reward settings.
    trajectories: finished rollouts.
    tokenizer: only the released text sources decode and re-encode, and
      ig_search finds the query's tokens by it.
  """
  rewards = []
  for trajectory in trajectories:
    seen = evidence(trajectory)
    positions = None
    if spec.scored_text == "regex" or spec.document_text == "parsed":
      seen = released.mix_evidence(spec, seen, trajectory, tokenizer)
    if spec.step_position == "reencoded":
      positions = released.trajectory_positions(trajectory, tokenizer)
    parts = step_rewards.score(spec, seen, gold(trajectory.question))
    rewards.append(
      _of_user(spec, trajectory, parts) if spec.function
      else reward(spec, trajectory, parts, positions, tokenizer)
    )
  return rewards


def _of_user(
  spec: step_rewards.RewardSpec, trajectory: types.Trajectory,
  parts: step_rewards.RewardParts,
) -> TrajectoryReward:
  """Returns what a user's function pays; the other parts stay for metrics."""
  own = user_reward.earned(spec.function, trajectory)
  tokens = user_reward.tokens(own, trajectory)
  unpaid = dataclasses.replace(
    spec, step_scale=0.0, search_bonus=0.0,
    probe=probe_rewards.ProbeRewardSpec.off(),
  )
  turns = _turn_rewards(unpaid, trajectory, parts, tokens)
  return TrajectoryReward(
    dataclasses.replace(parts, score=own.outcome, step_scores=own.turns),
    tokens,
    tuple(
      dataclasses.replace(turn, step=step)
      for turn, step in zip(turns, own.turns, strict=True)
    ),
  )
