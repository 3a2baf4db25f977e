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
  assert step_rewards.key_scores(["ada birthplace town"], keys) == (
    pytest.approx([0.4])
  )
  assert step_rewards.key_scores([], keys) == []


# One concrete case per row of the table of differences.


def test_row_step_scale_and_outcome_on_a_step_token():
  trajectory = make_trajectory(["<search> q </search>"])
  parts = step_rewards.RewardParts(1.0, 1.0, 0.0, [0.5], [0.5], [0.0], [0.0])
  paper = token_rewards.reward(PAPER, trajectory, parts).tokens
  assert paper[5] == pytest.approx(0.3 + 1.0)  # Added.
  scaled = token_rewards.reward(
    changed(step_scale=1.6), trajectory, parts
  ).tokens
  assert scaled[5] == pytest.approx(0.8 + 1.0)
  over = token_rewards.reward(
    changed(outcome_on_step="overwrite"), trajectory, parts
  ).tokens
  assert over[5] == pytest.approx(1.0)


def test_row_malformed_ending():
  text = "<answer> Ada </answer> and more"
  case = dict(response=text, target=["Ada"], search_keys=[], support_docs=[])
  assert released.score_case(PAPER, case).score == 0.0
  assert released.score_case(changed(malformed=-1.0), case).score == -1.0


def test_row_key_match():
  queries, keys = ["ada spouse", "ada"], [["ada spouse"]]
  assert step_rewards.key_scores(queries, keys) == [1.0, 1.0]
  assert step_rewards.key_scores(queries, keys, "last") == pytest.approx(
    [1.0, 2 / 3]
  )


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


def test_outcome_only_pays_the_answer_alone_and_computes_the_rest():
  gold = step_rewards.Gold(["x"], [["q"]], ["dd"])
  seen = step_rewards.Evidence(["q"], [["dd"]], "x", True)
  paper = step_rewards.score(PAPER, seen, gold)
  assert paper.score == pytest.approx(1.618)
  assert paper.step_scores == pytest.approx([1.0])
  alone = step_rewards.score(changed(outcome_only=True), seen, gold)
  assert alone.score == 1.0 and alone.step_scores == [0.0]
  for name in ("answer_correct", "search_key_score", "information_gains",
               "redundancy_penalty", "key_gains"):
    assert getattr(alone, name) == getattr(paper, name), name
  assert alone.information_gains == [pytest.approx(1.0)]
  assert alone.key_gains == [1.0]
  # Also where the released code looks at nothing behind a malformed ending.
  torn = dataclasses.replace(seen, well_formed=False)
  alone = step_rewards.score(
    dataclasses.replace(RELEASED, outcome_only=True), torn, gold
  )
  assert alone.score == -1
  assert alone.information_gains == [pytest.approx(1.0)]
  assert step_rewards.score(RELEASED, torn, gold).information_gains is None


def test_gain_is_paid_for_what_was_shown_and_not_for_what_was_cut():
  gold = step_rewards.Gold(["x"], None, ["alpha beta"])
  idf = np.log(3 / 2) + 1  # Of the word that only the gold has.
  whole = step_rewards.Evidence(["q"], [["alpha beta"]], "x", True)
  cut = dataclasses.replace(whole, shown=[["alpha"]])
  gone = dataclasses.replace(whole, shown=[[""]])
  gains = [step_rewards.score(PAPER, seen, gold).information_gains[0]
           for seen in (whole, cut, gone)]
  assert gains[0] == pytest.approx(1.0) and gains[2] == 0.0
  # "alpha" is in both texts (idf 1), "beta" in the gold alone.
  assert gains[1] == pytest.approx(1 / np.sqrt(1 + idf**2))


def test_a_document_of_which_nothing_was_shown_has_not_been_seen():
  turns = [["a", "b"], ["a", "b"]]
  assert step_rewards.redundancy(turns) == [0.0, 1.0]
  shown = [["a", ""], ["a", "b"]]
  assert step_rewards.redundancy(turns, shown=shown) == [0.0, 0.5]


