"""Question files as users have them: every recorded case, and its neighbors.

A row is read as what it says, or refused with file, row and field; it is never
read as something else.
"""

import copy
import json

import pytest

from stepsearch_jax import files
from stepsearch_jax.data import questions
from stepsearch_jax.retrieval.index import corpus
from stepsearch_jax.tools import prepare_data


def expectations(shared):
  path = shared / "cases/questions/expected.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def printed(path, capsys):
  """What `prepare_data --check --json` prints of a file."""
  found = questions.read_questions(str(path))
  prepare_data.print_json(found.questions)
  return json.loads(capsys.readouterr().out)


def test_every_recorded_case_gives_what_is_expected(shared, capsys):
  for case in expectations(shared):
    path = shared / "cases/questions" / case["file"]
    if case.get("refused") is True:
      with pytest.raises(files.DataError, match=case["file"]):
        questions.read_questions(str(path))
      continue
    rows = printed(path, capsys)
    assert len(rows) == case.get("n", len(rows)), case
    assert len({row["id"] for row in rows}) == len(rows), case
    for name in ("answers", "search_keys", "questions"):
      field = "question" if name == "questions" else name
      assert [r[field] for r in rows] == case.get(
        name, [r[field] for r in rows]), case
    texts = [[p["text"] for p in row["support"]] for row in rows]
    assert texts == case.get("support", texts), case
  mixed = questions.read_questions(
    str(shared / "cases/questions/union.parquet")).questions
  assert [q.answers for q in mixed] == [("A",), ("B",), ("C",)]
  assert [q.source for q in mixed] == ["musique", "hotpotqa", ""]


MUSIQUE = {
  "id": "m1", "question": "q?", "answer": "A", "answer_aliases": ["AA"],
  "answerable": True, "data_source": "mine",
  "question_decomposition": [
    {"id": 1, "question": "h?", "answer": "x", "paragraph_support_idx": 0}],
  "paragraphs": [{"idx": 0, "title": "T", "paragraph_text": "P",
                  "is_supporting": True}],
}
HOTPOT = {
  "_id": "h1", "question": "q?", "answer": "A", "supporting_facts": [["T", 0]],
  "context": [["T", ["S one.", "S two."]], ["U", ["V."]]],
}
HUB = {
  "id": "h1", "question": "q?", "answer": "A",
  "supporting_facts": {"title": ["T"], "sent_id": [0]},
  "context": {"title": ["T", "U"], "sentences": [["S one.", " S two."],
                                                 ["V."]]},
}
RELEASED = {
  "question": "q?", "final_answer": "A", "answer_aliases": ["AA"],
  "sub_searchs": [["k1", "k2"], ["k3"]],
  "sub_support_docs": [{"title": "T", "paragraph_text": "P"}],
  "pseudo_support": True,
}
VERL = {
  "data_source": "nq", "prompt": [{"role": "user", "content": "Question: q?"}],
  "reward_model": {"style": "rule", "ground_truth": {
    "target": ["A"], "search_keys": [["k"]]}},
  "extra_info": {"split": "train", "index": 3, "question": "q?",
                 "support_docs": [{"title": "T", "paragraph_text": "P"}]},
}
FLASHRAG = {
  "id": "f1", "question": "q?", "golden_answers": ["A"], "metadata": HUB,
}
OWN = {
  "id": "o1", "text": "q?", "answers": ["A"], "source": "mine",
  "search_keys": [["k"]],
  "support": [{"id": "1", "title": "T", "text": "P", "score": 0.0}],
  "decomposition": [{"question": "h?", "answer": "x", "support": 0}],
  "extra": {"note": 1},
}
SCHEMAS = dict(musique=MUSIQUE, hotpot=HOTPOT, hub=HUB, released=RELEASED,
               verl=VERL, flashrag=FLASHRAG, own=OWN)


def places(value, path=()):
  """Paths to every value inside a row."""
  if path:
    yield path
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, item in items:
    if isinstance(item, (dict, list)):
      yield from places(item, (*path, key))
    else:
      yield (*path, key)


def changed(row, path, value):
  row = copy.deepcopy(row)
  inner = row
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = value
  return row


def assert_clean(question):
  """Every string is one that stood in a row, none fell apart."""
  assert isinstance(question.id, str) and question.id not in ("", "None")
  assert isinstance(question.source, str) and question.source != "None"
  assert question.text.strip() and question.answers
  texts = [*question.answers, *(k for g in question.search_keys for k in g)]
  assert all(isinstance(t, str) and t.strip() for t in texts), texts
  assert "None" not in texts
  assert not {"S", "p", "t"} & set(texts), "a string fell into letters"
  assert all(isinstance(g, tuple) for g in question.search_keys)
  for passage in question.support:
    assert isinstance(passage.title, str) and passage.text.strip()
  for hop in question.decomposition:
    assert isinstance(hop.question, str) and isinstance(hop.answer, str)
    assert -1 <= hop.support < max(len(question.support), 1)


