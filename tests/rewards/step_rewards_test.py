"""The paper's rewards by hand, against scikit-learn, and beside `released`."""

import dataclasses

import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.rewards import (
  released,
  step_rewards,
  tfidf,
  token_rewards,
  transcripts,
)

PAPER = step_rewards.RewardSpec.paper()
RELEASED = step_rewards.RewardSpec.released()


def changed(**fields):
  """The paper preset with one row of the table as released."""
  return dataclasses.replace(PAPER, **fields)


def test_similarities_equal_scikit_learn():
  text = pytest.importorskip("sklearn.feature_extraction.text")
  rng = np.random.default_rng(0)
  words = [f"w{i}" for i in range(40)]
  make = lambda n: " ".join(rng.choice(words, n))  # noqa: E731
  golds, docs = [make(12) for _ in range(4)], [make(15) for _ in range(7)]
  ours = tfidf.similarities(golds, docs)
  for j, doc in enumerate(docs):
    table = text.TfidfVectorizer().fit_transform([doc, *golds]).toarray()
    np.testing.assert_allclose(ours[:, j], table[1:] @ table[0], atol=1e-12)


def test_gain_counts_only_what_is_new_and_memory_holds_the_best():
  gold = ["alpha beta", "gamma delta"]
  gains = step_rewards.information_gains(
    [["alpha beta"], ["alpha beta"], ["gamma delta"], []], gold
  )
  np.testing.assert_allclose(gains, [0.5, 0.0, 0.5, 0.0])


def test_redundancy_is_the_share_already_seen_in_an_earlier_turn():
  turns = [["a", "b"], ["b", "c"], ["a", "a"], []]
  assert step_rewards.redundancy(turns) == [0.0, 0.5, 1.0, 0.0]
  assert step_rewards.redundancy([["a", "a"]]) == [0.0]
  assert step_rewards.redundancy([["a", "a"]], within_turn=True) == [0.5]


def test_key_score_is_equation_five():
  keys = [["ada birthplace", "birthplace of ada"], ["bo spouse"]]
  # "ada birthplace town" vs "ada birthplace": P 2/3, R 1, F1 0.8.
  assert step_rewards.key_score(["ada birthplace town"], keys) == (
    pytest.approx(0.4)
  )
  assert step_rewards.key_score([], keys) == 0.0


# One concrete case per row of the table of differences.


def test_row_step_scale_and_outcome_on_a_step_token():
  trajectory = make_trajectory(["<search> q </search>"])
  scores = step_rewards.RewardParts(1.0, 1.0, 0.0, [0.5], [0.5], [0.0])
  paper = token_rewards.token_rewards(PAPER, trajectory, scores)
  assert paper[5] == pytest.approx(0.3 + 1.0)  # Added.
  scaled = token_rewards.token_rewards(
    changed(step_scale=1.6), trajectory, scores
  )
  assert scaled[5] == pytest.approx(0.8 + 1.0)
  over = token_rewards.token_rewards(
    changed(outcome_on_step="overwrite"), trajectory, scores
  )
  assert over[5] == pytest.approx(1.0)


def test_row_malformed_ending():
  text = "<answer> Ada </answer> and more"
  case = dict(response=text, target=["Ada"], search_keys=[], support_docs=[])
  assert released.score_case(PAPER, case).score == 0.0
  assert released.score_case(changed(malformed=-1.0), case).score == -1.0


def test_row_key_match():
  queries, keys = ["ada spouse", "ada"], [["ada spouse"]]
  assert step_rewards.key_score(queries, keys) == 1.0
  assert step_rewards.key_score(queries, keys, "last") == pytest.approx(2 / 3)


def test_row_f1_rounding():
  case = dict(response="<answer> North North </answer>", target=["North x y"],
              search_keys=[], support_docs=[])
  assert released.score_case(PAPER, case).score == 0.4
  third = dict(case, response="<answer> a1 b1 North </answer>",
               target=["North c1 d1"])
  assert released.score_case(PAPER, third).score == pytest.approx(1 / 3)
  assert released.score_case(changed(f1_decimals=4), third).score == 0.3333


def test_row_document_text_keeps_the_next_label_when_released():
  block = "Doc 1<## Title: T ##> aaa\nDoc 2<## Title: U ##> bbb"
  text = f"<search> q </search>\n<information> {block} </information>"
  assert transcripts.evidence(text).documents == [["aaa", "bbb"]]
  assert released.evidence(text).documents == [["aaa\nDoc 2", "bbb"]]


def test_row_scored_text_ignores_warnings_and_prompt_examples():
  text = (
    "<warning> use <search> and </search> </warning>"
    "<search> real </search><answer> x </answer>"
  )
  assert list(transcripts.evidence(text).queries) == ["real"]
  assert list(released.evidence(text).queries) == ["and", "real"]


def test_row_step_position_drifts_only_when_re_encoded():
  trajectory = make_trajectory(["<search> q </search>"])

  class Drifting:
    """Decodes to text whose encoding is longer than the sampled ids."""

    def decode(self, ids, skip_special=True):
      return "<search> q </search> <information> d </information>"

    def encode(self, text, special=False):
      return [0] * len(text)

  assert [t.action_position for t in trajectory.turns] == [5]
  positions = released.trajectory_positions(trajectory, Drifting())
  assert positions == [2 + len("<search> q </search>") - 1]


def test_search_r1_documents_are_read():
  text = (
    "<search> q </search>\n\n<information>Doc 1(Title: \"A (b)\") first\n"
    "Doc 2(Title: C) second</information><answer> x </answer>"
  )
  assert transcripts.evidence(text).documents == [["first", "second"]]


def test_outcome_only_rewards_the_answer_alone():
  spec = changed(outcome_only=True)
  gold = step_rewards.Gold(["x"], [["q"]], ["d"])
  seen = step_rewards.Evidence(["q"], [["d"]], "x", True)
  assert step_rewards.score(spec, seen, gold).score == 1.0
  assert step_rewards.score(spec, seen, gold).step_scores == []
  assert step_rewards.score(PAPER, seen, gold).score == pytest.approx(1.618)


def make_trajectory(texts):
  """Two prompt tokens, then four sampled tokens; the last closes a search."""
  turns = [
    types.Turn(text, "search", "q", (types.Passage("d", "t", "x"),), "", 5,
               retrieved=True)
    for text in texts
  ]
  return types.Trajectory(
    question=types.Question("1", "?", ("x",)),
    episode=0,
    tokens=np.arange(6, dtype=np.int32),
    provenance=np.array([0, 0, 1, 1, 1, 1], np.int8),
    turn_index=np.array([-1, -1, 0, 0, 0, 0], np.int16),
    logprobs=np.zeros(6, np.float32),
    turns=turns,
    answer=None,
    stop_reason="answer",
  )
