"""The supervision pipeline by hand-worked cases and a killed writer."""

import dataclasses
import json
import threading
import time

import numpy as np
import pytest
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.data import coverage, questions
from stepsearch_jax.sft import scripted
from stepsearch_jax.supervision import pipeline as supervision

GOLD = types.Passage("g", "Ada Rook", "Ada Rook was born in Lintel.")
SECOND = types.Passage("h", "Lintel", "Lintel lies on the Mossing.")
OTHER = types.Passage("o", "Bo", "Bo sells umbrellas.")
QUESTION = types.Question(
  "q", "On which river lies the birthplace of Ada Rook?", ("Mossing",),
  source="musique", support=(GOLD, SECOND),
  decomposition=(
    types.SubQuestion("Ada Rook >> place of birth", "Lintel", 0),
    types.SubQuestion("On which river does #1 lie?", "Mossing", 1),
  ),
)


class Table:
  """A retriever that shows fixed passages for known queries."""

  def __init__(self, table):
    self.table = table

  def search(self, queries, k):
    return [list(self.table.get(q, [OTHER]))[:k] for q in queries]


class Scripted:
  """A writer with fixed completions that can die."""

  name = "scripted"

  def __init__(self, dies_after=10**9):
    self.calls = []
    self.dies_after = dies_after

  def write(self, prompts):
    if len(self.calls) + len(prompts) > self.dies_after:
      raise OSError("gone")
    self.calls += prompts
    return [f"1. {p[-6:]}\n- second\n" for p in prompts]


def test_earlier_answers_stand_in_for_their_numbers():
  assert supervision.resolved(QUESTION) == [
    "Ada Rook >> place of birth", "On which river does Lintel lie?"
  ]


def test_rules_paraphrase_relations_and_questions():
  written = supervision.write_queries(
    [QUESTION], [supervision.RuleWriter()], 3
  )
  assert list(written[0][0]) == [
    "Ada Rook place of birth", "place of birth of Ada Rook", "Ada Rook"
  ]
  assert list(written[0][1]) == [
    "On which river does Lintel lie", "river Lintel lie", "Lintel"
  ]


def test_completions_become_clean_distinct_queries():
  text = '1. "Ada Rook"\n- Ada Rook\n\n2) born where\n' + "x" * 300
  assert supervision.parse_queries(text, 5) == ["Ada Rook", "born where"]
  assert supervision.parse_queries(text, 1) == ["Ada Rook"]


@pytest.mark.parametrize("hits, kept", [(0, False), (1, False), (2, True),
                                        (3, True)])
def test_a_query_needs_half_of_the_retrievers_rounded_up(hits, kept):
  retrievers = {
    str(i): Table({"a": [OTHER, GOLD]} if i < hits else {}) for i in range(3)
  }
  written = [[{"a": ["w"]}, {}]]
  (out,), report = supervision.filter_queries(
    [QUESTION], written, retrievers, 2
  )
  assert out.search_keys == ((("a",) if kept else ()), ())
  assert report["all"].get("kept", 0) == kept
  assert report["hop 1"]["written"] == 1 and report["by w"]["written"] == 1
  for i in range(3):
    assert report["all"].get(str(i), 0) == (i < hits)


def test_a_hop_counts_its_own_passage_not_the_other_hops():
  retrievers = {"r": Table({"a": [SECOND], "b": [SECOND]})}
  (out,), _ = supervision.filter_queries(
    [QUESTION], [[{"a": ["w"]}, {"b": ["w"]}]], retrievers, 1
  )
  assert out.search_keys == ((), ("b",))


def test_a_passage_in_another_wording_is_found():
  # As corpora cut from another dump have it: neither id nor text are the same.
  reworded = types.Passage("w", "ada rook", "ada rook was born in LINTEL")
  piece = types.Passage("p", "Ada Rook", "was born in")
  retrievers = {"r": Table({"a": [reworded], "b": [piece]})}
  (out,), _ = supervision.filter_queries(
    [QUESTION], [[{"a": ["w"], "b": ["w"]}, {}]], retrievers, 1
  )
  assert out.search_keys == (("a", "b"), ())


