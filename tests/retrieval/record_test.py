"""A recorded run can be played again without its index."""

import fakes
import pytest

from stepsearch_jax.data import files
from stepsearch_jax.retrieval import record


class Described(fakes.FakeRetriever):
  name = "one"

  def describe(self):
    return {"index": self.name}


def test_a_replay_returns_what_was_recorded(tmp_path):
  path = tmp_path / "searches.jsonl"
  inner = Described()
  recorder = record.RecordingRetriever(inner, path)
  first = recorder.search(["a", "ü"], 2)
  assert recorder.search(["a"], 2) == first[:1]
  # A continued run adds to the same file.
  third = record.RecordingRetriever(Described(), path).search(["c"], 1)
  assert len(path.read_text().splitlines()) == 1 + 3
  replay = record.ReplayRetriever(path)
  assert replay.search(["ü", "a"], 2) == first[::-1]
  assert replay.search(["c"], 1) == third
  assert replay.describe()["index"] == "one"


def test_a_miss_is_an_error_or_falls_through(tmp_path):
  path = tmp_path / "searches.jsonl"
  record.RecordingRetriever(Described(), path).search(["a"], 2)
  with pytest.raises(ValueError, match="1 queries are not on record .*'b'"):
    record.ReplayRetriever(path).search(["a", "b"], 2)
  with pytest.raises(ValueError, match="k = 3"):
    record.ReplayRetriever(path).search(["a"], 3)
  other = Described(text="other {query}")
  found = record.ReplayRetriever(path, other).search(["a", "b"], 2)
  assert [row[0].text for row in found] == ["found a here", "other b"]
  assert other.asked == ["b"]


def test_records_are_not_mixed_up(tmp_path):
  path = tmp_path / "searches.jsonl"
  record.RecordingRetriever(Described(), path)
  other = Described()
  other.name = "two"
  with pytest.raises(ValueError, match="choose another retrieval.record"):
    record.RecordingRetriever(other, path)
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"query": "a"}\n')
  with pytest.raises(files.DataError, match="bad.jsonl:1: no record"):
    record.ReplayRetriever(bad)
