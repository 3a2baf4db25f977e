"""Values of one row: texts of lists, numbers, passages, what is empty."""

import pytest

from stepsearch_jax import files, types
from stepsearch_jax.data import fields, questions


def row(**values):
  return fields.Row("f.jsonl:7", values)


PRINTED = [
  "['Paris' 'Lutetia']", "['Paris'\n 'Lutetia']", '["Don\'t" \'Paris\']',
  "['Paris', nan]", "['Paris' None]", "['Paris' 5]", "array(['Paris'])",
  "array(['Paris'], dtype=object)", "[array(['k'], dtype=object)]",
  "[list(['k1', 'k2'])]", "{'Paris'}", "[['a' 'b']\n ['c' 'd']]",
  "{'target': array(['Paris'], dtype=object)}",
]


@pytest.mark.parametrize("text", PRINTED)
def test_the_text_of_a_list_that_nothing_can_read_back_is_refused(text):
  for name in ("golden_answers", "answers", "answer", "final_answer"):
    with pytest.raises(files.DataError) as at:
      questions.parse_question("f.jsonl:7", {"question": "q?", name: text})
    assert str(at.value).startswith(
      f"f.jsonl:7: field {name} must hold a list of texts; this is one as NumPy"
    ) and "\n" not in str(at.value)
  good = {"question": "q?", "answer": "A"}
  for name in ("answer_aliases", "search_keys", "support", "phrasings"):
    for value in (text, ["a", text]):
      with pytest.raises(files.DataError, match=f"f.jsonl:7: field {name} "):
        questions.parse_question("f.jsonl:7", {**good, name: value})


@pytest.mark.parametrize("text", [
  "(Sittin' On) The Dock of the Bay", "[untitled]", "['Salem's Lot]", "[1, 2]",
  "['Til Tuesday]", "['Heroes' (album)]", "[...]Baby One More Time", "[",
  "[Paris' 'Lyon]", "{Awayland}", "[1] 'Heroes'", "array of stars", "['a'",
  "[REC] 'two'", "('Heroes')", "['Heroes' \x00]", "\N{LEFT SQUARE BRACKET}é'",
])
def test_answers_that_merely_begin_with_a_bracket_stay_answers(text):
  asked = {"question": "q?"}
  for values in ({"answer": text}, {"answers": [text]}):
    parsed = questions.parse_question("f:1", {**asked, **values})
    assert parsed.answers == (text,)


def test_a_list_is_read_from_its_text_but_is_no_answer_inside_another():
  assert row(a='["Paris", "L"]').texts("a") == ("Paris", "L")
  assert row(a="['Paris', 'L']").texts("a") == ("Paris", "L")
  assert row(a="['Don\\'t', \"it's\"]").texts("a") == ("Don't", "it's")
  with pytest.raises(files.DataError, match="7: field a must hold a list of"):
    row(a=['["Paris", "L"]']).texts("a")


def test_search_keys_that_stand_as_texts_of_lists_inside_a_list_are_lists():
  keys = row(k=['["k1", "k2"]', "['k3']", "k4", "[untitled] album"])
  assert keys.groups("k") == (
    ("k1", "k2"), ("k3",), ("k4",), ("[untitled] album",))
  with pytest.raises(files.DataError, match="7: field k must hold a list of"):
    row(k=[['["k1", "k2"]']]).groups("k")


def test_whole_numbers_of_any_length_are_texts():
  huge = 10 ** 400
  assert row(a=huge).label("a") == "1" + 400 * "0"
  assert row(a=[huge, -3, 2.0, 2.5]).texts("a") == (
    "1" + 400 * "0", "-3", "2", "2.5")
  for wrong in (float("inf"), True):
    with pytest.raises(files.DataError, match="7: field a must hold strings"):
      row(a=wrong).label("a")
  assert row(a=" 12 ").number("a") == 12
  with pytest.raises(files.DataError, match="7: field a must hold a whole"):
    row(a="9" * 5000).number("a")


@pytest.mark.parametrize("value", [
  None, float("nan"), "", " \n", [], {}, (), [[]], [[], []], "[]", "{}", "[[]]",
  {"title": [], "sent_id": []}, '{"title": []}',
], ids=repr)
def test_what_holds_nothing_is_empty_and_the_next_field_counts(value):
  assert fields.empty(value)
  assert row(a=value, b=[1], c=[2]).filled("a", "b", "c") == "b"
  assert row(a=value).filled("a", "b") is None


@pytest.mark.parametrize("value", [
  0, False, 0.0, "x", [0], [None], [""], ["", "x"], [[], ["x"]], {"a": None},
  {"a": ["x"]}, "[1]", "[untitled]", [{}],
], ids=repr)
def test_what_holds_anything_is_not_empty(value):
  assert not fields.empty(value)
  assert row(a=value, b=[1]).filled("a", "b") == "a"


@pytest.mark.parametrize("contents, title, want", [
  ("T\ntext", "", ("T", "text")),
  ("T\nfirst\nsecond", "", ("T", "first\nsecond")),
  ("T\r\nfirst\r\nsecond", "", ("T", "first\r\nsecond")),
  ("\none line", "", ("", "one line")),
  ("A passage of one line.", "", ("", "A passage of one line.")),
  ("T\n", "", ("T", "")),
  ("", "", ("", "")),
  ("A passage of one line.", "T", ("T", "A passage of one line.")),
  ("first\nsecond", "T", ("T", "first\nsecond")),
  ("T\nfirst\nsecond", "T", ("T", "first\nsecond")),
  ('"T"\r\nfirst', "T", ("T", "first")),
  ("T \nfirst", '"T"', ('"T"', "first")),
  ("T", "T", ("T", "T")),
  ("T\nfirst", " ", ("T", "first")),
])
def test_contents_are_a_title_a_line_break_and_the_text(contents, title, want):
  assert fields.split_contents(contents, title) == want


@pytest.mark.parametrize("values, title, text", [
  ({"contents": "One line."}, "", "One line."),
  ({"title": "T", "contents": "first\nsecond"}, "T", "first\nsecond"),
  ({"text": "", "contents": "T\nreal"}, "T", "real"),
  ({"text": None, "content": " ", "contents": "T\nreal"}, "T", "real"),
  ({"title": "T", "paragraph_text": "", "text": "real"}, "T", "real"),
  ({"title": "T", "text": "real", "contents": "U\nother"}, "T", "real"),
])
def test_a_passage_has_the_first_text_that_is_not_blank(values, title, text):
  assert fields.passage(row(**values)) == types.Passage.of(title, text)


@pytest.mark.parametrize("values, identity", [
  ({"_id": "b7"}, "b7"), ({"docid": 7}, "7"), ({"pid": "p"}, "p"),
  ({"id": "1", "_id": "2", "pid": "3", "docid": "4"}, "1"),
  ({"id": " ", "_id": None, "docid": "4", "pid": 0}, "0"),
  ({"id": None}, "T\nx"), ({}, "T\nx"),
])
def test_the_id_of_a_passage_is_found_under_every_name(values, identity):
  values = {**values, "title": "T", "text": "x"}
  assert fields.passage(row(**values), ids=True).id == identity
  assert fields.passage(row(**values)).id == "T\nx"


def test_an_empty_field_stands_for_an_object_without_fields():
  for value in (None, "", [], {}, "[]"):
    assert row(a=value).part("a").names() == []
  with pytest.raises(files.DataError, match="7: field a must hold an object"):
    row(a=[1]).part("a")