def test_a_failing_writer_leaves_its_log_closed(tmp_path, monkeypatch):
  closed = []
  monkeypatch.setattr(
    files.RowLog, "close", lambda log: closed.append(log.path)
  )
  with pytest.raises(OSError):
    supervision.CachedWriter(Scripted(dies_after=0), tmp_path).write(["p"])
  assert len(closed) == 1


def test_a_killed_writer_goes_on_where_it_stopped(tmp_path, monkeypatch):
  monkeypatch.setattr(supervision, "_BATCH", 2)
  prompts = [f"prompt {i}" for i in range(6)]
  first = Scripted(dies_after=4)
  with pytest.raises(OSError):
    supervision.CachedWriter(first, tmp_path).write(prompts)
  (file,) = tmp_path.glob("*.jsonl")
  file.write_text(file.read_text() + '\n{"prompt": "half')  # A torn line.
  second = Scripted()
  texts = supervision.CachedWriter(second, tmp_path).write(prompts)
  assert second.calls == prompts[4:]
  assert texts == [f"1. {p[-6:]}\n- second\n" for p in prompts]
  third = Scripted(dies_after=0)
  assert supervision.CachedWriter(third, tmp_path).write(prompts) == texts


def test_calls_side_by_side_are_each_stored_and_a_failure_loses_none(tmp_path):
  class Endpoint:
    name, batch, at_once = "endpoint", 1, 3

    def __init__(self, bad=None):
      self.bad, self.answered, self.running, self.most = bad, [], 0, 0
      self.lock = threading.Lock()

    def write(self, prompts):
      (prompt,) = prompts
      with self.lock:
        self.running += 1
        self.most = max(self.most, self.running)
      time.sleep(0.02)
      with self.lock:
        self.running -= 1
        if prompt == self.bad:
          raise OSError("gone")
        self.answered.append(prompt)
      return [prompt.upper()]

  prompts = [f"prompt {i}" for i in range(12)]
  first = Endpoint(bad="prompt 4")
  with pytest.raises(OSError):
    supervision.CachedWriter(first, tmp_path).write(prompts)
  assert first.most == 3 and 4 <= len(first.answered) < 11
  second = Endpoint()
  texts = supervision.CachedWriter(second, tmp_path).write(prompts)
  assert texts == [prompt.upper() for prompt in prompts]
  assert sorted(first.answered + second.answered) == sorted(prompts)


BARE = types.Question(
  "b", "?", ("Mossing",), decomposition=tuple(
    types.SubQuestion(hop.question, hop.answer)
    for hop in QUESTION.decomposition
  ),
)


def test_pseudo_labels_are_passages_with_the_sub_answers():
  first, second = resolved = supervision.resolved(BARE)
  near = types.Passage("n", "X", "Lintels and the lintelled house.")
  tables = {
    "one": Table({first: [near, OTHER, GOLD], second: [OTHER, near]}),
    "two": Table({first: [SECOND], second: [OTHER, SECOND]}),
  }
  done, same = supervision.pseudo_label([BARE, QUESTION], tables, 3)
  assert same is QUESTION
  assert done.support == (GOLD, SECOND) and done.extra["pseudo_support"]
  assert [hop.support for hop in done.decomposition] == [0, 1]
  # A hop is judged by its own guess, not by the other hop's.
  written = [[{"x": ["w"]}, {"y": ["w"]}]]
  tables = {"one": Table({"x": [SECOND], "y": [SECOND]})}
  (out,), report = supervision.filter_queries([done], written, tables, 1)
  assert out.search_keys == ((), ("y",)) and len(resolved) == 2
  assert report["pseudo-labeled"] == {"written": 2, "kept": 1, "one": 1}
  row = supervision.released_row(out)
  assert row["pseudo_support"] is True
  plain = dataclasses.replace(QUESTION, search_keys=((), ()))
  assert supervision.released_row(plain)["pseudo_support"] is False


