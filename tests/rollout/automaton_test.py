"""The stop automaton against plain substring search."""

import numpy as np
import pytest

from stepsearch_jax.rollout.automaton import build_automaton

TAGS = ("</search>", "</answer>")


def first_stop_by_search(pieces, eos, specials=()):
  """Walks tokens; returns (token index, which) of the first stop, or None."""
  text = b""
  for i, (token, piece) in enumerate(pieces):
    if token in eos:
      return i, len(TAGS)
    if token in specials:
      text = b""
      continue
    text += piece
    found = [
      (text.find(tag.encode()) + len(tag), k)
      for k, tag in enumerate(TAGS)
      if tag.encode() in text
    ]
    if found:
      return i, min(found)[1]
  return None


def walk(automaton, tokens):
  state = 0
  for i, token in enumerate(tokens):
    state = automaton.table[state, token]
    if state >= automaton.first_stop:
      return i, state - automaton.first_stop
  return None


def random_vocabulary(rng, size):
  """Tokens made of tag fragments, so that merges cross tag boundaries."""
  alphabet = b"</searchanw> x\n"
  vocabulary = [bytes([b]) for b in sorted(set(alphabet))]
  source = b" x</search>\n<</answer></sea</search></ans</answer>x"
  while len(vocabulary) < size:
    start = rng.integers(0, len(source) - 1)
    piece = source[start : start + rng.integers(1, 14)]
    if piece not in vocabulary:
      vocabulary.append(piece)
  return vocabulary


@pytest.mark.parametrize("seed", range(4))
def test_first_stop_equals_substring_search_for_every_merge(seed):
  rng = np.random.default_rng(seed)
  vocabulary = random_vocabulary(rng, 120)
  special, eos = len(vocabulary), len(vocabulary) + 1
  automaton = build_automaton(vocabulary + [None, None], TAGS, [eos])
  stops = 0
  for _ in range(400):
    tokens = rng.integers(0, len(vocabulary) + 2, rng.integers(1, 24))
    pieces = [
      (t, vocabulary[t] if t < len(vocabulary) else b"") for t in tokens
    ]
    expected = first_stop_by_search(pieces, {eos}, {special})
    assert walk(automaton, tokens) == expected
    stops += expected is not None and expected[1] < 2
  assert stops > 50


def test_tag_split_over_single_bytes_and_overlap_prefix():
  vocabulary = [bytes([b]) for b in range(256)]
  automaton = build_automaton(vocabulary, TAGS, [])
  assert walk(automaton, b"a <</search>") == (11, 0)
  assert walk(automaton, b"</sea</search>") == (13, 0)
  assert walk(automaton, b"</answer </answer>") == (17, 1)
  assert walk(automaton, b"<search> q <search>") is None


def test_stop_states_absorb_and_special_token_breaks_a_tag():
  vocabulary = [b"</sea", b"rch>", b"</answer></search> x", None, None]
  automaton = build_automaton(vocabulary, TAGS, [4])
  assert walk(automaton, [0, 1]) == (1, 0)
  assert walk(automaton, [0, 3, 1]) is None
  assert walk(automaton, [2]) == (0, 1)
  stop = automaton.table[0, 2]
  assert (automaton.table[stop] == stop).all()
  assert automaton.table[0, 4] == automaton.first_stop + len(TAGS)
  assert automaton.table[0, 4] == len(automaton.table) - 1


def test_bad_arguments_name_what_was_expected():
  with pytest.raises(ValueError, match="non-empty"):
    build_automaton([b"a"], [], [])
  with pytest.raises(ValueError, match="vocabulary of 1"):
    build_automaton([b"a"], TAGS, [5])
