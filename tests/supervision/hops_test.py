"""Decompositions by hand-worked cases."""

import dataclasses
from unittest import mock

import pytest

from stepsearch_jax import types
from stepsearch_jax.supervision import hops, pipeline

BARE = types.Question("b", "River of Ada Rook's birthplace?", ("Mossing",))


def test_questions_without_decomposition_get_a_written_one():
  class Hops:
    name = "hops"

    def write(self, prompts):
      assert "The final answer is: Mossing" in prompts[0]
      return ["1. Where was Ada Rook born? => Lintel\nWhere is #1? => Mossing"]

  own = dataclasses.replace(BARE, decomposition=(types.SubQuestion("?", "!"),))
  done, same = hops.decompose([BARE, own], Hops())
  assert [hop.answer for hop in done.decomposition] == ["Lintel", "Mossing"]
  assert same is own
  assert pipeline.resolved(done)[1] == "Where is Lintel?"


def test_passages_without_titles_give_no_hops():
  """A hop that asks for nothing could not be read back."""
  named = types.Passage.of("Lintel", "Lintel lies on the Mossing.")
  bare = types.Passage.of(" ", "Ada Rook is from Lintel.")
  for support in ((named, bare), (bare, named), (bare,)):
    question = dataclasses.replace(BARE, support=support)
    assert hops.decompose([question], None)[0].decomposition == ()


@pytest.mark.parametrize("steps", [
  None, "no steps at all", "Where was Ada Rook born? => Lintel",
  "Where is it? => Mossing\nWhere was Ada Rook born? => Lintel",
])
def test_supporting_passages_decompose_where_no_writer_reaches_the_answer(
  steps
):
  """The named passage comes first, whatever its place and its title's tail."""
  town = types.Passage.of("Lintel", "Lintel lies on the Mossing.")
  woman = types.Passage.of("Ada Rook (painter)", "Ada Rook is from Lintel.")
  bare = types.Question(
    "b", "River of Ada Rook's birthplace?", ("Mossing",), support=(town, woman)
  )

  def writer(text):
    return mock.Mock(write=lambda prompts: [text for _ in prompts])

  (done,) = hops.decompose([bare], steps and writer(steps))
  assert done.decomposition == (
    types.SubQuestion("Ada Rook", "Lintel", 1),
    types.SubQuestion("Lintel", "Mossing", 0),
  )
  right = "Where does she live? => the Mossing."
  (done,) = hops.decompose([bare], writer(right))
  assert [hop.support for hop in done.decomposition] == [-1]
