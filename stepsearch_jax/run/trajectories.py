"""Rollouts as rows that a person can look into.

Training keeps some rollouts of some steps in `trajectories/step_N.jsonl`: the
text token by token with what each token earned and how the learner saw it. An
evaluation keeps some in its folder, without what only a learner knows.
`view` draws them; this module only writes them down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from stepsearch_jax import types
from stepsearch_jax.ppo import records
from stepsearch_jax.rewards import (
  probe_rewards,
  step_rewards,
  text_match,
  token_rewards,
)

# Per policy token, in the order of a row's "values"; null if not known.
MEASURES = ("reward", "advantage", "logp", "kl", "value", "entropy")


def describe(
  trajectories: Sequence[types.Trajectory],
  rewards: Sequence[token_rewards.TrajectoryReward],
  tokenizer: types.TextCodec,
  experience: records.Experience | None = None,
) -> list[dict]:
  """Returns a JSON-able row per trajectory.

  Args:
    trajectories: the first ones of a batch.
    rewards: theirs.
    tokenizer: spells the tokens.
    experience: of the whole batch, in the batch's order; None where nothing
      was learned from it, which leaves rewards and the log-probabilities under
      which tokens were sampled.
  """
  rows = []
  for i, (trajectory, reward) in enumerate(
    zip(trajectories, rewards, strict=True)
  ):
    measures = {"reward": reward.tokens, "logp": trajectory.logprobs}
    if experience is not None:
      measures |= _learned(experience, i, len(reward.tokens))
    rows.append(_row(trajectory, reward, measures, tokenizer))
  return rows


def describe_evaluated(
  spec: step_rewards.RewardSpec, tokenizer: types.TextCodec,
  trajectory: types.Trajectory,
) -> dict | None:
  """Returns the row of a rollout that was only played.

  Nobody asks how likely the gold answer was, so that the rewards of probes are
  not among its own. None, and a warning, where it cannot be rewarded: an
  evaluation does not end for that.

  Args:
    spec: what the run pays.
    tokenizer: spells the tokens.
    trajectory: the rollout.
  """
  spec = dataclasses.replace(spec, probe=probe_rewards.ProbeRewardSpec.off())
  try:
    rewards = token_rewards.score_trajectories(spec, [trajectory], tokenizer)
  except types.UserError as error:
    logging.warning("a rollout is not kept to be looked at: %s", error)
    return None
  (row,) = describe([trajectory], rewards, tokenizer)
  return row


def brief(row: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a tracker's table shows of a row of `describe`."""
  return {
    "question": row["question"],
    "answer": row["prediction"] or "",
    "gold": ", ".join(row["answers"]),
    "reward": row["reward"],
    "searches": sum(
      turn["action"] == types.Action.SEARCH for turn in row["turns"]
    ),
  }


def _learned(
  experience: records.Experience, i: int, length: int
) -> dict[str, np.ndarray]:
  """[T] each of what the learner knows of trajectory i, see MEASURES."""
  logp = experience.logp[i, :length]
  measures = {
    "advantage": experience.advantages[i, :length],
    "logp": logp,
    "kl": logp - experience.reference_logp[i, :length],
  }
  if experience.values is not None:
    measures["value"] = experience.values[i, :length]
  if experience.entropy is not None:
    measures["entropy"] = experience.entropy[i, :length]
  return measures


def _row(
  trajectory: types.Trajectory, reward: token_rewards.TrajectoryReward,
  measures: Mapping[str, np.ndarray], tokenizer: types.TextCodec,
) -> dict:
  question = trajectory.question
  start = int((trajectory.turn_index < 0).sum())
  answer = trajectory.answer
  return {
    "id": question.id,
    "episode": trajectory.episode,
    "question": question.text,
    "answers": list(question.answers),
    "prediction": answer,
    "em": text_match.exact_match(answer, question.answers),
    "f1": text_match.answer_f1(answer, question.answers),
    "hops": len(question.decomposition),
    "stop_reason": str(trajectory.stop_reason),
    "reward": float(reward.tokens.sum()),
    "outcome": float(reward.parts.score),
    "prompt": tokenizer.decode(trajectory.tokens[:start].tolist()),
    "start": start,  # Place of the first of the tokens below.
    "turns": _turns(trajectory, reward),
    "tokens": _tokens(trajectory, measures, start, tokenizer),
  }


def _turns(
  trajectory: types.Trajectory, reward: token_rewards.TrajectoryReward
) -> list[dict]:
  """Turns with their documents; support and repeats marked."""
  gold = {passage.text for passage in trajectory.question.support}
  seen: set[str] = set()
  rows = []
  for turn, earned in zip(trajectory.turns, reward.turns, strict=True):
    documents = [
      {"title": passage.title, "text": passage.text,
       "support": passage.text in gold, "repeated": passage.text in seen}
      for passage in turn.documents
    ]
    seen |= {passage.text for passage in turn.documents}
    rows.append({
      "action": str(turn.action), "content": turn.content,
      "failed": turn.failed, "documents": documents,
      "position": earned.position, "gain": earned.gain,
      "redundancy": earned.redundancy, "key": earned.key,
      "step": earned.step, "paid": earned.paid,
    })
  return rows


def _tokens(
  trajectory: types.Trajectory, measures: Mapping[str, np.ndarray],
  start: int, tokenizer: types.TextCodec,
) -> list[dict]:
  """Tokens behind the prompt: text, turn, and measures of the policy's."""
  policy = trajectory.policy_mask
  rows = []
  for place in range(start, len(trajectory.tokens)):
    row = {
      "text": tokenizer.decode([int(trajectory.tokens[place])], False),
      "turn": int(trajectory.turn_index[place]),
    }
    if policy[place]:
      row["values"] = [
        round(float(measures[name][place]), 4) if name in measures else None
        for name in MEASURES
      ]
    rows.append(row)
  return rows
