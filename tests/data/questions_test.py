"""Every question schema on real files; bad rows name file and line."""

import json

import pytest

from stepsearch_jax import files, types
from stepsearch_jax.data import questions
from stepsearch_jax.retrieval.index import corpus


@pytest.mark.parametrize(
  "name, count, source",
  [
    ("musique/musique_train_qa_19938.parquet", 19938, "musique"),
    ("musique/musique_dev_qa_2417.jsonl.gz", 2417, "musique"),
    ("hotpotqa/hotpot_dev_qa_7405.jsonl.gz", 7405, "hotpotqa"),
    ("2wikimultihopqa/2wiki_dev_qa_12576.parquet", 12576, "2wikimultihopqa"),
    ("bamboogle/bamboogle_test_125.jsonl", 125, ""),
  ],
)
def test_full_counts_load(shared, name, count, source):
  loaded = questions.load_questions(str(shared / "data" / name))
  assert len(loaded) == count
  assert {q.source for q in loaded} == {source}
  assert all(q.text and q.answers for q in loaded)


def test_musique_rows_keep_hops_support_and_aliases(shared):
  path = str(shared / "data/musique/musique_ans_train_100.jsonl")
  loaded = questions.load_questions(path, require_support=True)
  assert len(loaded) == 100
  first = loaded[0]
  assert first.answers == ("G. Stanley Hall", "Stanley Hall")
  assert [sub.support for sub in first.decomposition] == [0, 1]
  assert first.search_keys[1] == (
    "Who was the first president of American Psychological Association ?",
  )
  ids = {p.id for p in corpus.corpus_from_questions([path])}
  assert all(p.id in ids for q in loaded for p in q.support)


def test_hotpot_support_is_whole_paragraphs(shared):
  path = shared / "data/hotpotqa/hotpot_train_100.jsonl"
  loaded = questions.load_questions(str(path), require_support=True)
  raw = json.loads(path.open().readline())
  text = dict(raw["context"])[raw["supporting_facts"][0][0]]
  assert loaded[0].support[0].text == "".join(text).strip()


def test_relation_form_becomes_phrases():
  from stepsearch_jax.types import SubQuestion

  keys = questions.default_keys(
    [SubQuestion("Ada >> birthplace", "Rome"), SubQuestion("Mayor of #1?", "B")]
  )
  assert keys == (
    ("Ada birthplace", "birthplace Ada"), ("Mayor of Rome?",),
  )


RELEASED = {
  "question": "Q?", "final_answer": "A", "answer_aliases": ["AA"],
  "sub_searchs": [["k1", "k2"], ["k3"]],
  "sub_support_docs": [{"title": "T", "paragraph_text": "P"}],
}
VERL = {
  "data_source": "musi", "prompt": [{"role": "user", "content":
                                     "Long. Question: Q?\n"}],
  "ability": "qa", "reward_model": {"style": "rule", "ground_truth": {
    "target": ["A"], "search_keys": [["k"]]}},
  "extra_info": {"split": "train", "index": 3, "support_docs": [
    {"title": "T", "paragraph_text": "P"}]},
}


def test_released_jsonl_and_verl_rows():
  ours = questions.parse_question("f:1", RELEASED)
  assert ours.search_keys == (("k1", "k2"), ("k3",))
  assert ours.answers == ("A", "AA") and ours.support[0].text == "P"
  ours = questions.parse_question("f:1", VERL)
  assert (ours.text, ours.id, ours.answers) == ("Q?", "train_3", ("A",))
  assert ours.search_keys == (("k",),) and ours.support[0].title == "T"


def test_any_rows_of_question_and_answer_are_questions():
  ours = questions.parse_question("f:1", {"question": "Q?", "answer": "A"}, 4)
  assert (ours.id, ours.text, ours.answers) == ("4", "Q?", ("A",))
  row = {"id": 9, "question": "Q?", "answers": ["A", "B"],
         "answer_aliases": ["B", "C"], "data_source": "mine"}
  ours = questions.parse_question("f:1", row)
  assert (ours.id, ours.answers, ours.source) == ("9", ("A", "B", "C"), "mine")


def test_pseudo_labels_stay_flagged():
  ours = questions.parse_question("f:1", RELEASED | {"pseudo_support": True})
  assert ours.extra == {"pseudo_support": True}
  again = questions.parse_question("f:1", questions.to_row(ours))
  assert again.extra == ours.extra
  assert not questions.parse_question("f:1", RELEASED).extra


@pytest.mark.parametrize(
  "lines, message",
  [
    (['{"question": "a"'], r"x\.jsonl:1: malformed JSON"),
    (['{"question": "q", "golden_answers": ["a"]}', "[1]"],
     r"x\.jsonl:2: expected a JSON object, got list"),
    (['{"question": "q", "golden_answers": []}'],
     r"x\.jsonl:1: question without an answer"),
    (['{"question": " ", "golden_answers": ["a"]}'],
     r"x\.jsonl:1: field question is empty"),
    (['{"text": "q"}'], r"x\.jsonl:1: unknown question schema"),
    (['{"question_decomposition": [], "question": "q"}'],
     r"x\.jsonl:1: field answer is missing"),
    (['{"question": "q", "answers": {"text": ["a"], "answer_start": [1]}}'],
     r"x\.jsonl:1: field answers must hold strings"),
    (['{"question": 5, "answer": "a"}'], r"x\.jsonl:1: field question is .*no"),
    (['{"question": "q", "answer": "a", "question_decomposition": [{}]}'],
     r"x\.jsonl:1: field question_decomposition.question must hold text"),
    (['{"question": "q", "answer": "a", "supporting_facts": [], '
      '"context": ["x"]}'], r"x\.jsonl:1: field context must hold"),
    ([], r"x\.jsonl: no questions"),
  ],
)
def test_bad_rows_name_file_line_and_field(tmp_path, lines, message):
  path = tmp_path / "x.jsonl"
  path.write_text("\n".join(lines))
  with pytest.raises(files.DataError, match=message):
    questions.load_questions(str(path))


def test_missing_support_is_an_error_only_when_required(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text('{"question": "q", "golden_answers": ["a"]}\n')
  assert len(questions.load_questions(str(path))) == 1
  with pytest.raises(files.DataError, match="x.jsonl:1: .*no supporting"):
    questions.load_questions(str(path), require_support=True)
  with pytest.raises(files.DataError, match="no such file"):
    questions.load_questions(str(tmp_path / "absent.jsonl"))


def test_own_rows_round_trip(shared):
  path = str(shared / "data/musique/musique_ans_train_100.jsonl")
  for question in questions.load_questions(path):
    row = json.loads(json.dumps(questions.to_row(question)))
    assert questions.parse_question("f:1", row) == question


def test_numbers_of_no_hop_stay_as_they_are_in_sub_questions():
  hops = [types.SubQuestion("Who is #0?", "Ada"),
          types.SubQuestion("Where is #1, not #2 or #9?", "Rome")]
  assert types.resolved(hops) == [
    "Who is #0?", "Where is Ada, not Rome or #9?"]


def test_a_hop_points_past_paragraphs_without_text():
  parsed = questions.parse_question("f:1", {
    "question": "q?", "answer": "c",
    "support": [
      {"title": "A", "text": "a"}, {"title": "B", "text": " "},
      {"title": "C", "text": "c"},
    ],
    "decomposition": [
      {"question": name, "answer": name, "support": place}
      for place, name in enumerate("abc")
    ],
  })
  assert [p.title for p in parsed.support] == ["A", "C"]
  assert [hop.support for hop in parsed.decomposition] == [0, -1, 1]
