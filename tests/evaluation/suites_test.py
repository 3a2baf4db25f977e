"""Suites of benchmark files: their questions, their table, their errors."""

import json

import pytest

from stepsearch_jax import types
from stepsearch_jax.evaluation import suites


def write(path, count, **changes):
  rows = [{"id": str(i), "question": f"q{i}?", "answer": "A", **changes}
          for i in range(count)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_every_file_is_a_source_and_ids_are_apart(tmp_path):
  a, b = write(tmp_path / "a.jsonl", 3), write(tmp_path / "b.jsonl", 2)
  found = suites.load_suite(f"musique={a}, 2Wiki = {b}")
  assert [q.id for q in found] == [
    "musique/0", "musique/1", "musique/2", "2wikimultihopqa/0",
    "2wikimultihopqa/1"]
  assert {q.source for q in found} == {"musique", "2wikimultihopqa"}


@pytest.mark.parametrize("text, message", [
  ("a.jsonl", "expected NAME=FILE"), ("=a.jsonl", "expected NAME=FILE"),
  ("nq=", "expected NAME=FILE"), ("nq=a.jsonl,", "expected NAME=FILE"),
  ("2wiki=a.jsonl,2WikiMultihopQA=b.jsonl", "2wikimultihopqa is given twice"),
  ("nq=absent.jsonl", "absent.jsonl: no such file"),
  ("nq={empty}", "empty.jsonl: no questions in the file"),
])
def test_what_is_no_suite_is_one_line(tmp_path, text, message):
  empty = tmp_path / "empty.jsonl"
  empty.write_text("\n")
  with pytest.raises(types.UserError, match=message) as caught:
    suites.load_suite(text.format(empty=empty))
  assert "\n" not in str(caught.value)


def row(em, f1, n=100, **more):
  return {"n": n, "em": em, "f1": f1, "em_interval": [em - 0.1, em + 0.1],
          "f1_interval": [f1 - 0.1, f1 + 0.1], **more}


def cells(lines, title):
  line = next(x for x in lines if x.startswith(f"| {title} |"))
  return [cell.strip() for cell in line.strip("| ").split("|")][1:]


def test_the_table_has_the_papers_columns_and_its_rows():
  lines = suites.table("ours", {
    "bamboogle": row(0.4, 0.5), "musique": row(0.18, 0.2731),
    "mine": row(0.1, 1.0, n=7, attempts=4, pass_at_k=0.25),
  })
  assert cells(lines, "ours") == [".180/.273", ".400/.500", ".100/1.000"]
  assert cells(lines, "n") == ["100", "100", "7, pass@4 .250"]
  assert cells(lines, "95 %")[1] == ".300-.500/.400-.600"
  assert cells(lines, "StepSearch 3B base") == [".181/.273", ".328/.419", "-"]
  assert cells(lines, "GRPO 7B base") == [".202/.291", ".400/.512", "-"]


def test_the_average_needs_all_seven_benchmarks():
  some = {name: row(0.3, 0.4) for name in suites.SEVEN[1:]}
  assert "| ours | not run |" in suites.table("ours", some)
  lines = suites.table("ours", {**some, "nq": row(1.0, 1.0)})
  assert "| ours | .400 |" in lines  # (1 + 6 * .3) / 7.
  assert "| GSPO + LLDS | .451 |" in lines


def test_published_rows_are_those_of_the_reference(shared):
  text = (shared / "REFERENCE.md").read_text()
  for title, published in suites.PUBLISHED.items():
    theirs = cells(text.splitlines(), title)
    assert theirs == ["." + c.replace("/", "/.") for c in published.split()]