def test_key_gains_are_what_each_query_adds():
  gold = step_rewards.Gold(["x"], [["ada"], ["bo"]], [])
  seen = step_rewards.Evidence(["bo", "bo", "ada"], [[], [], []], "x", True)
  parts = step_rewards.score(PAPER, seen, gold)
  assert parts.key_gains == [0.5, 0.0, 0.5] and parts.search_key_score == 1.0


def two_searches():
  """Prompt of 2; search, failed search, search, answer; 3 tokens each."""
  passage = types.Passage("d", "t", "alpha beta")
  search = types.Turn("", types.Action.SEARCH, "ada", (passage,), "", 4,
                      retrieved=True)
  turns = [
    search,
    dataclasses.replace(search, content="bo", documents=(), retrieved=False,
                        failed=True, action_position=7),
    dataclasses.replace(search, content="cy", action_position=10),
    types.Turn("<answer> x </answer>", types.Action.ANSWER, "x", (), "", 13),
  ]
  return types.Trajectory(
    question=types.Question(
      "1", "?", ("x",), search_keys=(("ada",), ("bo",), ("cy",)),
      support=(types.Passage("d", "t", "alpha beta"),),
    ),
    episode=0, tokens=np.arange(14, dtype=np.int32),
    provenance=np.array([0] * 2 + [1] * 12, np.int8),
    turn_index=np.repeat([-1, 0, 1, 2, 3], [2, 3, 3, 3, 3]).astype(np.int16),
    logprobs=np.zeros(14, np.float32), turns=turns, answer="x",
    stop_reason=types.StopReason.ANSWER,
  )


def test_turn_rewards_hold_the_parts_and_sum_to_the_token_rewards():
  """gain 1 then 0, redundancy 0 then 1, keys of two of three groups."""
  (reward,) = token_rewards.score_trajectories(PAPER, [two_searches()], None)
  assert [t.gain for t in reward.turns] == pytest.approx([1, 0, 0, 0])
  assert [t.redundancy for t in reward.turns] == [0, 0, 1, 0]
  # The failed search for "bo" earns no key.
  assert [t.key for t in reward.turns] == pytest.approx([1 / 3, 0, 1 / 3, 0])
  assert [t.step for t in reward.turns] == pytest.approx([0.6, 0, -0.6, 0])
  outcome = 1 + 0.618 * 2 / 3
  assert [t.paid for t in reward.turns] == pytest.approx(
    [0.6, 0, -0.6, outcome]
  )
  assert [t.position for t in reward.turns] == [4, 7, 10, 13]
  want = np.zeros(14)
  want[[4, 10, 13]] = 0.6, -0.6, outcome
  np.testing.assert_allclose(reward.tokens, want, atol=1e-6)


@pytest.mark.parametrize("outcome_only, steps, outcome", [
  (False, [0.6, -0.6], 1 + 0.618 * 2 / 3), (True, [0.0, 0.0], 1.0)
])
def test_the_search_bonus_is_paid_once_per_retrieved_search(
  outcome_only, steps, outcome
):
  spec = changed(search_bonus=0.25, outcome_only=outcome_only)
  (reward,) = token_rewards.score_trajectories(spec, [two_searches()], None)
  want = np.zeros(14)
  want[[4, 10, 13]] = steps[0] + 0.25, steps[1] + 0.25, outcome
  np.testing.assert_allclose(reward.tokens, want, atol=1e-6)
  assert [t.step for t in reward.turns] == pytest.approx(
    [steps[0] + 0.25, 0, steps[1] + 0.25, 0]
  )


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


def test_only_the_released_preset_leaves_end_of_text_untrained():
  assert list(step_rewards.RewardSpec.released().untrained((2, 7))) == [2, 7]
  assert list(step_rewards.RewardSpec.paper().untrained((2, 7))) == []
