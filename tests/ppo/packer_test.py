"""Micro-batches of two sizes, both of which run in the first step."""

import dataclasses

import numpy as np
import pytest
from ppo import parts

from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import packer

LENGTH = 16


def made(lengths, **changes):
  """(packer, batch) of rows of 16 tokens, four to a micro-batch."""
  spec = parts.learner_spec(
    batch__micro_rows=4, batch__row_length=LENGTH, **changes
  )
  inside = np.arange(LENGTH) < np.asarray(lengths)[:, None]
  mask = inside & (np.arange(LENGTH) >= 1)
  batch = parts.rollout_batch(
    mask, mask.astype(np.float32),
    np.where(inside, 1 + np.arange(inside.size).reshape(inside.shape), 0)
    .astype(np.int32), np.asarray(lengths, np.int32),
  )
  return packer.Packer(spec, sharding.make_mesh()), batch


def sizes(micros):
  return [len(micro.tokens) for micro in micros]


@pytest.mark.parametrize("full, want, more", [
  (3, [1, 1, 1], [4]), (4, [4], [1]), (5, [4, 1], []), (8, [4, 4], [1]),
])
def test_the_size_that_is_missing_is_added_once(full, want, more):
  ours, batch = made([LENGTH] * full)
  micros = ours.micros(ours.packing(batch, range(full)), batch)
  assert sizes(micros) == want
  assert sizes(ours.both_sizes("policy", micros)) == want + more
  assert ours.both_sizes("policy", micros) is micros
  assert sizes(ours.both_sizes("value", micros)) == want + more


def test_what_is_added_holds_nothing():
  ours, batch = made([LENGTH] * 4)
  micros = ours.micros(ours.packing(batch, range(4)), batch)
  *_, empty = ours.both_sizes("scores", micros)
  for field in dataclasses.fields(empty):
    found = np.asarray(getattr(empty, field.name))
    full = np.asarray(getattr(micros[0], field.name))
    assert found.shape == (1, LENGTH) and found.dtype == full.dtype
    assert (found == (-1 if field.name == "turn" else 0)).all()


def test_a_mean_over_micro_batches_has_one_size():
  ours, batch = made([LENGTH] * 5, loss__micro_weighting="micro_mean")
  micros = ours.micros(ours.packing(batch, range(5)), batch)
  assert sizes(micros) == [4, 4]
  assert ours.both_sizes("policy", micros) == micros


def test_micro_batches_hold_every_token_once():
  lengths = [16, 9, 7, 3, 12, 16, 2]
  ours, batch = made(lengths)
  micros = ours.micros(
    ours.packing(batch, range(7)), batch, logp=batch.token_rewards
  )
  tokens = np.concatenate([np.ravel(micro.tokens) for micro in micros])
  want = [t for row, n in zip(batch.tokens, lengths, strict=True)
          for t in row[:n]]
  assert sorted(tokens[tokens > 0]) == sorted(want)
  scored = sum(float(np.sum(micro.logp)) for micro in micros)
  assert scored == batch.token_rewards.sum()
