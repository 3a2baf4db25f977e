"""Closed book and oracle retrieval: the queries must not matter."""

import dataclasses

import fakes
import pytest

from stepsearch_jax import types
from stepsearch_jax.rollout import controls, engine

CORPUS = [types.Passage(str(i), "T", f"fact {i}") for i in range(50)]
GOLD = tuple(types.Passage(f"g{i}", "G", f"gold {i}") for i in range(3))
TURNS = ["<search> one </search>", "<search> two </search>", "nothing",
         "<search> three </search>", "<search> four </search>",
         "<answer> Ada </answer>"]


def play(parts, make, retriever=None, topk=1, count=4):
  tokenizer, _, _ = parts
  env = fakes.make_env(max_turns=5, topk=topk)
  ours = engine.Engine(
    fakes.ScriptedPrograms(tokenizer, TURNS, context=512),
    make(env, tokenizer),
    retriever or fakes.FakeRetriever(), fakes.engine_spec(max_turn=24), 0,
  )
  asked = [
    dataclasses.replace(q, support=GOLD) for q in fakes.make_questions(count)
  ]
  played = ours.run({}, asked, range(count))
  ours.close()
  return [
    [[p.text for p in turn.documents] for turn in t.turns if turn.retrieved]
    for t in played.trajectories
  ]


def test_gold_passages_come_in_order_whatever_is_asked(parts):
  shown = play(parts, controls.GoldDocuments)
  assert shown == [[["gold 0"], ["gold 1"], ["gold 2"], ["gold 2"]]] * 4
  shown = play(parts, controls.GoldDocuments, topk=2)
  assert shown == [[["gold 0", "gold 1"], *[["gold 2"]] * 3]] * 4


def test_random_passages_are_of_the_corpus_and_do_not_depend_on_the_query(
  parts
):
  def make(env, tokenizer):
    return controls.RandomDocuments(env, tokenizer, CORPUS)

  class Failing:
    def search(self, queries, k):
      raise types.SearchError("nobody answers")

  shown = play(parts, make)
  texts = {passage.text for passage in CORPUS}
  assert all(set(found) <= texts for turns in shown for found in turns)
  firsts = {turns[0][0] for turns in shown}
  assert len(firsts) > 1 and shown[0][0] != shown[0][1]
  assert play(parts, make, Failing()) == shown  # Nor on the retriever.


def test_gold_needs_supporting_passages(parts):
  tokenizer, _, _ = parts
  texts = controls.GoldDocuments(fakes.make_env(), tokenizer)
  question = dataclasses.replace(fakes.make_questions(1)[0], support=())
  with pytest.raises(types.UserError, match="rollout.documents=gold"):
    texts.prompt(question)
