"""Paragraphs of rows that mix schemas: what is empty, repeated or JSON text."""

import json

import pytest

from stepsearch_jax import files
from stepsearch_jax.data import paragraphs, questions

ASKED = {"question": "q?", "answer": "A"}
GOLD = [{"title": "T", "paragraph_text": "P"}]
HOPS = [{"question": "h?", "answer": "x", "paragraph_support_idx": 0},
        {"question": "i?", "answer": "y", "paragraph_support_idx": 1}]
HOTPOT = {"supporting_facts": [["T", 0]],
          "context": [["T", ["S one.", " S two."]], ["U", ["V."]]]}
NOTHING = [None, "", [], {}, "[]", {"title": [], "text": []}]


def parse(**values):
  return questions.parse_question("f.jsonl:7", {**ASKED, **values})


def texts(question):
  return [passage.text for passage in question.support]


def held(**values):
  """What a corpus of this row holds."""
  row = questions.row_of("f.jsonl:7", {**ASKED, **values})
  return [(p.title, p.text) for p in paragraphs.everything(row)]


@pytest.mark.parametrize("nothing", NOTHING, ids=repr)
def test_an_empty_field_of_one_schema_hides_nothing_of_another(nothing):
  found = parse(question_decomposition=nothing, **HOTPOT)
  assert (texts(found), found.source) == (["S one. S two."], "hotpotqa")
  found = parse(question_decomposition=nothing, search_keys=nothing,
                decomposition=[{"question": "h?", "answer": "x"}])
  assert [hop.question for hop in found.decomposition] == ["h?"]
  assert (found.search_keys, found.source) == ((), "")
  for one, other in (("support", "sub_support_docs"),
                     ("support_docs", "supporting_paragraphs")):
    assert texts(parse(**{one: nothing, other: GOLD})) == ["P"]
  assert texts(parse(support=nothing, extra_info={"support_docs": GOLD})) == [
    "P"]
  marked = [{**GOLD[0], "is_supporting": True}]
  found = parse(paragraphs=marked, support=nothing, context=nothing,
                supporting_facts=nothing, question_decomposition=nothing)
  assert (texts(found), found.source) == (["P"], "")
  found = parse(question_decomposition=HOPS, paragraphs=nothing, **HOTPOT)
  assert found.source == "musique" and not found.support
  assert parse(evidences=nothing, **HOTPOT).source == "hotpotqa"
  assert parse(evidences=[["a", "b", "c"]], **HOTPOT).source == (
    "2wikimultihopqa")
  found = parse(context=nothing, metadata=HOTPOT)
  assert texts(found) == ["S one. S two."]


@pytest.mark.parametrize("nothing", [None, "", []], ids=repr)
def test_an_empty_answer_or_alias_hides_no_other(nothing):
  found = questions.parse_question("f:1", {
    "question": nothing, "query": "q?", "final_answer": nothing,
    "golden_answers": nothing, "answer": "A", "answer_aliases": nothing,
    "aliases": ["X"],
  })
  assert (found.text, found.answers) == ("q?", ("A", "X"))


def test_empty_groups_are_no_search_keys_but_keep_their_place():
  found = parse(search_keys=[[]], sub_searchs=["k"])
  assert (found.search_keys, found.phrasings) == ((("k",),), ())
  found = parse(search_keys=["", "mayor"])
  assert found.search_keys == (("mayor",),)
  assert found.phrasings == ((), ("mayor",))
  found = parse(search_keys=[["", "a"], [], ["b"]], phrasings=[["c"], [], []])
  assert found.search_keys == (("a",), ("b",))
  assert found.phrasings == (("c",), (), ())
  assert questions.parse_question("f:1", questions.to_row(found)) == found
  found = parse(search_keys=[[""]], question_decomposition=HOPS)
  assert found.search_keys == (("h?",), ("i?",))


def test_an_empty_field_is_not_among_the_ignored(tmp_path):
  path = tmp_path / "q.jsonl"
  path.write_text(json.dumps(
    {**ASKED, "support": [], "aliases": "", "url": "u", "tags": []}))
  report = questions.read_questions(str(path)).report
  assert report.ignored == {"url": 1}


