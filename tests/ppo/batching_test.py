"""Trajectories to batches, and batches to packed rows."""

import dataclasses
import json

import fakes
import numpy as np
import pytest
from ppo import parts

from stepsearch_jax import types
from stepsearch_jax.ppo import batching

PROMPT, POLICY, SEEN = (int(p) for p in types.Provenance)


def turn(action="search", retrieved=False):
  action = types.Action(action)
  return types.Turn("", action, "", (), "", 0, retrieved=retrieved)


def trajectory(runs, question, turns):
  """One of runs of (provenance, turn, tokens)."""
  tokens, provenance, index = [], [], []
  for who, number, ids in runs:
    tokens += ids
    provenance += [who] * len(ids)
    index += [number] * len(ids)
  provenance = np.asarray(provenance, np.int8)
  logprobs = np.where(provenance == POLICY, -0.5 * np.arange(len(tokens)), 0)
  return types.Trajectory(
    question, 0, np.asarray(tokens, np.int32), provenance,
    np.asarray(index, np.int16), logprobs.astype(np.float32), turns, None,
    types.StopReason.ANSWER,
  )


def searches(question, *observations, answers=True):
  """A trajectory that searches once per observation and then answers."""
  runs, turns = [(PROMPT, -1, [1, 2])], []
  for number, seen in enumerate(observations):
    runs += [(POLICY, number, [10 + number]), (SEEN, number, list(seen))]
    turns.append(turn(retrieved=True))
  runs.append((POLICY, len(observations), [7, 0]))
  if answers:  # Its last token alone, behind the tag.
    place = sum(len(ids) for *_, ids in runs) - 1
    turns.append(dataclasses.replace(turn("answer"), answer_position=place))
  return trajectory(runs, question, turns)


@pytest.fixture
def batch():
  ask = fakes.make_questions(1)[0]  # One id for both questions.
  played = [
    searches(ask, (3, 4), (5,)), searches(ask, (3, 4), (3, 4)),
    searches(ask, (3, 4)), searches(ask, answers=False),
  ]
  rewards = [np.where(t.policy_mask, t.tokens, 0) for t in played]
  return played, batching.trajectories_to_batch(played, rewards, 12, 99, 2)


def test_rows_are_padded_copies(batch):
  played, found = batch
  for row, t in enumerate(played):
    size = len(t.tokens)
    assert found.lengths[row] == size
    assert found.tokens[row].tolist() == [*t.tokens, *[99] * (12 - size)]
    on = [*t.policy_mask, *[False] * (12 - size)]
    assert (found.policy_mask[row] > 0).tolist() == on
    want = np.where(t.policy_mask, t.tokens, 0)
    assert found.token_rewards[row, :size].tolist() == want.tolist()
    assert found.rollout_logp[row, :size].tolist() == t.logprobs.tolist()
    assert not found.token_rewards[row, size:].any()


def test_groups_go_by_place_and_not_by_the_questions_id(batch):
  assert batch[1].group.tolist() == [0, 0, 1, 1]


def test_turns_number_policy_tokens_only(batch):
  assert batch[1].turn[0].tolist() == [
    -1, -1, 0, -1, -1, 1, -1, 2, 2, -1, -1, -1
  ]
  assert batching.count_turns(batch[1].turn) == 3 + 3 + 2 + 1


def test_states_are_equal_where_question_and_last_observation_are(batch):
  anchor = batch[1].anchor
  assert anchor.shape == (4, 8)  # Padded, so that shapes rarely change.
  a, b, c, d = anchor
  assert a[0] == b[0] and c[0] == d[0] and a[0] != c[0]  # The prompts.
  assert a[1] == b[1] == b[2] != a[2]  # (3, 4) again, inside a row as well.
  assert c[1] not in anchor[:2]  # The same words after another question.
  assert (anchor[:, 3:] == -1).all() and d[1] == -1


def test_searches_and_answers_are_counted(batch):
  assert batch[1].searches.tolist() == [2, 2, 1, 0]
  sizes = [len(t.tokens) for t in batch[0]]
  assert batch[1].answer_start.tolist() == [*(n - 1 for n in sizes[:3]), 12]


