"""Corpora of every schema and container; bad rows name file and line."""

import gzip
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.retrieval.index import corpus

WANT = [
  types.Passage("7", "Ada", "Ada was born in Lintel.\nIn spring."),
  types.Passage("8", "Lintel", "A town."),
]
CONTENTS = [{"id": p.id, "contents": f"{p.title}\n{p.text}"} for p in WANT]
TITLED = [{"id": p.id, "title": p.title, "text": p.text} for p in WANT]
RELEASED = [{"id": int(p.id), "title": p.title, "content": p.text}
            for p in WANT]


def lines(rows):
  return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows):
  if path.suffix == ".parquet":
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  elif path.suffix == ".gz":
    path.write_bytes(gzip.compress(lines(rows).encode()))
  elif path.suffix == ".json":
    path.write_text(json.dumps(rows))
  else:
    path.write_text(lines(rows))


@pytest.mark.parametrize("rows", [CONTENTS, TITLED, RELEASED],
                         ids=["contents", "text", "content"])
@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.json",
                                  "c.parquet"])
def test_every_schema_in_every_container_is_the_same_corpus(
  tmp_path, rows, name
):
  path = tmp_path / name
  write(path, rows)
  assert corpus.load_corpus(str(path)) == WANT
  assert list(corpus.stream_corpus(str(path))) == WANT


class WikiPassages(tfds.core.GeneratorBasedBuilder):
  """Somebody's corpus: the fields of a row as features."""

  VERSION = tfds.core.Version("1.0.0")
  rows: list

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, disable_shuffling=True,
      features=tfds.features.FeaturesDict(
        {name: tfds.features.Text() for name in self.rows[0]}
      ),
    )

  def _split_generators(self, unused):
    return {"train": enumerate(self.rows)}

  def _generate_examples(self):
    pass


@pytest.mark.parametrize("rows", [CONTENTS, TITLED], ids=["contents", "text"])
def test_a_tfds_corpus_of_plain_features_is_read_without_tensorflow(
  tmp_path, rows, monkeypatch
):
  monkeypatch.setattr(WikiPassages, "rows", rows, raising=False)
  builder = WikiPassages(data_dir=str(tmp_path), file_format="array_record")
  builder.download_and_prepare()
  reference = f"tfds:{builder.data_path}:train"
  assert list(corpus.stream_corpus(reference)) == WANT
  assert "tensorflow" not in sys.modules


def test_tfds_features_of_every_type_become_json():
  example = {"id": np.int64(5), "title": b"\xff", "lines": np.array([b"a"]),
             "nested": {"x": np.float32(0.5)}}
  assert files._plain(example) == {
    "id": 5, "title": "\ufffd", "lines": ["a"], "nested": {"x": 0.5}
  }


QUESTION = {"question": "q", "answer": "a"}
SUPPORT = {"title": "Ada", "paragraph_text": WANT[0].text}


@pytest.mark.parametrize("row", [
  {**QUESTION, "paragraphs": [{"idx": 0, **SUPPORT}],
   "question_decomposition": []},
  {**QUESTION, "supporting_facts": [["Ada", 0]],
   "context": [["Ada", ["Ada was born in Lintel.", "\nIn spring."]]]},
  {**QUESTION, "supporting_facts": {"title": ["Ada"], "sent_id": [0]},
   "context": {"title": ["Ada"],  # As on the hub.
               "sentences": [["Ada was born in Lintel.", "\nIn spring."]]}},
  {"question": "q", "final_answer": "a", "sub_searchs": [["k"]],
   "sub_support_docs": [SUPPORT]},
  {"data_source": "x", "prompt": [{"content": "q"}],
   "reward_model": {"ground_truth": {"target": ["a"]}},
   "extra_info": {"support_docs": [SUPPORT]}},
  {"id": "1", "text": "q", "answers": ["a"], "support": [
    {"id": f"Ada\n{WANT[0].text}", "title": "Ada", "text": WANT[0].text}]},
], ids=["musique", "hotpot", "hub", "stepsearch", "verl", "own"])
def test_questions_bring_their_paragraphs(tmp_path, row):
  path = tmp_path / "q.jsonl"
  write(path, [row, row])
  for found in (corpus.load_corpus(str(path)),
                list(corpus.stream_corpus(str(path)))):
    assert [(p.title, p.text) for p in found] == [("Ada", WANT[0].text)]
    assert found[0].id == f"Ada\n{WANT[0].text}"


