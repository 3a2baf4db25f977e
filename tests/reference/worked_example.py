"""One trajectory from rewards to the loss of a token, with all numbers.

  python tests/reference/worked_example.py

prints the tables of the section "How a trajectory becomes a gradient" in
stepsearch_jax/README.md; tests/docs_test.py holds them equal.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.ppo import kl, losses, masked
from stepsearch_jax.ppo.estimators import gae
from stepsearch_jax.rewards import step_rewards, token_rewards

FILM = types.Passage(
  "1", "Blue Harbor", "Blue Harbor is a 1987 drama directed by Ida Lund."
)
DIRECTOR = types.Passage(
  "2", "Ida Lund", "Ida Lund was born in Bergen and studied in Oslo."
)
RADIO = types.Passage(
  "3", "Harbor Radio", "Harbor Radio broadcasts from Perth."
)
QUESTION = types.Question(
  "q", "In which city was the director of Blue Harbor born?", ("Bergen",),
  search_keys=(
    ("director Blue Harbor",), ("Ida Lund born", "Ida Lund birthplace")
  ),
  support=(FILM, DIRECTOR),
)
# Two tokens of prompt, two per policy turn and per observation.
TOKENS = ("Question", "?", "<search>", "</search>", "<info>", "</info>",
          "<search>", "</search>", "<info>", "</info>", "<answer>", "</answer>")
PROVENANCE = np.array([0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1], np.int8)
# What the models say of the six policy tokens.
LOGP = (-1.2, -0.2, -0.9, -0.5, -0.6, -0.3)
REFERENCE_LOGP = (-1.3, -0.2, -0.7, -0.6, -0.6, -0.3)
VALUES = (0.9, 1.0, 1.1, 1.2, 0.8, 0.9)
KL_COEF, GAMMA, LAM, CLIP = 0.1, 1.0, 1.0, 0.2
LATER_LOGP = -0.2  # Of the token below, in a later optimizer step.
CHOSEN = 7  # The token that closes the second search.


def trajectory() -> types.Trajectory:
  """Returns the trajectory: two searches, then an answer that is half right."""
  search, answer = types.Action.SEARCH, types.Action.ANSWER
  turns = [
    types.Turn(
      "<search>director of Blue Harbor</search>", search,
      "director of Blue Harbor", (FILM, RADIO), "", 3, retrieved=True,
    ),
    types.Turn(
      "<search>Ida Lund birthplace</search>", search, "Ida Lund birthplace",
      (DIRECTOR, RADIO), "", 7, retrieved=True,
    ),
    types.Turn(
      "<answer>the city of Bergen</answer>", answer, "the city of Bergen",
      (), "", 11,
    ),
  ]
  length = len(TOKENS)
  return types.Trajectory(
    QUESTION, 0, np.arange(length, dtype=np.int32), PROVENANCE,
    np.array([-1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2], np.int16),
    np.zeros(length, np.float32), turns, "the city of Bergen", "answer",
  )


def _over_row(values) -> jnp.ndarray:
  """Puts one number per policy token into a row [1, T]."""
  row = np.zeros(len(TOKENS), np.float32)
  row[PROVENANCE == types.Provenance.POLICY] = values
  return jnp.asarray(row)[None]


def _table(head: str, rows) -> list[str]:
  columns = head.count("|") - 1
  return [head, "|" + " --- |" * columns, *rows]


def lines() -> list[str]:
  """Returns the two tables and the last line of the section."""
  spec = step_rewards.RewardSpec.paper()
  done = trajectory()
  parts = step_rewards.score(
    spec, token_rewards.evidence(done), token_rewards.gold(QUESTION)
  )
  rewards = token_rewards.reward(spec, done, parts).tokens
  mask = jnp.asarray(done.policy_mask, jnp.float32)[None]
  logp, reference = _over_row(LOGP), _over_row(REFERENCE_LOGP)
  gap = kl.penalty(logp, reference, "kl")
  shaped = jnp.asarray(rewards)[None] - KL_COEF * gap
  values = _over_row(VALUES)
  advantages = gae.gae(shaped, values, mask, GAMMA, LAM)
  whitened = masked.whiten(advantages, mask)
  chosen = float(whitened[0, CHOSEN])
  log_ratio = LATER_LOGP - float(logp[0, CHOSEN])
  loss = losses.policy_loss(
    jnp.asarray(log_ratio), jnp.asarray(chosen), 1 - CLIP, 1 + CLIP
  ).loss
  first = _table("| search | gain | penalty | step reward |", [
    f"| {number} | {gain:.4f} | {penalty:.4f} | {step:.4f} |"
    for number, (gain, penalty, step) in enumerate(zip(
      parts.information_gains, parts.redundancy_penalty, parts.step_scores,
      strict=True,
    ), 1)
  ])
  second = _table(
    "| t | token | written by | reward | minus KL | value | advantage "
    "| whitened |",
    [
      f"| {t} | `{token}` | policy | {rewards[t]:.4f} | {shaped[0, t]:.4f} "
      f"| {values[0, t]:.1f} | {advantages[0, t]:.4f} "
      f"| {whitened[0, t]:.4f} |"
      for t, token in enumerate(TOKENS)
      if PROVENANCE[t] == types.Provenance.POLICY
    ],
  )
  outcome = (
    f"answer F1 {parts.answer_correct:.4f}, search keys "
    f"{parts.search_key_score:.4f}, outcome {parts.score:.4f}"
  )
  last = (
    f"t = {CHOSEN}: ratio {math.exp(log_ratio):.4f}, advantage {chosen:.4f}, "
    f"loss {float(loss):.4f}"
  )
  return [*first, "", outcome, "", *second, "", last]


if __name__ == "__main__":
  print("\n".join(lines()))