@pytest.mark.parametrize("wrong", [
  None, 5, 0, 1.5, float("nan"), True, "Spot", "", " ", [], {}, [None], [5],
  ["Spot"], [["Spot"]], {"a": 1}, [{}], [[]], [[None]],
], ids=repr)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_any_value_in_any_field_is_read_cleanly_or_refused(schema, wrong):
  for path in places(SCHEMAS[schema]):
    row = changed(SCHEMAS[schema], path, wrong)
    try:
      question = questions.parse_question("f.jsonl:7", row)
    except files.DataError as error:
      assert str(error).startswith("f.jsonl:7: "), (path, error)
      named = [str(key) for key in path if isinstance(key, str)]
      unknown = "question without an answer" in str(error)
      assert unknown or any(name in str(error) for name in (
        *named, "field answer", "prompt", "question schema", "answerable",
      )), (path, error)
    else:
      assert_clean(question)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_lists_and_objects_that_stand_as_their_json_text_are_read(schema):
  row = SCHEMAS[schema]
  want = questions.parse_question("f:1", row)
  for name, value in row.items():
    if isinstance(value, (list, dict)) and name != "extra":
      as_text = {**row, name: json.dumps(value)}
      assert questions.parse_question("f:1", as_text) == want, name
      as_python = {**row, name: str(value)}
      assert questions.parse_question("f:1", as_python) == want, name


@pytest.mark.parametrize("schema", SCHEMAS)
def test_fields_of_all_other_schemas_may_be_there_and_null(schema):
  nulls = {name: None for row in SCHEMAS.values() for name in row}
  want = questions.parse_question("f:1", SCHEMAS[schema])
  row = {**nulls, **SCHEMAS[schema]}
  assert questions.parse_question("f:1", row) == want


def test_answers_that_look_like_lists_stay_answers_where_one_is_asked():
  row = {"question": "q?", "answer": "[1, 2]"}
  assert questions.parse_question("f:1", row).answers == ("[1, 2]",)
  row = {"question": "q?", "answer": '["Paris", "Lutetia"]'}
  assert questions.parse_question("f:1", row).answers == ("Paris", "Lutetia")
  row = {"question": "q?", "golden_answers": "[Paris]"}
  assert questions.parse_question("f:1", row).answers == ("[Paris]",)


def test_numbers_are_answers_and_ids_but_no_search_keys():
  row = {"id": 7.0, "question": "q?", "answer": 1998, "answer_aliases": [2.5]}
  ours = questions.parse_question("f:1", row)
  assert (ours.id, ours.answers) == ("7", ("1998", "2.5"))
  assert questions.parse_question(
    "f:1", {"question": "q?", "answer": 0}).answers == ("0",)
  with pytest.raises(files.DataError, match="search_keys must hold lists"):
    questions.parse_question("f:1", {**row, "search_keys": [[5]]})


@pytest.mark.parametrize("sentences, text", [
  (["A.", "B."], "A. B."), (["A.", " B."], "A. B."), (["A. ", "B."], "A. B."),
  ([" A.", "", "B. "], "A. B."), ([], ""), (["A.\n", "B."], "A.\nB."),
])
def test_sentences_are_apart_by_one_blank(sentences, text):
  row = {**HOTPOT, "context": [["T", sentences]]}
  found = questions.parse_question("f:1", row).support
  assert [p.text for p in found] == ([text] if text else [])


def test_2wiki_paragraphs_equal_those_of_a_corpus_made_by_others(shared):
  theirs = {}
  for passage in corpus.stream_corpus(
    str(shared / "data/2wikimultihopqa/2wiki_corpus_6119.jsonl")):
    theirs.setdefault(passage.title, set()).add(passage.text)
  same = total = 0
  for name in ("2wiki_train", "2wiki_dev"):
    path = str(shared / f"data/train/{name}.jsonl.gz")
    for question in questions.load_questions(path):
      for passage in question.support:
        if passage.title in theirs:
          total += 1
          same += passage.text in theirs[passage.title]
  assert total > 50 and same == total


@pytest.mark.parametrize("field", [
  {"supporting_paragraphs": ["P"]},
  {"supporting_paragraphs": [{"title": "T", "text": "P"}]},
  {"supporting_paragraphs": [{"title": "T", "content": "P"}]},
  {"supporting_paragraphs": [{"contents": "T\nP"}]},
  {"supporting_paragraphs": {"title": ["T"], "paragraph_text": ["P"]}},
  {"support": [{"title": "T", "text": "P"}]},
  {"support_docs": [{"title": "T", "paragraph_text": "P"}]},
  {"paragraphs": [{"title": "T", "text": "P", "is_supporting": True},
                  {"title": "U", "text": "O", "is_supporting": False},
                  {"title": "V", "text": "N"}]},
])
def test_supporting_paragraphs_are_found_under_every_name(field):
  ours = questions.parse_question(
    "f:1", {"question": "q?", "answer": "A", **field})
  assert [p.text for p in ours.support] == ["P"]


