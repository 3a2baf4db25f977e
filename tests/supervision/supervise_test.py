"""Supervision and audit as commands: killed, continued, on any QA set."""

import json
import subprocess
import sys

import pytest
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.data import coverage, questions
from stepsearch_jax.retrieval.index import corpus
from stepsearch_jax.supervision import pipeline as supervision
from stepsearch_jax.supervision import supervise

PASSAGES = [
  types.Passage("1", "Ada Rook", "Ada Rook was born in Lintel."),
  types.Passage("2", "Lintel", "Lintel lies on the river Mossing."),
  types.Passage("3", "Bo", "Bo sells umbrellas near the harbour."),
  types.Passage("4", "Mossing", "The Mossing floods in spring."),
]
FULL = types.Question(
  "full", "On which river lies the birthplace of Ada Rook?", ("Mossing",),
  support=(PASSAGES[0], PASSAGES[1]),
  decomposition=(
    types.SubQuestion("Where was Ada Rook born?", "Lintel", 0),
    types.SubQuestion("On which river does #1 lie?", "Mossing", 1),
  ),
)
BARE = types.Question("bare", "When does the Mossing flood?", ("spring",))


class Model:
  """A language model that knows two prompts and can die."""

  name = "model"

  def __init__(self, dies_after=99):
    self.asked, self.dies_after = [], dies_after

  def write(self, prompts):
    texts = []
    for prompt in prompts:
      if len(self.asked) == self.dies_after:
        raise OSError("killed")
      self.asked.append(prompt)
      question = prompt.split("Question: ")[1].split("\n")[0]
      texts.append(
        f"{question} => spring" if "Steps:" in prompt
        else f"1. {question}\n2. umbrellas\n"
      )
    return texts


def run(folder, model, monkeypatch):
  monkeypatch.setattr(
    supervise, "open_writer",
    lambda name, cache: supervision.CachedWriter(
      supervision.RuleWriter() if name == "rules" else model, cache / "writers"
    ),
  )
  output = epath.Path(folder) / "train.jsonl"
  table = supervise.supervise(
    [FULL, BARE], PASSAGES,
    supervise.Supervision(
      ["rules", "model"], ["hashed_tfidf:512", "bm25"], 2, 1,
      epath.Path(folder) / "cache",
    ),
    output,
  )
  report = json.loads((output.parent / "train.jsonl.report.json").read_text())
  return table, report, output.read_text()


def test_a_killed_pipeline_goes_on_and_ends_the_same(tmp_path, monkeypatch):
  pytest.importorskip("bm25s")
  monkeypatch.setattr(supervision, "_BATCH", 1)
  whole = run(tmp_path / "whole", Model(), monkeypatch)
  with pytest.raises(OSError):
    run(tmp_path / "killed", Model(dies_after=2), monkeypatch)
  assert not (tmp_path / "killed/train.jsonl").exists()
  second = Model()
  assert run(tmp_path / "killed", second, monkeypatch) == whole
  assert len(second.asked) == 2  # Of four; two were on disk.
  third = Model()
  assert run(tmp_path / "killed", third, monkeypatch) == whole
  assert not third.asked


def test_any_question_and_answer_become_flagged_training_rows(
  tmp_path, monkeypatch
):
  pytest.importorskip("bm25s")
  table, report, text = run(tmp_path, Model(), monkeypatch)
  rows = [json.loads(line) for line in text.splitlines()]
  assert [row["pseudo_support"] for row in rows] == [False, True]
  assert rows[1]["sub_support_docs"] == [
    {"title": "Mossing", "paragraph_text": PASSAGES[3].text}
  ]
  assert rows[1]["sub_searchs"][0][0] == "When does the Mossing flood"
  assert all("umbrellas" not in keys for row in rows
             for keys in row["sub_searchs"])
  # By hand: "umbrellas" was written for each of three hops, never kept.
  assert report["all"]["written"] - report["all"]["kept"] >= 3
  assert {"hop 1", "hop 2", "by rules", "by model", "pseudo-labeled"} <= set(
    report
  )
  assert all(name in table for name in ("hashed_tfidf:512", "bm25", "hop 2"))
  loaded = questions.load_questions(
    str(tmp_path / "train.jsonl"), require_support=True
  )
  assert loaded[1].extra == {"pseudo_support": True}


def test_without_a_language_model_plain_questions_are_an_error(
  tmp_path, monkeypatch
):
  with pytest.raises(ValueError, match="--writers needs a language model"):
    supervise.supervise(
      [BARE], PASSAGES,
      supervise.Supervision(
        ["rules"], ["hashed_tfidf:64"], 1, 1, epath.Path(tmp_path)
      ),
      epath.Path(tmp_path) / "t.jsonl",
    )


@pytest.mark.slow
def test_commands_audit_merge_supervise_and_build_tfds(tmp_path):
  pytest.importorskip("bm25s")
  source = tmp_path / "in.jsonl"
  source.write_text(json.dumps(questions.to_row(FULL)) + "\n")
  poor = epath.Path(tmp_path) / "poor.jsonl"
  corpus.write_corpus(poor, PASSAGES[1:])

  def command(*flags):
    done = subprocess.run(
      [sys.executable, "-m", "stepsearch_jax.tools.prepare_data",
       f"--input={source}", *flags],
      capture_output=True, text=True, cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

  merged = tmp_path / "complete.jsonl"
  shown = command("--audit", f"--corpus={poor}", f"--merged={merged}")
  counts = dict(line.rsplit(None, 1) for line in shown.splitlines()[:6])
  assert counts["missing"] == "1" and counts["questions answerable"] == "0"
  complete = corpus.load_corpus(str(merged))
  assert len(complete) == 4 and PASSAGES[0].text in {p.text for p in complete}
  again, missing = coverage.audit([FULL], complete)
  assert not missing and again["questions answerable"] == 1

  output = tmp_path / "train.parquet"
  shown = command(
    "--supervise", f"--corpus={merged}", f"--output={output}",
    "--retrievers=hashed_tfidf,bm25", f"--tfds_dir={tmp_path}/tfds",
  )
  assert "| hop 2 |" in shown
  (from_file,) = questions.load_questions(str(output))
  reference = shown.splitlines()[-1].removeprefix("--config.data.train=")
  assert questions.load_questions(reference) == [from_file]
  assert len(from_file.search_keys) == 2
