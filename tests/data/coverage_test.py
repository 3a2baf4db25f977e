"""What counts as a gold passage found, by hand-worked passages."""

import pytest

from stepsearch_jax import types
from stepsearch_jax.data import coverage

GOLD = types.Passage.of(
  "Ada Rook", "Ada Rook was born in Lintel, the second of nine children, and "
  "later ran the ferry over the Mossing until it was closed in 1961."
)


@pytest.mark.parametrize("title, text, found", [
  ("Ada Rook", GOLD.text, True),
  ("Another title", GOLD.text.upper() + "!", True),  # The same words.
  ('"Ada Rook"', "and later ran the ferry over the Mossing until it was "
   "closed", True),  # A piece, as wiki-18 has them.
  ("ada rook", GOLD.text + " Much more was written about her life, her boat, "
   "her letters and her nine brothers by others, in many volumes.", True),
  ("Ada Rook (ferry)", "and later ran the ferry over the Mossing", False),
  ("Ada Rook", "Ada Rook lived in a house by the sea and sold umbrellas to "
   "strangers for most of her days.", False),
  ("Ada Rook", "and later ran the barge over the Mossing", False),
  ("Ada Rook", "Ada Rook was born in Lintel, the second of seven children, and "
   "later ran a ferry over the Mossing until it was closed in 1962.", True),
  ("Ada Rook", "", False), ("", "", False),
])
def test_a_passage_is_found_by_its_words_or_title_and_most_words(
  title, text, found
):
  assert coverage.contains(types.Passage("9", title, text), GOLD) == found


def test_recall_is_the_share_of_gold_that_counts():
  other = types.Passage.of("Lintel", "Lintel lies on the Mossing.")
  third = types.Passage.of("Gap", "Nobody wrote this down.")
  noise = types.Passage("n", "Ada Rook", "Umbrellas.")
  gold = (GOLD, other)
  assert coverage.retrieval_recall(gold, [noise, GOLD, GOLD]) == 0.5
  assert coverage.retrieval_recall(gold, [other, noise, GOLD]) == 1.0
  assert coverage.retrieval_recall(gold, []) == 0.0
  assert coverage.retrieval_recall((*gold, third), [GOLD, other]) == (
    pytest.approx(2 / 3))
  assert coverage.retrieval_recall(
    (*gold, third), [GOLD, other], {third.id}) == 1.0


def test_recall_is_no_number_where_no_gold_can_be_found():
  assert coverage.retrieval_recall((), [GOLD]) is None
  assert coverage.retrieval_recall((GOLD,), [GOLD], {GOLD.id}) is None


def test_pieces_of_wiki_18_are_found_under_their_title(shared):
  from stepsearch_jax.retrieval.index import corpus

  path = str(shared / "data/wiki18/wiki18_passages.jsonl")
  pieces = corpus.load_corpus(path)[:200]
  for piece in pieces[::7]:
    whole = types.Passage.of(
      piece.title.strip('"'), "Before it. " + piece.text + " And behind it.")
    assert coverage.retrieval_recall([whole], [piece]) == 1.0
    assert whole.text != piece.text
