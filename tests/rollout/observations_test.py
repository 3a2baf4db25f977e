"""Cutting observations: documents give way, the frame never does."""

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.env.prompts import ShownDocument
from stepsearch_jax.env.search_env import Observation
from stepsearch_jax.rollout.observations import encode, fair_shares


class Letters:
  """A tokenizer whose tokens are letters."""

  def encode(self, text):
    return [ord(c) for c in text]

  def decode(self, tokens):
    return "".join(map(chr, tokens))


def observation(*documents):
  return Observation("<i>", [ShownDocument(*d) for d in documents], "</i>")


def test_fair_shares_equal_water_filling_by_hand():
  assert fair_shares([10, 2, 10], 12) == [5, 2, 5]
  assert fair_shares([3, 3], 100) == [3, 3]
  assert fair_shares([5, 5, 5], 7) == [2, 2, 3]
  assert fair_shares([5], -3) == [0]


def test_fair_shares_use_all_room_and_favor_nobody():
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
  seen = observation(("", "aaaaaaaa", ""), ("", "bb", ""))
  done = encode(seen, Letters(), 13)
  assert Letters().decode(done.tokens) == "<i>aaaabb</i>" and done.cut == 1
  done = encode(seen, Letters(), 99)
  assert Letters().decode(done.tokens) == seen.text and done.cut == 0
  done = encode(seen, Letters(), 3)
  assert Letters().decode(done.tokens) == "<i></i>" and done.cut == 2


def test_a_cut_document_still_ends_its_line():
  seen = observation(("", "aaaaaaa", "\n"), ("", "bb", ""))
  done = encode(seen, Letters(), 13)
  assert Letters().decode(done.tokens) == "<i>aaa\nbb</i>" and done.cut == 1


def test_what_is_left_of_each_text_is_told_without_its_label():
  """Room for 12 letters: a cut text, a whole one, one cut inside its label."""
  seen = observation(("1:", "aaaaaaaa", "\n"), ("2:", "b", "\n"),
                     ("label:", "cccccc", ""))
  done = encode(seen, Letters(), 7 + 12)
  assert Letters().decode(done.tokens) == "<i>1:a\n2:b\nlabe</i>"
  assert done.parts == ("a", None, "") and done.cut == 2
  passages = [types.Passage(x, x, f"raw {x}") for x in "abc"]
  assert done.shown(passages) == ("a", "raw b", "")
  assert encode(seen, Letters(), 99).shown(passages) is None


def test_half_a_character_at_the_cut_is_not_shown():
  class Bytes:
    def encode(self, text):
      return list(text.encode())

    def decode(self, tokens):
      return bytes(tokens).decode(errors="replace")

  seen = observation(("", "ab\u00e9", ""))
  assert encode(seen, Bytes(), 7 + 3).parts == ("ab",)
