"""Cutting observations: documents give way, the frame never does."""

import numpy as np

from stepsearch_jax.env.search_env import Observation
from stepsearch_jax.rollout.observations import encode, fair_shares


class Letters:
  """A tokenizer whose tokens are letters."""

  def encode(self, text):
    return [ord(c) for c in text]

  def decode(self, tokens):
    return "".join(map(chr, tokens))


def test_fair_shares_equal_water_filling_by_hand():
  assert fair_shares([10, 2, 10], 12) == [5, 2, 5]
  assert fair_shares([3, 3], 100) == [3, 3]
  assert fair_shares([5, 5, 5], 7) == [2, 2, 3]
  assert fair_shares([5], -3) == [0]


def test_fair_shares_use_all_room_and_favour_nobody():
  rng = np.random.default_rng(0)
  for _ in range(100):
    sizes = rng.integers(0, 30, rng.integers(1, 6)).tolist()
    room = int(rng.integers(0, 100))
    shares = fair_shares(sizes, room)
    assert sum(shares) == min(sum(sizes), room)
    cut = [s for s, z in zip(shares, sizes, strict=True) if s < z]
    if cut:
      assert max(shares) <= min(cut) + 1


def test_only_documents_are_cut_and_cuts_are_counted():
  seen = Observation("<i>", ["aaaaaaaa", "bb"], "</i>")
  done = encode(seen, Letters(), 13)
  assert Letters().decode(done.tokens) == "<i>aaaabb</i>" and done.cut == 1
  done = encode(seen, Letters(), 99)
  assert Letters().decode(done.tokens) == seen.text and done.cut == 0
  done = encode(seen, Letters(), 3)
  assert Letters().decode(done.tokens) == "<i></i>" and done.cut == 2


def test_a_cut_document_still_ends_its_line():
  seen = Observation("<i>", ["aaaaaaa\n", "bb"], "</i>")
  done = encode(seen, Letters(), 13)
  assert Letters().decode(done.tokens) == "<i>aaa\nbb</i>" and done.cut == 1
