"""Evaluations that are killed, too long, sampled: with rollouts by hand."""

import dataclasses
import json
import types as builtin

import numpy as np
import pytest
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.evaluation import card, playing

GOLD = types.Passage.of("T", "the gold passage of them all")
QUESTIONS = [
  types.Question(
    str(i), f"question {i}", ("right",), source="ab"[i % 2],
    search_keys=(("k",),), support=(GOLD,) if i < 4 else (),
    decomposition=(types.SubQuestion("h", "x"),) * (2 + i % 2),
  )
  for i in range(6)
]


class Tokenizer:
  def decode(self, tokens):
    return " ".join(map(str, tokens))


class Engine:
  """Answers even questions rightly; dies at a question if told to."""

  def __init__(self, dies_at=None, too_long=()):
    self.dies_at, self.too_long, self.asked = dies_at, too_long, []

  def prompt_tokens(self, question):
    if question.id in self.too_long:
      raise types.UserError(f"question {question.id!r} needs 99 tokens")
    return [1]

  def run(self, params, questions, episodes, temperature, finished):
    played = []
    for question, episode in zip(questions, episodes, strict=True):
      if question.id == self.dies_at:
        raise KeyboardInterrupt
      self.asked.append((question.id, episode))
      finished()
      right = temperature and episode >= len(QUESTIONS) or (
        int(question.id) % 2 == 0)
      turns = [
        types.Turn("s", types.Action.SEARCH, "q", (GOLD,), "o", 1,
                   retrieved=True),
        types.Turn("a", types.Action.ANSWER, "x", (), "", 2),
      ]
      played.append(types.Trajectory(
        question, episode, np.array([7, 8, 9]),
        np.array([0, 1, 1], np.int8), np.array([-1, 0, 1], np.int16),
        np.zeros(3, np.float32), turns, "right" if right else None, "answer",
      ))
    return builtin.SimpleNamespace(trajectories=played)


def job(tmp_path, **changes):
  return playing.Evaluation(**{
    "questions": QUESTIONS, "settings": {"model": "m"},
    "folder": epath.Path(tmp_path) / "eval", "chunk": 2, **changes,
  })


def test_metrics_tables_and_rows_are_those_of_the_rollouts(tmp_path):
  made = playing.evaluate(Engine(), None, Tokenizer(), job(tmp_path))
  assert made["metrics"] == {
    "em": 0.5, "f1": 0.5, "searches": 1.0, "failed_searches": 0.0,
    "invalid": 0.0, "unanswered": 0.5, "truncated": 0.0,
    "response_length": 2.0, "retrieval_recall": 1.0, "em_2_hops": 1.0,
    "em_3_hops": 0.0,
  }
  assert {s: (r["n"], r["em"]) for s, r in made["sources"].items()} == {
    "a": (3, 1.0), "b": (3, 0.0)}
  assert {h: (r["n"], r["em"]) for h, r in made["hops"].items()} == {
    "2": (3, 1.0), "3": (3, 0.0)}
  rows = [json.loads(line) for line in
          (tmp_path / "eval/predictions.jsonl").read_text().splitlines()]
  assert [row["id"] for row in rows] == list("012345")
  assert rows[0]["response"] == "8 9" and rows[0]["support_docs"] == [
    {"title": "T", "paragraph_text": GOLD.text}]
  assert json.loads((tmp_path / "eval/card.json").read_text()) == made
  assert "| 2 | 3 | 1.0000 |" in (tmp_path / "eval/card.md").read_text()
  assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == [
    "card.json", "card.md", "predictions.jsonl"]


def test_a_killed_evaluation_goes_on_and_ends_the_same(tmp_path):
  whole = playing.evaluate(Engine(), None, Tokenizer(), job(tmp_path / "a"))
  first = Engine(dies_at="5")
  with pytest.raises(KeyboardInterrupt):
    playing.evaluate(first, None, Tokenizer(), job(tmp_path / "b"))
  assert not (tmp_path / "b/eval/card.json").exists()
  left = tmp_path / "b/eval/predictions.partial.jsonl"
  left.write_text(left.read_text() + '{"place": [0, 4], "ro')
  second = Engine()
  # On another day: that decides nothing of what is played.
  again = playing.evaluate(second, None, Tokenizer(), job(
    tmp_path / "b", circumstances={"date": "2026-11-27"}))
  assert again["settings"].pop("date") == "2026-11-27"
  assert [name for name, _ in second.asked] == ["4", "5"]
  assert again == whole
  files = [(tmp_path / n / "eval/predictions.jsonl").read_text() for n in "ab"]
  assert files[0] == files[1]


def describe(trajectory):
  if trajectory.question.id == "1":
    return None  # It cannot be rewarded.
  return {"id": trajectory.question.id, "episode": trajectory.episode}


def described(folder):
  text = (folder / "eval/trajectories.jsonl").read_text()
  return [json.loads(line)["episode"] for line in text.splitlines()]


def test_the_first_rollouts_are_described_beside_the_predictions(tmp_path):
  playing.evaluate(Engine(), None, Tokenizer(), job(
    tmp_path, describe=describe, described=8, attempts=2, temperature=1.0))
  assert described(tmp_path) == [0, 2, 3, 4, 5, 6]
  playing.evaluate(Engine(), None, Tokenizer(), job(
    tmp_path, describe=describe, described=0))
  assert not (tmp_path / "eval/trajectories.jsonl").exists()


