"""Rollouts of a step as rows that a person can look into.

Training keeps some rollouts of some steps in `trajectories/step_N.jsonl`: the
text token by token with what each token earned and how the learner saw it.
`view` draws them; this module only writes them down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.ppo import records
from stepsearch_jax.rewards import text_match, token_rewards

# Per policy token, in the order of a row's "values".
MEASURES = ("reward", "advantage", "logp", "kl", "value", "entropy")


def describe(
  trajectories: Sequence[types.Trajectory],
  rewards: Sequence[token_rewards.TrajectoryReward],
  experience: records.Experience,
  tokenizer: tokenizer_lib.Tokenizer,
) -> list[dict]:
  """Returns a JSON-able row per trajectory.

  Args:
    trajectories: the first ones of the batch.
    rewards: theirs.
    experience: of the whole batch, in the batch's order.
    tokenizer: spells the tokens.
  """
  return [
    _row(trajectory, reward, _measures(experience, i, reward), tokenizer)
    for i, (trajectory, reward) in enumerate(
      zip(trajectories, rewards, strict=True)
    )
  ]


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


def _measures(
  experience: records.Experience, i: int,
  reward: token_rewards.TrajectoryReward,
) -> np.ndarray:
  """[T, 6] measures of trajectory i, see MEASURES."""
  length = len(reward.tokens)
  logp = experience.logp[i, :length]
  entropy = np.zeros(length)
  if experience.entropy is not None:
    entropy = experience.entropy[i, :length]
  return np.stack([
    reward.tokens,
    experience.advantages[i, :length],
    logp,
    logp - experience.reference_logp[i, :length],
    experience.values[i, :length],
    entropy,
  ], axis=-1)


def _row(
  trajectory: types.Trajectory, reward: token_rewards.TrajectoryReward,
  measures: np.ndarray, tokenizer: tokenizer_lib.Tokenizer,
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
  trajectory: types.Trajectory, measures: np.ndarray, start: int,
  tokenizer: tokenizer_lib.Tokenizer,
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
      row["values"] = [round(float(x), 4) for x in measures[place]]
    rows.append(row)
  return rows
