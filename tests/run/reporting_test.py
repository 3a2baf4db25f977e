"""Two rollouts by hand to every metric of a batch, and the summary."""

import dataclasses
import types as builtin

import numpy as np
import pytest

from configs import quickstart
from stepsearch_jax import types
from stepsearch_jax.rewards import step_rewards
from stepsearch_jax.rollout import records
from stepsearch_jax.run import reporting
from stepsearch_jax.run.settings import Settings
from stepsearch_jax.run.state import RunState

SEARCH, ANSWER, INVALID = types.Action


def turn(action, **changes):
  return types.Turn("", action, "", (), "", 0, **changes)


def trajectory(policy, others, turns, answer, cut):
  who = [types.Provenance.PROMPT] * others + [types.Provenance.POLICY] * policy
  count = len(who)
  return types.Trajectory(
    types.Question("q", "?", ("a",)), 0, np.zeros(count, np.int32),
    np.array(who, np.int8), np.zeros(count, np.int16),
    np.zeros(count, np.float32), turns, answer, types.StopReason.ANSWER, cut,
  )


ROLLOUTS = [
  trajectory(5, 11, [
    turn(SEARCH, retrieved=True), turn(SEARCH, retrieved=True),
    turn(SEARCH, failed=True), turn(ANSWER),
  ], "a", 3),
  trajectory(8, 20, [turn(INVALID), turn(SEARCH, retrieved=True)], None, 0),
]
PARTS = [
  step_rewards.RewardParts(
    score=1.25, answer_correct=0.5, search_key_score=0.75,
    step_scores=[0.5, -0.25], information_gains=[0.625, 0.25],
    redundancy_penalty=[0.0, 0.5], key_gains=[0.5, 0.25],
  ),
  step_rewards.RewardParts(  # As the released code ends early.
    score=-1.0, answer_correct=0.0, search_key_score=0.25, step_scores=[],
    information_gains=None, redundancy_penalty=None, key_gains=[],
  ),
]


def test_every_reward_metric_by_hand():
  assert reporting.reward_metrics(ROLLOUTS, PARTS) == {
    "critic/score/mean": 0.125,
    "critic/answer_correct/mean": 0.25,
    "critic/search_key/mean": 0.5,
    "critic/step_scores/mean": 0.125,
    "critic/information_gain/mean": 0.4375,
    "critic/redundancy/mean": 0.25,
    "env/searches_per_question": 1.5,
    "env/turns_per_question": 3.0,
    "env/invalid_share": 0.5,
    "env/unanswered_share": 0.5,
    "env/truncated_documents": 1.5,
    "response_length/mean": 6.5,
    "response_length/max": 8.0,
    "total_length/mean": 22.0,
  }


def test_a_rollout_is_cut_by_its_context_or_by_a_turn():
  def share(context, max_turn, **changes):
    rollouts = [dataclasses.replace(ROLLOUTS[0], **changes), ROLLOUTS[1]]
    return reporting.clip_ratio(rollouts, context, max_turn)

  assert share(29, 9) == 0.0
  assert share(28, 9) == 0.5  # 28 tokens.
  assert share(29, 8) == 0.5  # 8 in one turn.
  assert share(29, 5) == 1.0
  # 3 and 2 tokens in two turns.
  turns = np.array([-1] * 11 + [0, 0, 0, 1, 1], np.int16)
  assert share(29, 5, turn_index=turns) == 0.5
  assert share(29, 9, stop_reason=types.StopReason.CONTEXT) == 0.5


def test_throughput_is_per_device(monkeypatch):
  monkeypatch.setattr(reporting.jax, "device_count", lambda: 4)
  assert reporting.throughput(600, 3.0) == {
    "perf/total_num_tokens": 600, "perf/throughput": 50.0
  }


def test_every_rollout_metric_by_hand():
  stats = records.RolloutStats(
    policy_tokens=30, ingested_tokens=70, slot_steps=200, idle_slot_steps=50,
    failed_searches=2, seconds=4.0, retrieval_wait_seconds=1.0,
    extend_seconds=0.5, decode_seconds=2.5, probe_seconds=0.3,
  )
  assert reporting.rollout_metrics(stats, 6.0) == {
    "perf/tokens_per_second": 25.0,
    "perf/policy_tokens_per_second": 7.5,
    "env/failed_searches": 2,
    "perf/idle_slot_share": 0.25,
    "timing_s/gen_decode": 2.5,
    "timing_s/gen_extend": 0.5,
    "perf/retrieval_wait_share": 0.25,
    "timing_s/gen_retrieval_wait": 1.0,
    "timing_s/gen_probe": 0.3,
    "perf/probe_share": pytest.approx(0.05),
  }


def test_the_summary_has_the_first_and_the_last_evaluation():
  config = quickstart.get_config("runlocal")
  config.seed, config.method = 5, "ppo"
  state = RunState(9, learner=None, seconds=12.5)
  for em in (0.1, 0.9, 0.4):
    state.note_evaluation({"em": em, "f1": em / 2, "searches": 10 * em})
  got = reporting.summary(Settings.from_config(config, devices=1), state)
  want = dict(
    em_before=0.1, em_after=0.4, f1_before=0.05, f1_after=0.2,
    searches_per_question=4.0, train_seconds=12.5, steps=9, seed=5,
  )
  assert {name: got[name] for name in want} == pytest.approx(want)
  assert "ppo" in got.values()


@pytest.mark.parametrize("changes, want", [
  ({}, "greedy"),
  ({"temperature": 0.7}, "sampled at temperature 0.7, 1 attempts"),
  ({"temperature": 1.0, "attempts": 4, "top_k": 20, "top_p": 0.9},
   "sampled at temperature 1, top_k 20, top_p 0.9, 4 attempts"),
])
def test_the_card_says_how_tokens_were_chosen(
  monkeypatch, tmp_path, changes, want
):
  class Retriever:
    def describe(self):
      return {}

  config = quickstart.get_config("runlocal")
  config.ppo.old_logp = "recompute"
  for field in ("top_k", "top_p"):
    if field in changes:
      config.rollout[field] = changes.pop(field)
  parts = builtin.SimpleNamespace(
    settings=Settings.from_config(config, devices=1), retriever=Retriever(),
    lacking=lambda questions: None, engine=None, tokenizer=None,
  )
  jobs = []
  monkeypatch.setattr(
    reporting.playing, "evaluate", lambda *given: jobs.append(given[-1])
  )
  reporting.evaluate(
    parts, None, "m", tmp_path, questions=[ROLLOUTS[0].question], **changes
  )
  assert jobs[0].settings["decoding"].startswith(want)
  assert jobs[0].described == config.log.trajectories > 0


@pytest.mark.parametrize("changes, split", [
  ({}, "held out"), ({"data.split": "validation"}, "validation"),
  ({"data.eval": "dev.jsonl", "data.split": "validation"}, "evaluation file"),
])
def test_a_card_says_which_questions_were_asked(changes, split):
  config = quickstart.get_config("runlocal")
  config.update_from_flattened_dict(changes)
  retriever = builtin.SimpleNamespace(describe=dict)
  settings = Settings.from_config(config, devices=1)
  assert reporting.card_settings(settings, retriever, "m")["split"] == split