@pytest.mark.parametrize("before", [5, 1, 0])
def test_a_killed_evaluation_loses_and_repeats_no_described_rollout(
  tmp_path, before
):
  whole = playing.evaluate(Engine(), None, Tokenizer(), job(tmp_path / "a"))
  with pytest.raises(KeyboardInterrupt):
    playing.evaluate(Engine(dies_at="5"), None, Tokenizer(), job(
      tmp_path / "b", describe=describe, described=before))
  second = Engine()
  again = playing.evaluate(second, None, Tokenizer(), job(
    tmp_path / "b", describe=describe, described=5))
  assert again == whole and described(tmp_path / "b") == [0, 2, 3, 4]
  # What is described is not played again, whatever came of it.
  assert [int(i) for i, _ in second.asked] == [*range(before, 4), 4, 5]
  files = [(tmp_path / n / "eval/predictions.jsonl").read_text() for n in "ab"]
  assert files[0] == files[1]


@pytest.mark.parametrize("changes", [
  {"settings": {"model": "another"}}, {"questions": QUESTIONS[::-1]},
  {"questions": [dataclasses.replace(QUESTIONS[0], answers=("other",)),
                 *QUESTIONS[1:]]},
  {"temperature": 1.0}, {"absent": {"x"}},
])
def test_nothing_is_taken_over_from_another_evaluation(tmp_path, changes):
  with pytest.raises(KeyboardInterrupt):
    playing.evaluate(Engine(dies_at="5"), None, Tokenizer(), job(tmp_path))
  engine = Engine()
  playing.evaluate(engine, None, Tokenizer(), job(tmp_path, **changes))
  assert len(engine.asked) == 6


def test_nothing_is_taken_over_from_other_weights(tmp_path):
  policy = {"kernel": np.arange(6, dtype=np.float32)}
  with pytest.raises(KeyboardInterrupt):
    playing.evaluate(Engine(dies_at="5"), policy, Tokenizer(), job(tmp_path))
  policy["kernel"][3] = np.nextafter(np.float32(3), np.float32(4))
  engine = Engine()
  playing.evaluate(engine, policy, Tokenizer(), job(tmp_path))
  assert len(engine.asked) == 6


def test_all_overlong_questions_are_named_before_anything_is_played(tmp_path):
  engine = Engine(too_long=("1", "4"))
  with pytest.raises(types.UserError, match=r"2 of 6 .*too long \(1, 4\)"):
    playing.evaluate(engine, None, Tokenizer(), job(tmp_path))
  assert not engine.asked and not (tmp_path / "eval").exists()


def test_skipped_overlong_questions_count_as_unanswered(tmp_path):
  made = playing.evaluate(
    Engine(too_long=("1", "4")), None, Tokenizer(),
    job(tmp_path, skip_overlong=True))
  assert made["settings"]["n"] == 6
  assert made["metrics"]["em"] == pytest.approx(2 / 6)
  assert made["metrics"]["unanswered"] == pytest.approx(4 / 6)
  rows = (tmp_path / "eval/predictions.jsonl").read_text().splitlines()
  assert [json.loads(row)["stop_reason"] for row in rows].count("overlong") == 2


def test_a_bar_that_is_asked_for_hears_of_every_rollout(tmp_path, capsys):
  """Chunk by chunk an evaluation of one chunk would show nothing."""
  for chunk, shown, bar in ((9, False, False), (2, False, True),
                            (9, True, True)):
    engine = Engine()
    playing.evaluate(
      engine, None, Tokenizer(),
      job(tmp_path / f"{chunk}{shown}", chunk=chunk, shown=shown))
    seen = capsys.readouterr().err
    assert ("evaluate:" in seen) == ("6/6" in seen) == bar


def test_recall_is_left_out_where_the_corpus_lacks_the_gold(tmp_path):
  made = playing.evaluate(
    Engine(), None, Tokenizer(), job(tmp_path, absent={GOLD.id}))
  assert "retrieval_recall" not in made["metrics"]
  assert "1 of 1 gold passages are not in the corpus" in (
    made["settings"]["retrieval_recall of"])


def test_sampled_attempts_give_their_mean_and_the_share_with_a_right_one(
  tmp_path
):
  engine = Engine()
  made = playing.evaluate(
    engine, None, Tokenizer(), job(tmp_path, attempts=2, temperature=1.0))
  assert [episode for _, episode in engine.asked] == list(range(12))
  # Odd questions are right in the second attempt only.
  assert made["sources"]["b"]["em"] == 0.5
  assert made["sources"]["b"]["pass_at_k"] == 1.0
  assert made["sources"]["b"]["pass_at_k_interval"] == [1.0, 1.0]
  assert "0.5000 (0.5000-0.5000), pass@2 1.0000 (1.0000-1.0000) |" in (
    tmp_path / "eval/card.md").read_text()
  assert made["sources"]["a"]["em"] == 1.0 and made["sources"]["a"]["n"] == 3
  assert made["metrics"]["em"] == 0.75
  assert {h: (r["n"], r["em"]) for h, r in made["hops"].items()} == {
    "2": (3, 1.0), "3": (3, 0.5)}


def test_means_are_over_the_rows_that_have_the_metric():
  rows = [{"em": 1.0, "retrieval_recall": 0.5}, {"em": 0.0}]
  assert card.summarize(rows) == {"em": 0.5, "retrieval_recall": 0.5}
