"""A kept rollout says what each token earned, and what each turn was shown."""

import dataclasses

import fakes
import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.ppo import records
from stepsearch_jax.rewards import probe_rewards, step_rewards, token_rewards
from stepsearch_jax.run import trajectories


@pytest.fixture(scope="module")
def played():
  tokenizer = fakes.make_tokenizer()
  gold = types.Passage("g", "Silent Harbor", "directed by Ada Brandt.")
  question = types.Question(
    "q", "Who?", ("Ada Brandt",), support=(gold,),
    search_keys=(("Silent Harbor director",),),
  )
  pieces = [
    ("Question: Who?", types.Provenance.PROMPT, -1),
    ("<search> Silent Harbor </search>", types.Provenance.POLICY, 0),
    ("<information> Ada Brandt </information>",
     types.Provenance.OBSERVATION, 0),
    ("<answer> Ada Brandt </answer>", types.Provenance.POLICY, 1),
  ]
  tokens, provenance, turn = [], [], []
  for text, who, index in pieces:
    ids = tokenizer.encode(text)
    tokens += ids
    provenance += [int(who)] * len(ids)
    turn += [index] * len(ids)
  ends = np.nonzero(np.diff([*turn, 9]))[0]
  trajectory = types.Trajectory(
    question, 5, np.int32(tokens), np.int8(provenance), np.int16(turn),
    -np.arange(len(tokens), dtype=np.float32),
    [
      types.Turn(
        pieces[1][0], types.Action.SEARCH, "Silent Harbor", (gold,),
        pieces[2][0],
        int(np.nonzero(np.array(provenance) == 1)[0][
          len(tokenizer.encode(pieces[1][0])) - 1]),
        retrieved=True,
      ),
      types.Turn(pieces[3][0], types.Action.ANSWER, "Ada Brandt", (), "",
                 int(ends[-1])),
    ],
    "Ada Brandt", types.StopReason.ANSWER,
  )
  return tokenizer, trajectory, pieces


@pytest.fixture(scope="module")
def row(played):
  tokenizer, trajectory, pieces = played
  (reward,) = token_rewards.score_trajectories(
    step_rewards.PRESETS["paper"](), [trajectory], tokenizer
  )
  count = len(trajectory.tokens)
  numbers = np.arange(count, dtype=np.float32)[None]
  masks = records.Masks(*[trajectory.policy_mask[None]] * 3)
  experience = records.Experience(
    None, masks, numbers, numbers - 0.5, 2 * numbers, 3 * numbers, numbers,
    numbers, 0.0, 4 * numbers,
  )
  (found,) = trajectories.describe(
    [trajectory], [reward], tokenizer, experience
  )
  return found, reward, pieces


def test_tokens_spell_the_rollout_behind_the_prompt(row):
  found, _, pieces = row
  assert found["prompt"] == pieces[0][0]
  text = "".join(token["text"] for token in found["tokens"])
  assert text == "".join(piece for piece, _, _ in pieces[1:])


def test_a_tracker_gets_the_gist(row):
  found, _, _ = row
  assert trajectories.brief(found) == {
    "question": "Who?", "answer": "Ada Brandt", "gold": "Ada Brandt",
    "reward": found["reward"], "searches": 1,
  }
  assert trajectories.brief(found | {"prediction": None})["answer"] == ""


def test_only_policy_tokens_carry_values_each_its_own(row):
  found, reward, _ = row
  start = len(reward.tokens) - len(found["tokens"])
  paid = 0.0
  for place, token in enumerate(found["tokens"], start):
    if "values" not in token:
      continue
    earned, advantage, logp, kl, value, entropy = token["values"]
    assert (advantage, logp, kl, value, entropy) == (
      3 * place, place, 0.5, 2 * place, 4 * place
    )
    paid += earned
  assert paid == pytest.approx(found["reward"], abs=1e-3)
  turns = {t["turn"] for t in found["tokens"] if "values" in t}
  assert turns == {0, 1}


def test_what_only_a_learner_knows_is_absent_from_an_evaluation(row, played):
  tokenizer, trajectory, _ = played
  spec = step_rewards.PRESETS["paper"]()
  found = trajectories.describe_evaluated(spec, tokenizer, trajectory)
  start = found["start"]
  for ours, theirs in zip(found["tokens"], row[0]["tokens"], strict=True):
    assert ("values" in ours) == ("values" in theirs)
    if "values" in ours:
      assert ours["values"] == [theirs["values"][0], None, -start, *[None] * 3]
    start += 1
  del found["tokens"]
  assert found == {k: v for k, v in row[0].items() if k != "tokens"}


def test_an_evaluation_pays_no_probes_and_survives_a_reward_that_fails(
  row, played, monkeypatch
):
  tokenizer, trajectory, _ = played
  spec = step_rewards.PRESETS["paper"]()
  probing = dataclasses.replace(spec, probe=dataclasses.replace(
    spec.probe, reward=probe_rewards.Kind.IGPO))
  found = trajectories.describe_evaluated(probing, tokenizer, trajectory)
  assert found["reward"] == row[0]["reward"]
  broken = dataclasses.replace(spec, function="no_such_module:reward")
  assert trajectories.describe_evaluated(broken, tokenizer, trajectory) is None


@pytest.mark.parametrize(("lacking", "place"), [("entropy", 5), ("values", 4)])
def test_what_no_pass_has_computed_is_absent(played, lacking, place):
  tokenizer, trajectory, _ = played
  numbers = np.zeros((1, len(trajectory.tokens)), np.float32)
  spec = step_rewards.PRESETS["paper"]()
  experience = records.Experience(
    None, records.Masks(numbers, numbers, numbers), *[numbers] * 6, 0.0, numbers
  )
  experience = dataclasses.replace(experience, **{lacking: None})
  (found,) = trajectories.describe(
    [trajectory],
    token_rewards.score_trajectories(spec, [trajectory], tokenizer),
    tokenizer, experience,
  )
  assert {
    tuple(x is None for x in token["values"])
    for token in found["tokens"] if "values" in token
  } == {tuple(i == place for i in range(6))}


def test_turns_mark_support_and_repeats(row):
  search, answer = row[0]["turns"]
  assert search["action"] == "search" and answer["documents"] == []
  assert search["documents"] == [{
    "title": "Silent Harbor", "text": "directed by Ada Brandt.",
    "support": True, "repeated": False,
  }]
  assert search["gain"] == pytest.approx(1.0)
  assert row[0]["em"] == 1.0 and row[0]["prediction"] == "Ada Brandt"
