"""The embedded world: what it promises to those who train on it."""

import collections
import dataclasses
import json
import re

import pytest
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.data import questions, world, world_text
from stepsearch_jax.retrieval.index import encoder as encoder_lib

SPEC = world.WorldSpec(
  seed=0, train=600, validation=100, heldout=200, entities=2400,
  alias_share=0.1, rare_wording=0.25,
)


@pytest.fixture(scope="module")
def made():
  return world.make_world(SPEC)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = epath.Path(tmp_path_factory.mktemp("made")) / "world"
  world.write_world(folder, SPEC)
  return folder


@pytest.fixture(scope="module")
def heldout(files):
  return questions.load_questions(str(files / "heldout.jsonl"))


def name_of(key):
  return key.rsplit(" ", 1)[0]


def gold(rows):
  return {
    paragraph["paragraph_text"] for row in rows
    for paragraph in row["paragraphs"] if paragraph["is_supporting"]
  }


def test_the_same_spec_gives_the_same_world(made):
  assert world.make_world(SPEC) == made
  other = dataclasses.replace(SPEC, seed=1)
  assert world.make_world(other).heldout != made.heldout


def test_the_files_hold_the_splits_and_the_passages(made, files):
  want = {name: getattr(made, name) for name in world.SPLITS}
  want["corpus"] = made.passages
  assert {path.name for path in files.iterdir()} == {
    f"{name}.jsonl" for name in want
  }
  for name, rows in want.items():
    lines = (files / f"{name}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_each_split_has_as_many_questions_as_asked_for(made):
  assert len(made.train) == 600
  assert len(made.validation) == 100
  assert len(made.heldout) == 200
  asked = [
    row["id"] for row in made.train + made.validation + made.heldout
  ]
  assert len(set(asked)) == 900


def test_half_of_the_questions_need_two_searches_a_fifth_four(made):
  hops = collections.Counter(
    len(row["question_decomposition"]) for row in made.heldout
  )
  assert hops == {2: 100, 3: 60, 4: 40}


def test_splits_share_no_fact_hence_no_part_of_a_chain(made):
  trained, chosen, held = (
    gold(rows) for rows in (made.train, made.validation, made.heldout)
  )
  assert trained and chosen and held
  assert not trained & held
  assert not trained & chosen
  assert not chosen & held


def test_each_hop_starts_where_the_last_one_ended(heldout):
  for question in heldout:
    subject = name_of(question.search_keys[0][0])
    assert f" {subject}" in question.text
    for hop, keys in zip(
      question.decomposition, question.search_keys, strict=True
    ):
      passage = question.support[hop.support]
      assert passage.title == subject
      assert {name_of(key) for key in keys} == {subject}
      assert re.search(rf"\b{hop.answer}\b", passage.text)
      subject = hop.answer
    assert subject == question.answers[0]


def test_a_passage_ends_with_the_name_that_it_is_read_for(heldout):
  for question in heldout:
    for hop in question.decomposition:
      text = question.support[hop.support].text
      assert text.endswith(f" {hop.answer}.")


def test_a_question_names_nobody_but_its_start(heldout):
  for question in heldout:
    for hop in question.decomposition:
      assert hop.answer not in question.text


def test_a_key_finds_its_passage_first_and_another_wording_does_not(
  made, heldout
):
  encoder = encoder_lib.load_encoder("hashed_tfidf")
  passages = [
    types.Passage(row["id"], row["title"], row["text"])
    for row in made.passages
  ]
  encoder.fit(passages)
  vectors = encoder.encode(
    [encoder_lib.passage_text(p) for p in passages], "passage"
  )
  asked, wanted, right = [], [], []
  for question in heldout:
    for hop, keys, phrasings in zip(
      question.decomposition, question.search_keys, question.phrasings,
      strict=True,
    ):
      if len(keys) == 1:  # Any wording finds an alias.
        asked += phrasings
        wanted += [question.support[hop.support].text] * len(phrasings)
        right += [query == keys[0] for query in phrasings]
  best = (encoder.encode(asked, "query") @ vectors.T).argmax(axis=1)
  hits = collections.defaultdict(list)
  for is_key, text, place in zip(right, wanted, best, strict=True):
    hits[is_key].append(passages[place].text == text)
  assert sum(hits[True]) > 0.97 * len(hits[True])
  assert sum(hits[False]) < 0.02 * len(hits[False])


def test_passages_use_two_of_three_wordings_questions_all(made):
  relations = {
    word: name for name, (_, _, words) in world_text.RELATIONS.items()
    for word in words.split()
  }
  said, asked = (
    {
      name: collections.Counter(
        word for text in texts for word in re.findall(r"\w+", text)
        if relations.get(word) == name
      ) for name in world_text.RELATIONS
    } for texts in (gold(made.train), [r["question"] for r in made.train])
  )
  for name, counts in said.items():
    assert len(counts) <= 2, counts
    share = counts.most_common(1)[0][1] / counts.total()
    assert share > 0.5, (name, counts)
  assert sum(map(len, asked.values())) > 0.9 * len(relations)


def test_names_are_shared_by_entities_of_several_kinds(made):
  kinds = collections.defaultdict(set)
  for row in made.passages:
    found = re.fullmatch(
      r"Little is known of the (?P<kind>\w+) (?P<name>[\w ]+)\.", row["text"]
    )
    if found:
      kind, name = found["kind"], found["name"]
      assert kind not in kinds[name]  # But not twice of one kind.
      kinds[name].add(kind)
  assert sum(len(k) > 1 for k in kinds.values()) > len(kinds) / 2


def test_names_of_splits_differ_but_their_words_do_not(made, heldout):
  trained = " ".join(gold(made.train))
  names = {hop.answer for q in heldout for hop in q.decomposition}
  assert not any(re.search(rf"\b{name}\b", trained) for name in names)
  words = {word for name in names for word in name.split()}
  assert words <= set(re.findall(r"\w+", trained))


def test_some_hops_are_hidden_behind_an_alias_or_a_word_for_two(heldout):
  behind = [
    question for question in heldout
    if any(len(keys) > 1 for keys in question.search_keys)
  ]
  assert 0.01 * len(heldout) < len(behind) < 0.4 * len(heldout)
  for question in behind:
    place = [len(k) > 1 for k in question.search_keys].index(True)
    hop = question.decomposition[place]
    text = question.support[hop.support].text
    assert text.startswith("The other name of ")
    assert text.endswith(f" is {hop.answer}.")
  short = [
    question for question in heldout
    if any(f" {word} of" in question.text
           for word in world_text.COMPOSITES.values())
  ]
  assert len(short) > 0.02 * len(heldout)


def test_an_answer_is_accepted_under_each_of_its_names(made, heldout):
  named = {
    row["title"]: row["text"].partition(" is ")[2].rstrip(".")
    for row in made.passages if "other name of" in row["text"]
  }
  for question in heldout:
    for alias in set(question.answers) & set(named):
      assert named[alias] in question.answers


def test_a_world_too_small_for_its_questions_says_so():
  spec = dataclasses.replace(
    SPEC, train=0, validation=0, heldout=5000, entities=200
  )
  with pytest.raises(types.UserError, match="data.world.heldout = 5000"):
    world.make_world(spec)


@pytest.mark.parametrize("field, value", [
  ("train", -1), ("entities", 10), ("entities", 20000), ("alias_share", 0.9),
  ("rare_wording", 1.5),
])
def test_a_bad_size_is_refused_by_field(field, value):
  with pytest.raises(types.UserError, match=f"data.world.{field}"):
    dataclasses.replace(SPEC, **{field: value})