def test_paragraphs_that_nobody_marked_are_no_support():
  row = {"question": "q?", "answer": "A", "paragraphs": ["P", "O"]}
  assert not questions.parse_question("f:1", row).support


@pytest.mark.parametrize("prompt, question, cut", [
  ("Do it. Question: who?\n", "who?", False),
  ("Do it. Question: who?\n\nAnswer in tags:", "who?", True),
  ("Question: a?\nAnswer: b\nQuestion: who?\n", "who?", False),
  ("Question:\n who? ", "who?", False),
  ("Question: who says Question: why?", "who says Question: why?", False),
  ([{"role": "system", "content": "Be good."},
    {"role": "user", "content": "Question: who?"},
    {"role": "assistant", "content": "Let me think."}], "who?", False),
  ([{"role": "user", "content": "who?"}], "who?", False),
])
def test_the_question_of_a_prompt_is_what_follows_its_label(
  tmp_path, prompt, question, cut
):
  row = {"prompt": prompt, "reward_model": {"ground_truth": "A"}}
  path = tmp_path / "q.jsonl"
  path.write_text(json.dumps(row))
  found = questions.read_questions(str(path))
  assert found.questions[0].text == question
  assert found.report.cut == cut


def test_repeated_ids_become_unique_and_stay_so_whatever_they_are(tmp_path):
  rows = [{"id": i, "question": "q?", "answer": "A"} for i in
          ("a", "a", "a@:1", None, "3", 3)]
  path = tmp_path / "q.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = questions.read_questions(str(path))
  ids = [q.id for q in found.questions]
  assert len(set(ids)) == 6 and ids[0] == "a" and found.report.renamed >= 2
  again = [q.id for q in questions.load_questions(str(path), limit=4)]
  assert again == ids[:4]


@pytest.mark.parametrize("flag", [False, 0, "false", "False", 0.0])
def test_rows_without_an_answer_in_them_are_left_out_and_counted(
  tmp_path, flag
):
  path = tmp_path / "q.jsonl"
  bad = {**MUSIQUE, "answerable": flag, "answer": None}
  path.write_text(json.dumps(bad) + "\n" + json.dumps(MUSIQUE) + "\n")
  found = questions.read_questions(str(path))
  assert len(found.questions) == 1 and found.report.unanswerable == 1
  assert "1 of 2 rows are marked answerable: false" in found.report.notes()[0]
  path.write_text(json.dumps(bad))
  with pytest.raises(files.DataError, match=r"no questions.*answerable"):
    questions.load_questions(str(path))


@pytest.mark.parametrize("row, lacking", [
  ({**HOTPOT, "supporting_facts": [["Gone", 0], ["T", 0]]}, 1),
  ({**HOTPOT, "supporting_facts": [["T", 0], ["T", 1]]}, 0),
  ({**MUSIQUE, "question_decomposition": [
    {"question": "h?", "answer": "x", "paragraph_support_idx": 9}]}, 1),
  ({**RELEASED, "sub_support_docs": [{"title": "T", "paragraph_text": " "},
                                     {"title": "U", "paragraph_text": "P"}]},
   1),
])
def test_gold_that_a_row_names_but_lacks_is_counted_and_said(
  tmp_path, row, lacking
):
  path = tmp_path / "q.jsonl"
  path.write_text(json.dumps(row))
  report = questions.read_questions(str(path)).report
  assert report.lacking == lacking
  assert len(report.notes()) == lacking


def test_why_a_question_cannot_be_trained_on_is_said(tmp_path):
  row = {k: v for k, v in HOTPOT.items() if k != "context"}
  path = tmp_path / "q.jsonl"
  path.write_text(json.dumps(row))
  assert len(questions.load_questions(str(path))) == 1
  with pytest.raises(files.DataError, match=r"q.jsonl:1: .*without context"):
    questions.load_questions(str(path), require_support=True)


def test_the_report_says_which_fields_were_read_and_ignored(tmp_path, capsys):
  rows = [{"question": "q?", "answer": "A", "evidence": [3], "level": "hard"},
          {"question": "q?", "answer": "A", "level": None}]
  path = tmp_path / "q.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  prepare_data.print_fields(questions.read_questions(str(path)).report)
  read, ignored, accepted = capsys.readouterr().out.splitlines()
  assert read == "fields read      answer, question"
  assert ignored == "fields ignored   evidence (1 of 2), level (1 of 2)"
  assert "supporting_paragraphs" in accepted and " answer," not in accepted


def test_nan_is_as_good_as_null():
  nan = float("nan")
  row = {**MUSIQUE, "answers": nan, "golden_answers": nan, "support": nan,
         "search_keys": nan, "prompt": nan, "metadata": nan, "qid": nan}
  want = questions.parse_question("f:1", MUSIQUE)
  assert questions.parse_question("f:1", row) == want
  assert questions.parse_question("f:1", {**MUSIQUE, "id": nan}, 7).id == "7"