@pytest.mark.parametrize("row, message", [
  ({"id": "1", "title": 3, "text": "x"}, "field title must hold text, got 3"),
  ({"id": "1", "text": None}, "field text must hold text, got None"),
  ({"id": "1", "contents": ["x"]}, "field contents must hold text"),
  ({"id": "1", "body": "x"}, "unknown corpus schema.*body"),
  ({"context": "some text"}, "field context must hold"),
  ({"context": [["Ada", "one string"]]}, "field context must hold"),
  ({"paragraphs": [{"title": "x"}]},
   "field paragraphs.paragraph_text must hold text"),
  ({"paragraphs": [3]}, "field paragraphs must hold a list of objects"),
  (QUESTION, "a question without paragraphs is no corpus.*data.corpus"),
])
def test_bad_rows_name_file_line_and_field(tmp_path, row, message):
  path = tmp_path / "c.jsonl"
  write(path, [row])
  with pytest.raises(files.DataError, match=rf"c\.jsonl:1: {message}"):
    corpus.load_corpus(str(path))


def test_written_corpora_are_jsonl_and_read_back(tmp_path):
  path = epath.Path(tmp_path) / "c.jsonl"
  assert corpus.write_corpus(path, iter(WANT)) == 2
  assert corpus.load_corpus(str(path)) == WANT
  with pytest.raises(files.DataError, match="written as .jsonl"):
    corpus.write_corpus(epath.Path(tmp_path) / "c.jsonl.gz", WANT)


def test_a_corpus_without_ids_is_the_same_by_every_path(tmp_path):
  hashes, ids = set(), set()
  for i, rows in enumerate((
    [{"title": p.title, "text": p.text} for p in WANT],
    [{"id": None, "title": p.title, "text": p.text} for p in WANT],
    [{"id": None, "contents": f"{p.title}\n{p.text}"} for p in WANT],
    [{"id": " ", "title": p.title, "content": p.text} for p in WANT],
  )):
    path = tmp_path / f"folder{i}" / "c.jsonl"
    path.parent.mkdir()
    write(path, rows)
    found = corpus.load_corpus(str(path))
    hashes.add(corpus.corpus_hash(found))
    ids.add(tuple(p.id for p in found))
  assert len(hashes) == 1
  assert ids == {tuple(f"{p.title}\n{p.text}" for p in WANT)}


@pytest.mark.parametrize("recent", [1, 2, 1 << 22])
def test_both_readers_agree_on_passages_that_repeat(
  tmp_path, monkeypatch, recent
):
  monkeypatch.setattr(corpus, "_RECENT", recent)
  path = tmp_path / "c.jsonl"
  for rows in (TITLED, [{k: v for k, v in row.items() if k != "id"}
                        for row in TITLED]):
    write(path, [*rows, rows[0], *rows, rows[1]])
    found = corpus.load_corpus(str(path))
    assert [p.text for p in found] == [p.text for p in WANT]
    assert list(corpus.stream_corpus(str(path))) == found
  write(path, [*TITLED, *CONTENTS, {**TITLED[0], "text": "other"}])
  for read in (corpus.load_corpus, lambda path: list(
      corpus.stream_corpus(path))):
    with pytest.raises(files.DataError, match="c.jsonl:5: .*'7' is used twice"):
      read(str(path))


def test_numbers_are_ids_and_other_things_are_refused(tmp_path):
  path = tmp_path / "c.jsonl"
  write(path, [{"id": 0, "text": "x"}, {"id": 1.0, "title": None, "text": "y"}])
  assert [p.id for p in corpus.load_corpus(str(path))] == ["0", "1"]
  for wrong in (True, ["a"], {"a": 1}):
    write(path, [{"id": wrong, "text": "x"}])
    with pytest.raises(files.DataError, match="c.jsonl:1: field id must"):
      corpus.load_corpus(str(path))


