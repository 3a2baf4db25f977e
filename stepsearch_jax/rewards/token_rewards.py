"""The seam between rewards and tokens: scores go to the tokens that earned
them.

By default everything follows provenance: a query or answer counts only where
the policy sampled it, a document only where the retriever returned it. What a
document says about itself earns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.rewards import released, step_rewards


def evidence(trajectory: types.Trajectory) -> step_rewards.Evidence:
  """What the policy and the retriever did, by provenance."""
  turns = trajectory.turns
  last = turns[-1] if turns else None
  return step_rewards.Evidence(
    queries=[
      turn.content for turn in turns if turn.action == types.Action.SEARCH
    ],
    documents=[
      [passage.text for passage in turn.documents]
      for turn in turns
      if turn.retrieved
    ],
    answer=trajectory.answer,
    well_formed=last is not None
    and last.action == types.Action.ANSWER
    and last.text.rstrip().endswith("</answer>"),
  )


def gold(question: types.Question) -> step_rewards.Gold:
  """What a question is scored against."""
  return step_rewards.Gold(
    answers=question.answers,
    search_keys=question.search_keys or None,
    support=[passage.text for passage in question.support],
  )


def token_rewards(
  spec: step_rewards.RewardSpec,
  trajectory: types.Trajectory,
  scores: step_rewards.RewardParts,
  positions: Sequence[int] | None = None,
) -> np.ndarray:
  """Spreads the scores of a trajectory over its tokens.

  Args:
    spec: reward settings.
    trajectory: a finished rollout.
    scores: its scores.
    positions: tokens of the step rewards; default the sampled tokens that
      closed the answered searches.

  Returns:
    [T] float32; step rewards scaled, the outcome at the last policy token.
  """
  out = np.zeros(len(trajectory.tokens), np.float32)
  sampled = np.nonzero(trajectory.policy_mask)[0]
  if positions is None:
    positions = [t.action_position for t in trajectory.turns if t.retrieved]
  for position, step in zip(positions, scores.step_scores, strict=False):
    if position < len(out):
      out[position] += spec.step_scale * step
  if len(sampled):
    if spec.outcome_on_step == "overwrite":
      out[sampled[-1]] = scores.score
    else:
      out[sampled[-1]] += scores.score
  return out


def score_trajectories(
  spec: step_rewards.RewardSpec,
  trajectories: Sequence[types.Trajectory],
  tokenizer,
) -> tuple[list[step_rewards.RewardParts], list[np.ndarray]]:
  """Scores and per-token rewards of a batch of rollouts.

  Args:
    spec: reward settings.
    trajectories: finished rollouts.
    tokenizer: only the released text sources decode and re-encode.

  Returns:
    (scores, [T] float32 rewards), one of each per trajectory.
  """
  scores, rewards = [], []
  for trajectory in trajectories:
    seen = evidence(trajectory)
    positions = None
    if spec.scored_text == "regex" or spec.document_text == "parsed":
      seen = released.mix_evidence(spec, seen, trajectory, tokenizer)
    if spec.step_position == "reencoded":
      positions = released.trajectory_positions(trajectory, tokenizer)
    scored = step_rewards.score(spec, seen, gold(trajectory.question))
    scores.append(scored)
    rewards.append(token_rewards(spec, trajectory, scored, positions))
  return scores, rewards
