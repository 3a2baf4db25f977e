"""What of a rollout counts, and on which token it is paid."""

import dataclasses

import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.rewards import step_rewards, token_rewards

PAPER = step_rewards.RewardSpec.paper()


def trajectory(*turns, answer=None):
  """Two policy tokens per turn behind a prompt of three."""
  count = 3 + 2 * len(turns)
  who = np.full(count, types.Provenance.POLICY, np.int8)
  who[:3] = types.Provenance.PROMPT
  index = np.full(count, -1, np.int16)
  index[3:] = np.repeat(np.arange(len(turns)), 2)
  return types.Trajectory(
    types.Question("q", "?", ("Ada Brandt",)), 0, np.zeros(count, np.int32),
    who, index, np.zeros(count, np.float32),
    [
      types.Turn(text, action, "x", (), "", 4 + 2 * i,
                 retrieved=action == types.Action.SEARCH)
      for i, (action, text) in enumerate(turns)
    ],
    answer, types.StopReason.ANSWER,
  )


@pytest.mark.parametrize("action, text, whole", [
  (types.Action.ANSWER, "<answer> Ada </answer>", True),
  (types.Action.ANSWER, "<answer> Ada </answer> \n", True),
  (types.Action.ANSWER, "<answer> Ada </answer> so", False),
  (types.Action.INVALID, "Ada </answer>", False),  # Never opened.
  (types.Action.SEARCH, "<search> </answer>", False),
])
def test_only_an_answer_that_ends_the_rollout_is_well_formed(
  action, text, whole
):
  seen = token_rewards.evidence(trajectory((action, text), answer="Ada"))
  assert seen.well_formed == whole


def test_the_weight_of_search_keys_is_the_settings():
  seen = step_rewards.Evidence(["Larn founder"], [], "Ada Brandt", True)
  gold = step_rewards.Gold(("Ada Brandt",), (("Larn founder",), ("Ada",)), ())
  for weight in (0.0, 0.25, 2.0):
    spec = dataclasses.replace(PAPER, gamma_key=weight)
    parts = step_rewards.score(spec, seen, gold)
    assert parts.search_key_score == 0.5
    assert parts.score == pytest.approx(1.0 + 0.5 * weight)


def test_rewards_fall_on_closing_tokens_and_the_outcome_on_the_last():
  rollout = trajectory(
    (types.Action.SEARCH, ""), (types.Action.SEARCH, ""),
    (types.Action.ANSWER, ""),
  )
  parts = step_rewards.RewardParts(
    score=0.75, answer_correct=0.75, search_key_score=0.0,
    step_scores=[0.5, -0.25], information_gains=[0.5, 0.25],
    redundancy_penalty=[0.0, 0.5], key_gains=[0.125, 0.0],
  )
  spec = dataclasses.replace(PAPER, search_bonus=2.0)
  found = token_rewards.reward(spec, rollout, parts)
  want = [0, 0, 0, 0, 0.6 * 0.5 + 2, 0, 0.6 * -0.25 + 2, 0, 0.75]
  np.testing.assert_allclose(found.tokens, want, rtol=1e-6)
  assert [t.paid for t in found.turns] == pytest.approx([2.3, 1.85, 0.75])
  assert [t.step for t in found.turns] == pytest.approx([2.3, 1.85, 0.0])
  assert [t.gain for t in found.turns] == [0.5, 0.25, 0.0]
  assert [t.redundancy for t in found.turns] == [0.0, 0.5, 0.0]
  assert [t.key for t in found.turns] == [0.125, 0.0, 0.0]