def test_yes_no_and_unfound_answers_give_no_pseudo_labels():
  hops = tuple(types.SubQuestion(a, a) for a in ("no", "the", "Nowhere"))
  bare = types.Question("b", "?", ("no",), decomposition=hops)
  table = Table({a: [types.Passage("p", "P", "no, yes and the rest")]
                 for a in ("no", "the", "Nowhere")})
  (done,) = supervision.pseudo_label([bare], {"t": table}, 1)
  assert done.support == ()
  assert [hop.support for hop in done.decomposition] == [-1, -1, -1]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_output_reads_back_in_the_released_schema(tmp_path, name):
  supervised = dataclasses.replace(QUESTION, search_keys=(("a", "b"), ()))
  flagged = dataclasses.replace(supervised, extra={"pseudo_support": True})
  path = epath.Path(tmp_path) / name
  rows = [supervision.released_row(q) for q in (supervised, flagged)]
  supervision.write_rows(path, rows)
  again, pseudo = questions.load_questions(str(path), require_support=True)
  assert not again.extra and pseudo.extra == {"pseudo_support": True}
  assert again.search_keys == (("a", "b"),)  # As in the released files.
  assert [p.text for p in again.support] == [GOLD.text, SECOND.text]
  assert again.answers == ("Mossing",)
  # A demonstration follows the hops, also one that no kept query leads to.
  assert again.decomposition == QUESTION.decomposition
  for wording in ("usual", "exact"):
    script = scripted.plan(
      again, scripted.Habits(wording, 0.0, 0.0, 0.0), 5,
      np.random.default_rng(0),
    )
    assert next(script) == "a" and script.send([GOLD]) == (
      "On which river does Lintel lie?"
    )
  with pytest.raises(files.DataError, match=r"expected .jsonl or .parquet"):
    supervision.write_rows(epath.Path(tmp_path) / "x.csv", [])


def test_audit_tells_same_covered_and_missing():
  third = types.Passage("m", "Gap", "Nobody wrote this down anywhere.")
  asked = [QUESTION, types.Question("z", "?", ("x",), support=(third,))]
  pieces = [
    types.Passage("1", "Ada Rook", "Ada Rook was born in LINTEL"),
    types.Passage("2", "Lintel", "The town of Lintel lies"),
    types.Passage("3", "Lintel", "on the Mossing and floods."),
    OTHER,
  ]
  counts, missing = coverage.audit(asked, pieces)
  assert counts == {
    "gold passages": 3, "same": 1, "covered": 1, "missing": 1, "questions": 2,
    "questions answerable": 1,
  }
  assert missing == [third]


def test_real_musique_rules_find_their_paragraphs(shared):
  path = str(shared / "data/musique/musique_ans_train_100.jsonl")
  asked = questions.load_questions(path, limit=20)
  written = supervision.write_queries(
    asked, [supervision.RuleWriter()], 3
  )
  gold = {p.text: p for q in asked for p in q.support}

  class Overlap:
    """Passages by shared words: crude, but independent of ours."""

    def search(self, queries, k):
      def score(query, text):
        return len(set(query.lower().split()) & set(text.lower().split()))

      return [
        sorted(gold.values(), key=lambda p: -score(q, f"{p.title} {p.text}"))[
          :k
        ]
        for q in queries
      ]

  out, report = supervision.filter_queries(
    asked, written, {"overlap": Overlap()}, 3
  )
  total = sum(len(hop) for group in written for hop in group)
  assert report["all"]["written"] == total
  assert report["all"]["kept"] == sum(
    len(keys) for q in out for keys in q.search_keys
  )
  assert np.mean([bool(q.search_keys[0]) for q in out]) > 0.5
  json.dumps(report)
