"""Probe rewards against plain numpy and by hand, and where they are paid."""

import dataclasses
import math

import fakes
import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.rewards import probe_rewards, step_rewards, token_rewards

SPEC = probe_rewards.ProbeRewardSpec("tips", 0.02, 1.0, "probability", 0.3)
NAN = np.nan


def spec_of(reward, **changes):
  return dataclasses.replace(SPEC, reward=reward, **changes)


def rollout(logp, sizes, others=None, texts=None, tokenizer=None):
  """Searches, and an answer behind them; the prompt is three tokens."""
  logp = np.float32(logp)
  turns = len(logp) - 1
  texts = texts or ["<search> one </search>"] * (turns - 1) + [
    "<answer> Ada </answer>"
  ]
  encode = tokenizer.encode if tokenizer else lambda text: [7, 8]
  tokens, who, index, made = [1, 2, 3], [0] * 3, [-1] * 3, []
  for number, text in enumerate(texts):
    ids = encode(text)
    tokens += ids
    who += [int(types.Provenance.POLICY)] * len(ids)
    index += [number] * len(ids)
    last = number == turns - 1
    made.append(types.Turn(
      text, types.Action.ANSWER if last else types.Action.SEARCH, "one", (),
      "" if last else "seen", len(tokens) - 1, retrieved=not last,
    ))
    if not last:
      tokens.append(9)
      who.append(int(types.Provenance.OBSERVATION))
      index.append(number)
  count = len(sizes)
  if others is None:
    others = np.zeros((turns + 1, 0, count))
  return types.Trajectory(
    types.Question("q", "?", ("Ada",)), 0, np.int32(tokens), np.int8(who),
    np.int16(index), np.zeros(len(tokens), np.float32), made, "Ada",
    types.StopReason.ANSWER,
    probe=types.AnswerProbe(logp, np.int32(sizes), np.float32(others)),
  )


def tables(turns, answers, sets, seed):
  """Random log-probabilities; behind the last turn there is nothing."""
  rng = np.random.default_rng(seed)
  logp = -rng.exponential(5, (turns + 1, answers))
  others = -rng.exponential(5, (turns + 1, sets, answers))
  logp[-1], others[0], others[-1] = NAN, NAN, NAN
  return logp, others


@pytest.mark.parametrize("tau", [1.0, 0.5, 3.0])
def test_tips_is_the_gain_of_the_soft_maximum(tau):
  logp, _ = tables(4, 3, 0, seed=1)
  found = probe_rewards.per_turn(
    spec_of("tips", tips_tau=tau, tips_alpha=0.05), rollout(logp, [1, 2, 3])
  )
  phi = [tau * math.log(sum(math.exp(x / tau) for x in row))
         for row in logp[:-1]]
  want = [0.05 * (b - a) for a, b in zip(phi, phi[1:], strict=False)] + [0]
  np.testing.assert_allclose(found, want, rtol=1e-4)
  # Nothing is lost or made up on the way.
  assert sum(found) == pytest.approx(0.05 * (phi[-1] - phi[0]), rel=1e-4)


@pytest.mark.parametrize("gain", ["probability", "log"])
def test_igpo_is_the_gain_of_the_best_mean_over_tokens(gain):
  logp, _ = tables(4, 3, 0, seed=2)
  sizes = [1, 4, 2]
  found = probe_rewards.per_turn(
    spec_of("igpo", igpo_gain=gain), rollout(logp, sizes)
  )
  best = [max(x / n for x, n in zip(row, sizes, strict=True))
          for row in logp[:-1]]
  if gain == "probability":
    best = [math.exp(v) for v in best]
  want = [b - a for a, b in zip(best, best[1:], strict=False)] + [0]
  np.testing.assert_allclose(found, want, rtol=1e-4)


def test_ig_search_is_what_other_documents_do_not_give():
  logp, others = tables(4, 2, 3, seed=3)
  sizes = [3, 2]
  found = probe_rewards.per_turn(
    spec_of("ig_search"), rollout(logp, sizes, others)
  )

  def v(row):
    return max(x / n for x, n in zip(row, sizes, strict=True))

  want = [
    0.3 * (v(logp[t]) - sum(map(v, others[t])) / 3) for t in range(1, 4)
  ] + [0]
  np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.parametrize("kind", ["tips", "igpo", "ig_search"])
def test_only_answers_that_had_room_on_both_sides_are_compared(kind):
  logp = np.array([[-1, -9], [NAN, -3], [NAN, NAN], [NAN, NAN]])
  others = np.full((4, 2, 2), NAN)
  others[1, 0] = [-2, -5]  # The second set was not to be had.
  found = probe_rewards.per_turn(
    spec_of(kind, tips_alpha=1.0, ig_search_alpha=1.0, igpo_gain="log"),
    rollout(logp, [1, 2], others),
  )
  # Of the second answer, from -9 to -3; of its two tokens, by -3 to -1.5.
  want = {"tips": 6, "igpo": 3, "ig_search": -1.5 - -2.5}[kind]
  assert found == pytest.approx([want, 0, 0])


