"""Paired differences of two runs against hand-worked scores."""

import json

import numpy as np
import pytest

from stepsearch_jax import files, types
from stepsearch_jax.evaluation import comparison, statistics


def write(folder, scores, source="a", name="evaluations/x", **changes):
  path = folder / name / "predictions.jsonl"
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a") as file:
    for i, em in enumerate(scores):
      file.write(json.dumps({"id": str(i), "data_source": source, "em": em,
                             "f1": em / 2, **changes}) + "\n")
  return folder


def test_differences_are_paired_by_question_whatever_the_order(tmp_path):
  ours, theirs = [1, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 1]
  a = write(tmp_path / "a", map(float, ours))
  b = write(tmp_path / "b", map(float, theirs))
  path = b / "evaluations/x/predictions.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[::-1]))
  em, f1 = comparison.compare(str(a), str(b))
  assert (em.source, em.metric, em.n) == ("all", "em", 6)
  assert em.ours == pytest.approx(5 / 6) and em.theirs == pytest.approx(2 / 6)
  assert em.difference == statistics.paired_bootstrap(
    np.array(ours, float), np.array(theirs, float))
  assert em.p == em.adjusted == pytest.approx(2 / 8)  # 3 differ, all one way.
  assert f1.difference.value == pytest.approx(0.25)
  back, _ = comparison.compare(str(b), str(a))
  assert back.difference.value == -em.difference.value and back.p == em.p
  assert "+0.5000" in comparison.render([em, f1], "a", "b")


def test_sources_are_apart_and_corrected_for_their_number(tmp_path):
  a, b = tmp_path / "a", tmp_path / "b"
  write(a, [1.0] * 8), write(b, [0.0] * 8)
  write(a, [1.0] * 4 + [0.0], "b"), write(b, [0.0] * 5, "b")
  rows = {(r.source, r.metric): r for r in comparison.compare(str(a), str(b))}
  assert rows["all", "em"].n == 13
  p = [2 / 2**8, 2 / 2**4]
  assert rows["a", "em"].p == pytest.approx(p[0])
  assert rows["a", "em"].adjusted == pytest.approx(2 * p[0])
  assert rows["b", "em"].adjusted == pytest.approx(p[1])
  assert rows["all", "em"].adjusted == rows["all", "em"].p


def test_other_questions_of_the_same_ids_are_not_compared(tmp_path):
  """Ids may be row numbers."""
  a = write(tmp_path / "a", [1.0, 0.0], question="Who founded Larn?")
  b = write(tmp_path / "b", [1.0, 0.0], question="Who founded Larn? ")
  assert len(comparison.compare(str(a), str(b))) == 2
  bare = write(tmp_path / "bare", [1.0, 0.0])  # Tells no texts.
  assert len(comparison.compare(str(a), str(bare))) == 2
  c = write(tmp_path / "c", [1.0, 0.0], question="Who left Larn?")
  with pytest.raises(types.UserError, match=(
    "--compare: question '0': expected the same text in both, in .*/a 'Who "
    "founded Larn\\?', got 'Who left Larn\\?'"
  )):
    comparison.compare(str(a), str(c))


def test_attempts_at_a_question_count_as_their_mean(tmp_path):
  a, b = tmp_path / "a", tmp_path / "b"
  write(a, [1.0, 0.0]), write(a, [0.0, 0.0]), write(b, [0.0, 0.0])
  em, _ = comparison.compare(str(a), str(b))
  assert em.n == 2 and em.ours == 0.25


def test_predictions_of_others_are_scored_first(tmp_path):
  a = tmp_path / "a.jsonl"
  a.write_text('{"id": 1, "target": "Paris", "pred": "paris"}\n')
  b = tmp_path / "b.jsonl"
  b.write_text('{"id": "1", "target": "Paris", "response": "no"}\n')
  em, f1 = comparison.compare(str(a), str(b))
  assert (em.ours, em.theirs, f1.ours) == (1.0, 0.0, 1.0)


def test_what_cannot_be_compared_is_one_line(tmp_path):
  a = write(tmp_path / "a", [1.0, 0.0])
  b = write(tmp_path / "b", [1.0, 0.0, 1.0])
  with pytest.raises(types.UserError, match="0 questions are only in .*a, 1 "):
    comparison.compare(str(a), str(b))
  with pytest.raises(types.UserError, match="does not exist"):
    comparison.compare(str(a), str(tmp_path / "c"))
  (tmp_path / "c").mkdir()
  with pytest.raises(types.UserError, match="expected predictions.jsonl"):
    comparison.compare(str(a), str(tmp_path / "c"))
  write(a, [1.0], name="evaluations/y")
  with pytest.raises(types.UserError, match=r"evaluations/x.*evaluations/y"):
    comparison.find_predictions(str(a))
  assert comparison.find_predictions(
    str(a / "evaluations/y")).parent.name == "y"
  (tmp_path / "d.jsonl").write_text('{"em": 1, "f1": 1}\n')
  with pytest.raises(files.DataError, match="d.jsonl:1: field id is missing"):
    comparison.compare(str(a / "evaluations/y"), str(tmp_path / "d.jsonl"))
