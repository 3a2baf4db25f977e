"""What a step logs of its rollouts, the same for every method."""

import numpy as np
import pytest

from configs import common
from stepsearch_jax import types
from stepsearch_jax.rewards import step_rewards, token_rewards
from stepsearch_jax.run import methods, reporting
from stepsearch_jax.run.settings import Settings

FIRST = types.Passage("1", "Kes", "The helmer of Kes is Mira.")
SECOND = types.Passage("2", "Mira", "As cradle Mira has Toron.")


def rollout(support, shown, answer="Toron"):
  """A search for "Kes helmer" that shows some passages, and an answer."""
  question = types.Question(
    "q", "Whence?", ("Toron",), search_keys=(("Kes helmer",), ("Mira cradle",)),
    support=support,
  )
  turns = [
    types.Turn("<search> Kes helmer </search>", types.Action.SEARCH,
               "Kes helmer", shown, "", 1, retrieved=True),
    types.Turn(f"<answer> {answer} </answer>", types.Action.ANSWER, answer, (),
               "", 3),
  ]
  return types.Trajectory(
    question, 1, np.arange(4, dtype=np.int32), np.int8([0, 1, 2, 1]),
    np.int16([-1, 0, 0, 1]), np.zeros(4, np.float32), turns, answer,
    types.StopReason.ANSWER,
  )


def logged(spec, rollouts):
  parts = [
    step_rewards.score(
      spec, token_rewards.evidence(t), token_rewards.gold(t.question))
    for t in rollouts
  ]
  return reporting.reward_metrics(rollouts, parts)


@pytest.mark.parametrize("method", sorted(methods.METHODS))
def test_every_method_logs_gain_redundancy_keys_and_recall(method):
  config = common.base()
  config.total_steps, config.method = 1, method
  config.batch.questions, config.batch.rollouts = 16, 8
  spec = Settings.from_config(config, devices=1).reward
  values = logged(spec, [
    rollout((FIRST, SECOND), (FIRST,)), rollout((FIRST, SECOND), ()),
  ])
  # One of two gold passages found in one of two rollouts.
  assert values["env/retrieval_recall"] == 0.25
  assert values["critic/search_key/mean"] == pytest.approx(0.5)
  # The whole of one of two gold texts, in one of two rollouts.
  assert values["critic/information_gain/mean"] == pytest.approx(0.25, abs=0.1)
  assert values["critic/redundancy/mean"] == 0.0
  assert values["critic/answer_correct/mean"] == 1.0


def test_recall_counts_only_questions_that_have_gold():
  spec = step_rewards.RewardSpec.paper()
  rollouts = [rollout((FIRST,), (FIRST,)), rollout((), (FIRST,))]
  assert logged(spec, rollouts)["env/retrieval_recall"] == 1.0
  assert "env/retrieval_recall" not in logged(spec, rollouts[1:])
