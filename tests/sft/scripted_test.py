"""Demonstrators: what they ask, when they stop, what is recorded of them."""

import collections

import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.env import prompts, search_env
from stepsearch_jax.sft import scripted
from tests import fakes

FIRST = types.Passage("1", "Kes", "The helmer of Kes is Mira.")
SECOND = types.Passage("2", "Mira", "As cradle Mira has Toron.")
QUESTION = types.Question(
  "q", "Find the origin of the director of the film Kes.", ("Toron",),
  search_keys=(("Kes helmer",), ("Mira cradle",)),
  support=(FIRST, SECOND),
  decomposition=(
    types.SubQuestion("?", "Mira", 0), types.SubQuestion("?", "Toron", 1),
  ),
  phrasings=(
    ("Kes auteur", "Kes helmer", "Kes director"),
    ("Mira cradle", "Mira origin", "Mira home"),
  ),
)
CLEAN = dict(whole=0.0, repeat=0.0, give_up=0.0)


class Shelf:
  """Finds the passages of `QUESTION` by their exact keys."""

  def search(self, queries, k):
    known = {"Kes helmer": FIRST, "Mira cradle": SECOND}
    other = types.Passage("0", "Kes", "Kes is a film with a harp.")
    return [
      None if query == self.broken else [known.get(query, other)]
      for query in queries
    ]

  def __init__(self, broken=None):
    self.broken = broken


def watch(habits, turns=6, count=1, retriever=None, seed=0):
  env = search_env.SearchEnv(
    prompts.TEMPLATES["plain"], max_turns=turns, topk=1
  )
  return scripted.demonstrate(
    [QUESTION] * count, habits, env, retriever or Shelf(),
    fakes.make_tokenizer(), 128, np.random.default_rng(seed),
  )


def queries(trajectory):
  return [turn.content for turn in trajectory.turns
          if turn.action == types.Action.SEARCH]


def test_who_knows_each_passage_asks_its_keys_and_answers():
  (seen,) = watch(scripted.Habits("exact", **CLEAN)).trajectories
  assert queries(seen) == ["Kes helmer", "Mira cradle"]
  assert seen.answer == "Toron"


def test_who_knows_the_corpus_asks_the_usual_then_the_next():
  (seen,) = watch(scripted.Habits("usual", **CLEAN)).trajectories
  assert queries(seen) == ["Kes auteur", "Kes helmer", "Mira cradle"]
  assert seen.answer == "Toron"


def test_who_knows_nothing_tries_all_wordings_equally_often():
  habits = scripted.Habits("any", **CLEAN)
  seen = watch(habits, count=600).trajectories
  first = collections.Counter(queries(t)[0] for t in seen)
  assert set(first) == set(QUESTION.phrasings[0])
  assert min(first.values()) > 150  # Of 200; four standard deviations.
  for trajectory in seen:
    asked = queries(trajectory)
    assert len(set(asked)) == len(asked)
    assert "Kes helmer" in asked and "Mira cradle" == asked[-1]
    assert trajectory.answer == "Toron"


def test_it_stops_at_the_last_turn_and_guesses_what_it_knows():
  habits = scripted.Habits("any", **CLEAN)
  for trajectory in watch(habits, turns=2, count=50).trajectories:
    asked = queries(trajectory)
    assert len(asked) <= 2
    if asked != ["Kes helmer", "Mira cradle"]:
      assert trajectory.answer == ("Mira" if "Kes helmer" in asked else "Kes")


def test_errors_come_as_often_as_the_habits_say():
  habits = scripted.Habits("exact", whole=0.2, repeat=0.0, give_up=0.0)
  asked = [queries(t) for t in watch(habits, count=500).trajectories]
  whole = sum(q[0] == QUESTION.text for q in asked)
  assert 65 < whole < 135  # 100, four standard deviations.
  habits = scripted.Habits("usual", whole=0.0, repeat=0.3, give_up=0.0)
  asked = [queries(t) for t in watch(habits, count=500).trajectories]
  repeats = sum(q[:2] == ["Kes auteur"] * 2 for q in asked)
  assert 110 < repeats < 190  # 150.
  habits = scripted.Habits("usual", whole=0.0, repeat=0.0, give_up=0.3)
  seen = watch(habits, count=500).trajectories
  gave_up = [t for t in seen if queries(t) == ["Kes auteur"]]
  assert 110 < len(gave_up) < 190
  assert {t.answer for t in gave_up} == {"Kes"}  # The title it was shown.


def test_only_its_own_words_are_imitated():
  tokenizer = fakes.make_tokenizer()
  (seen,) = watch(scripted.Habits("exact", **CLEAN)).trajectories
  written = tokenizer.decode(seen.tokens[seen.policy_mask].tolist())
  assert "Toron" in written and "Kes helmer" in written
  assert "information" not in written and "harp" not in written
  whole = tokenizer.decode(seen.tokens.tolist())
  assert FIRST.text in whole and SECOND.text in whole
  assert seen.tokens[-1] == tokenizer.hf.eos_token_id


def test_who_meets_a_failed_search_is_left_out():
  habits = scripted.Habits("any", **CLEAN)
  found = watch(habits, count=40, retriever=Shelf("Kes director"))
  assert 0 < found.failed < 40
  assert len(found.trajectories) == 40 - found.failed
  assert all(
    "Kes director" not in queries(t) for t in found.trajectories
  )


def test_same_seed_same_demonstrations():
  habits = scripted.Habits("any", 0.2, 0.2, 0.2)
  one, two, other = (
    [queries(t) for t in watch(habits, count=20, seed=s).trajectories]
    for s in (1, 1, 2)
  )
  assert one == two != other


@pytest.mark.parametrize("field", ["whole", "repeat", "give_up"])
def test_a_share_outside_0_to_1_is_refused_by_field(field):
  with pytest.raises(types.UserError, match=f"warm_start.{field} .*1.5"):
    scripted.Habits("any", **(CLEAN | {field: 1.5}))


def test_an_unknown_wording_is_refused_by_field():
  with pytest.raises(types.UserError, match="warm_start.wording .*'best'"):
    scripted.Habits("best", **CLEAN)


def test_a_question_without_hops_is_refused():
  bare = types.Question("x", "?", ("a",))
  steps = scripted.plan(
    bare, scripted.Habits("any", **CLEAN), 3, np.random.default_rng(0)
  )
  with pytest.raises(types.UserError, match="'x' has no decomposition"):
    next(steps)
