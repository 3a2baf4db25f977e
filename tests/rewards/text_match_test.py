"""Exact match and F1 where normalization leaves nothing."""

import pytest

from stepsearch_jax.rewards import text_match


@pytest.mark.parametrize("prediction, golds, right", [
  (None, ["The The"], 0), ("", ["The The"], 0), (" ", ["!!!"], 0),
  ("the  the", ["The The"], 1), ("The", ["The The"], 0), ("!!!", ["!!!"], 1),
  ("*", ["!!!", "*"], 1), ("a", ["an"], 0), ("The Band", ["band", "The"], 1),
  (None, [""], 0), ("", [""], 0), ("x", [], 0), ("", [], 0),
])
def test_no_answer_is_never_right_and_equal_texts_are(prediction, golds, right):
  assert text_match.exact_match(prediction, golds) == right
  assert text_match.answer_f1(prediction, golds) == right


def test_f1_of_words_is_untouched():
  assert text_match.answer_f1("big band", ["band", "the"]) == (
    pytest.approx(2 / 3))
  assert text_match.f1("The The", ["The The"]) == 0