def test_questions_of_flashrag_bring_their_paragraphs_too(tmp_path):
  path = tmp_path / "q.jsonl"
  write(path, [{**QUESTION, "metadata": {"context": {
    "title": ["Ada"], "content": [["S one.", "S two."]]}}}])
  assert [p.text for p in corpus.load_corpus(str(path))] == ["S one. S two."]
  # The metadata of a passage is not its text.
  write(path, [{"id": "7", "contents": "A\nb", "metadata": {"context": 5}}])
  assert [p.text for p in corpus.load_corpus(str(path))] == ["b"]


@pytest.mark.parametrize("extra", [
  {"support": []}, {"context": []}, {"paragraphs": []}, {"paragraphs": ["p"]},
  {"context": "a section"}, {"extra_info": {"a": 1}}, {"question": None},
  {"answer": "a"}, {"prompt": "p"},
], ids=repr)
def test_a_row_with_a_text_that_asks_nothing_is_a_passage(tmp_path, extra):
  path = tmp_path / "c.jsonl"
  write(path, [{"id": "1", "title": "T", "text": "x", **extra}, CONTENTS[1]])
  assert corpus.load_corpus(str(path)) == [
    types.Passage("1", "T", "x"), WANT[1]]


@pytest.mark.parametrize("row, message", [
  ({"id": "1", "text": ""}, "field text must hold text, got ''"),
  ({"id": "1", "title": "T", "contents": " "}, "field contents must hold text"),
  ({"id": "1", "contents": "T\n \n"}, "field contents must hold the text of a"),
  ({**QUESTION, "support": []}, "a question without paragraphs.*'support'"),
  ({**QUESTION, "text": "x", "context": []}, "a question without paragraphs"),
  ({**QUESTION, "supporting_facts": [["T", 0]]}, "a question without parag"),
  ({"text": "q", "answers": ["a"], "support": []}, "a question without parag"),
  ({**QUESTION, "paragraphs": [{"title": "T", "text": " "}]},
   "field paragraphs must hold a paragraph with a text"),
])
def test_a_row_that_gives_no_passage_is_refused_wherever_it_stands(
  tmp_path, row, message
):
  path = tmp_path / "c.jsonl"
  write(path, [*TITLED, row])
  with pytest.raises(files.DataError, match=rf"c\.jsonl:3: {message}"):
    corpus.load_corpus(str(path))


def test_all_paragraphs_of_a_question_are_in_the_corpus(tmp_path):
  path = tmp_path / "q.jsonl"
  gold = {"id": "9", "title": "G", "text": "gold"}
  write(path, [
    {**QUESTION, "paragraphs": ["p", gold], "support": [gold]},
    {**QUESTION, "context": [], "support": [gold | {"text": "more"}]},
    {"text": "q", "answers": ["a"], "support": ["own"]},
  ])
  assert [(p.title, p.text) for p in corpus.load_corpus(str(path))] == [
    ("", "p"), ("G", "gold"), ("G", "more"), ("", "own")]


def test_paragraphs_of_questions_without_a_text_are_counted_and_said(
  tmp_path, caplog
):
  path = tmp_path / "q.jsonl"
  context = [["T", []], ["U", ["s."]], ["V", [" "]]]
  write(path, [{**QUESTION, "context": context}])
  with caplog.at_level("WARNING"):
    assert [p.title for p in corpus.load_corpus(str(path))] == ["U"]
  assert f"{path}: 2 paragraphs without text left out" in caplog.text


def test_one_line_is_the_text_and_a_title_beside_it_is_kept(tmp_path):
  path = tmp_path / "c.jsonl"
  write(path, [
    {"id": "1", "contents": "A passage without a title."},
    {"id": "2", "title": "T", "contents": "first\nsecond"},
    {"id": "3", "contents": "T\r\ntext"},
    {"_id": "4", "title": "T", "text": "", "contents": "T\nreal"},
    {"docid": 5, "text": "x"}, {"pid": 6, "text": "x"},
  ])
  assert corpus.load_corpus(str(path)) == [
    types.Passage("1", "", "A passage without a title."),
    types.Passage("2", "T", "first\nsecond"), types.Passage("3", "T", "text"),
    types.Passage("4", "T", "real"), types.Passage("5", "", "x"),
    types.Passage("6", "", "x"),
  ]