@pytest.mark.parametrize("kind", ["tips", "igpo", "ig_search"])
def test_without_any_answer_or_other_documents_nothing_is_earned(kind):
  none = rollout(np.zeros((3, 0)), [])
  assert probe_rewards.per_turn(spec_of(kind), none) == [0, 0]
  alone = rollout([[-2], [-1], [NAN]], [1])
  earned = probe_rewards.per_turn(spec_of(kind), alone)
  assert (earned[0] == 0) == (kind == "ig_search") and earned[1] == 0


def test_a_search_that_taught_nothing_earns_nothing():
  flat = rollout([[-2, -3], [-2, -3], [NAN, NAN]], [1, 1])
  for kind in ("tips", "igpo"):
    assert probe_rewards.per_turn(spec_of(kind), flat) == [0, 0]


def test_a_trajectory_that_was_not_probed_is_a_bug():
  bare = dataclasses.replace(rollout([[-1], [NAN]], [1]), probe=None)
  assert probe_rewards.per_turn(spec_of("none"), bare) == [0]
  with pytest.raises(ValueError, match="'q' was not probed"):
    probe_rewards.per_turn(SPEC, bare)


def score(spec, trajectory, tokenizer=None):
  rewards = dataclasses.replace(
    step_rewards.RewardSpec.paper(), outcome_only=True, probe=spec
  )
  (found,) = token_rewards.score_trajectories(rewards, [trajectory], tokenizer)
  return found


def test_a_turn_is_paid_at_its_closing_token_beside_the_outcome():
  found = score(
    spec_of("tips", tips_alpha=1.0), rollout([[-5], [-3], [-4], [NAN]], [1])
  )
  # Prompt, search, observation, search, observation, answer.
  want = [0, 0, 0, 0, 2, 0, 0, -1, 0, 0, 1]
  np.testing.assert_allclose(found.tokens, want, atol=1e-6)
  assert [turn.step for turn in found.turns] == pytest.approx([2, -1, 0])
  assert [turn.paid for turn in found.turns] == pytest.approx([2, -1, 1])
  assert found.parts.score == 1


def test_probe_rewards_come_beside_step_rewards():
  trajectory = rollout([[-5], [-3], [NAN]], [1])
  spec = dataclasses.replace(
    step_rewards.RewardSpec.paper(), search_bonus=0.25,
    probe=spec_of("tips", tips_alpha=1.0),
  )
  (found,) = token_rewards.score_trajectories(spec, [trajectory], None)
  assert found.turns[0].paid == pytest.approx(2.25)


@pytest.mark.parametrize("text, query", [
  ("I look. <search> Silent Harbor </search>", "Silent Harbor"),
  ("<search>Ada</search>", "Ada"),
  ("<search> a <search> Ada </search>", "a <search> Ada"),
])
def test_ig_search_pays_the_tokens_of_the_query(text, query):
  tokenizer = fakes.make_tokenizer()
  logp, others = [[-4], [-2], [NAN]], np.full((3, 1, 1), NAN)
  others[1] = -5
  trajectory = rollout(
    logp, [1], others, [text, "<answer> Ada </answer>"], tokenizer
  )
  found = score(spec_of("ig_search", ig_search_alpha=1.0), trajectory,
                tokenizer)
  paid = np.nonzero(found.tokens[:-1])[0]
  spelled = tokenizer.decode(trajectory.tokens[paid].tolist())
  assert spelled.strip() == query
  np.testing.assert_allclose(found.tokens[paid], 3 / len(paid), rtol=1e-6)
  assert found.turns[0].paid == pytest.approx(3)


def test_an_empty_query_is_paid_at_its_closing_token():
  tokenizer = fakes.make_tokenizer()
  others = np.full((3, 1, 1), NAN)
  others[1] = -5
  trajectory = rollout(
    [[-4], [-2], [NAN]], [1], others,
    ["<search></search>", "<answer> Ada </answer>"], tokenizer,
  )
  found = score(spec_of("ig_search", ig_search_alpha=1.0), trajectory,
                tokenizer)
  assert found.tokens[trajectory.turns[0].action_position] == 3


def test_metrics_are_means_of_the_best_answer_per_token():
  probes = [
    rollout([[-4, -9], [-2, -3], [NAN, NAN]], [1, 3]).probe,
    rollout([[-6], [NAN]], [2]).probe,
    rollout(np.zeros((2, 0)), []).probe,
  ]
  assert probe_rewards.metrics(probes) == pytest.approx({
    "probe/start": -3.0, "probe/end": -2.0, "probe/gain_per_turn": 2.0,
  })
  assert probe_rewards.metrics([]) == {}