def test_dropped_tokens_leave_mask_turn_and_recorded_logp(batch):
  played = batch[0]
  zeros = [np.zeros(len(t.tokens), np.float32) for t in played]
  found = batching.trajectories_to_batch(played, zeros, 12, 99, 2, [0])
  gone = (found.tokens == 0) & (found.turn < 0)
  assert gone.sum() == 4 and not found.policy_mask[gone].any()
  assert not found.rollout_logp[gone].any()


def test_what_does_not_fit_is_refused(batch):
  played = batch[0]
  zeros = [np.zeros(len(t.tokens), np.float32) for t in played]
  with pytest.raises(types.UserError, match="10 tokens, rollout.context is 8"):
    batching.trajectories_to_batch(played, zeros, 8, 99, 2)
  with pytest.raises(ValueError, match="4 trajectories .* groups of 3"):
    batching.trajectories_to_batch(played, zeros, 12, 99, 3)


@pytest.mark.parametrize("seed", range(3))
def test_packing_holds_every_token_once_and_comes_back(seed):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 30, 20)
  rows = rng.permutation(20)[:13]
  packing = batching.pack(rows, lengths, 30, 40)
  packing = packing.padded(len(packing.source) + 3)
  assert (packing.source[-3:] < 0).all()
  array = rng.normal(size=(20, 30))
  want = np.zeros_like(array)
  for row in rows:
    want[row, : lengths[row]] = array[row, : lengths[row]]
  np.testing.assert_array_equal(
    packing.unpack(packing.pack(array)), want
  )
  filled = packing.source >= 0
  assert filled.sum() == lengths[rows].sum()
  assert packing.padding_share == pytest.approx(1 - filled.mean())
  assert ((packing.segment_ids > 0) == filled).all()
  for r, row in enumerate(packing.segment_ids):
    for segment in set(row) - {0}:  # Whole, side by side, from position 0 on.
      where = np.nonzero(row == segment)[0]
      assert (np.diff(where) == 1).all()
      steps = packing.positions[r, where]
      assert steps.tolist() == list(range(len(where)))
      assert len(set(packing.source[r, where] // 30)) == 1


def test_packing_goes_by_length_and_not_by_the_loss_mask():
  packing = batching.pack([0, 1], np.array([6, 4]), 8, 10)
  assert len(packing.source) == 1
  assert packing.source[0].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]


def test_a_trajectory_longer_than_a_row_is_refused():
  with pytest.raises(types.UserError, match="11 tokens .* row of 10"):
    batching.pack([0], np.array([11]), 12, 10)


@pytest.mark.parametrize("rows, whole, tail, want", [
  (32, 16, 4, [16, 16]),
  (2, 16, 4, [4]),
  (18, 16, 4, [16, 4]),
  (25, 16, 4, [16, 4, 4, 4]),
  (29, 16, 4, [16, 16]),  # Four small ones compute as much.
  (16, 16, 4, [16]),
  (5, 2, 2, [2, 2, 2]),  # No smaller size.
  (9, 16, 8, [16]),
  (1, 1, 1, [1]),
])
def test_the_tail_of_a_mini_batch_computes_few_empty_rows(
  rows, whole, tail, want
):
  found = batching.micro_sizes(rows, whole, tail)
  assert found == want
  assert batching.micro_sizes(sum(found), whole, tail) == found


def test_sizes_hold_all_rows_and_never_an_empty_micro_batch():
  for whole in (1, 2, 4, 16):
    for tail in {1, max(whole // 4, 1), whole}:
      for rows in range(1, 70):
        found = batching.micro_sizes(rows, whole, tail)
        assert sum(found) >= rows > sum(found[:-1])
        assert sum(found) - rows < whole
        assert set(found) <= {whole, tail}


@pytest.mark.parametrize("micro_rows, shards, want", [
  (16, 1, 4), (16, 8, 8), (8, 8, 8), (4, 1, 1), (2, 1, 2), (1, 1, 1),
  (12, 4, 4),
])
def test_the_small_size_divides_over_the_data_shards(micro_rows, shards, want):
  spec = parts.learner_spec(batch__micro_rows=micro_rows).batch
  assert spec.tail_rows(shards) == want


@pytest.mark.parametrize("micro_rows, length, want", [
  (16, 4096, 1), (16, 2048, 2), (16, 1500, 3), (16, 512, 4), (2, 4096, 2),
])
def test_the_small_size_is_what_keeps_a_device_busy(micro_rows, length, want):
  spec = parts.learner_spec(
    batch__micro_rows=micro_rows, batch__row_length=length
  ).batch
  assert spec.tail_rows(1) == want


def test_recorded_rollouts_leave_little_empty_at_the_released_batch(shared):
  """Mini-batches of 32 behind the template's 271 tokens, 244 in common."""
  recorded = json.loads((shared / "bench/workload.json").read_text())
  rows = recorded["workloads"]["32"]["trajectories"]
  lengths = np.array([271 + sum(map(sum, row["turns"])) for row in rows])
  heads = np.arange(271) + 1000 * np.arange(32)[:, None]
  heads[:, :244] = np.arange(244)
  spec = parts.learner_spec(
    batch__micro_rows=16, batch__row_length=4096
  ).batch
  packing = batching.pack(range(32), lengths, 4096, 4096, heads)
  sizes = batching.micro_sizes(len(packing.source), 16, spec.tail_rows(1))
  assert packing.padded(sum(sizes)).padding_share <= 0.12


def same_within(rng, questions, rollouts, common, head):
  """(lengths, heads): equal prompts per question, `common` in all of them."""
  count = questions * rollouts
  names = np.repeat(np.arange(questions), rollouts)
  heads = np.arange(head) + 1000 * (1 + names[:, None])
  heads[:, :common] = np.arange(common)
  return head + rng.integers(5, 60, count), heads


@pytest.mark.parametrize("rollouts", [1, 2, 4])
@pytest.mark.parametrize("common", [0, 3, 12])
def test_sharing_never_takes_more_rows_than_not_sharing(rollouts, common):
  for seed in range(20):
    rng = np.random.default_rng(seed)
    lengths, heads = same_within(rng, 6, rollouts, common, 18)
    places = range(len(lengths))
    plain = batching.pack(places, lengths, 100, 128)
    shared = batching.pack(places, lengths, 100, 128, heads)
    assert len(shared.source) <= len(plain.source)
    if len(shared.source) == len(plain.source):
      assert shared.padding_share >= plain.padding_share


def test_a_trajectory_that_shares_little_joins_where_it_fits():
  # 6 tokens of two are equal; the third has nothing in common with them.
  heads = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [9] * 6])
  packing = batching.pack(range(3), np.array([8, 8, 4]), 20, 20, heads)
  assert len(packing.source) == 1


def first_fit(lengths, row_length):
  """First-fit-decreasing as everybody writes it."""
  rows = []
  for b in sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)):
    fitting = [row for row in rows
               if sum(lengths[i] for i in row) + lengths[b] <= row_length]
    if fitting:
      fitting[0].append(b)
    else:
      rows.append([b])
  return rows


@pytest.mark.parametrize("seed", range(4))
def test_without_prefixes_a_trajectory_goes_where_it_first_fits(seed):
  lengths = np.random.default_rng(seed).integers(1, 30, 60)
  packing = batching.pack(range(60), lengths, 30, 32)
  found = [[int(row[i] // 30) for i in np.nonzero(
              (packing.positions[r] == 0) & (row >= 0))[0]]
           for r, row in enumerate(packing.source)]
  assert found == first_fit(lengths.tolist(), 32)


def test_many_demonstrations_are_packed_fast_enough_to_wait_for():
  lengths = np.random.default_rng(0).integers(40, 128, 16_000)
  packing = batching.pack(range(16_000), lengths, 128, 160)
  assert (packing.source >= 0).sum() == lengths.sum()