@pytest.mark.parametrize("values, want", [
  ({"support": ['{"title": "T", "text": "P"}']}, ["P"]),
  ({"sub_support_docs": ["{'title': 'T', 'paragraph_text': 'P'}", "O"]},
   ["P", "O"]),
  ({"paragraphs": ['{"title": "T", "text": "P", "is_supporting": true}',
                   '{"title": "U", "text": "O", "is_supporting": false}']},
   ["P"]),
  ({"question_decomposition": [json.dumps(hop) for hop in HOPS],
    "paragraphs": ['{"idx": 1, "text": "P1"}', '{"idx": 0, "text": "P0"}']},
   ["P0", "P1"]),
  ({"supporting_facts": ['["T", 0]'],
    "context": ['["T", ["S one.", " S two."]]', ["U", '["V."]']]},
   ["S one. S two."]),
  ({"supporting_facts": {"title": '["U"]', "sent_id": "[0]"},
    "context": {"title": ["T", "U"], "sentences": ['["S."]', '["V."]']}},
   ["V."]),
  ({"supporting_facts": [["T", 0]], "context": [
    {"title": "T", "sentences": None, "content": ["S."]}]}, ["S."]),
])
def test_an_item_that_is_json_text_is_read_like_a_field_that_is(values, want):
  assert texts(parse(**values)) == want


@pytest.mark.parametrize("item", ['["T", "P"]', "['T' 'P']", None, 5, ["P"]])
@pytest.mark.parametrize("name", ["support", "paragraphs"])
def test_what_is_neither_text_nor_object_is_no_paragraph(name, item):
  hops = {"question_decomposition": HOPS} if name == "paragraphs" else {}
  with pytest.raises(files.DataError, match=f"7: field {name} must hold a"):
    parse(**{name: [item, "P"]}, **hops)


def test_hops_point_at_texts_by_their_place():
  found = parse(question_decomposition=HOPS[::-1], paragraphs=["P0", "P1"])
  assert texts(found) == ["P1", "P0"]
  assert [hop.support for hop in found.decomposition] == [0, 1]


def test_a_repeated_paragraph_counts_once_and_two_of_one_name_are_refused():
  facts = {"supporting_facts": [["T", 1]]}
  one, two = ["T", ["S one.", " S two."]], ["T", ["Other."]]
  assert texts(parse(context=[one, one, ["U", ["V."]]], **facts)) == [
    "S one. S two."]
  with pytest.raises(files.DataError, match=(
    "7: field context must hold one paragraph per title of supporting_facts, "
    "got 'T'"
  )):
    parse(context=[one, two], **facts)
  # Of one that nobody names it does not matter.
  assert texts(parse(context=[["U", ["V."]], one, two],
                     supporting_facts=[["U", 0]])) == ["V."]
  hops = {"question_decomposition": HOPS[:1]}
  first, other = {"idx": 0, "text": "P"}, {"idx": 0, "text": "O"}
  assert texts(parse(paragraphs=[first, first], **hops)) == ["P"]
  for twice in ([first, other], [{"text": "O"}, first], ["O", first]):
    with pytest.raises(files.DataError, match=(
      "7: field paragraphs must hold one paragraph per idx, got 0"
    )):
      parse(paragraphs=twice, **hops)


def test_all_paragraphs_of_a_row_are_held_once():
  gold = [{"id": "9", "title": "U", "text": "V."}, {"title": "G", "text": "g"}]
  assert held(support=gold, paragraphs=["P", "P"], **HOTPOT) == [
    ("", "P"), ("T", "S one. S two."), ("U", "V."), ("G", "g")]
  assert held(context=[], paragraphs=[], support=gold) == [
    ("U", "V."), ("G", "g")]
  assert held(paragraphs=["P"], extra_info={"support_docs": GOLD}) == [
    ("", "P"), ("T", "P")]
  assert held(context=[], extra_info={"index": 3}) == []
