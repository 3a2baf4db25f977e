"""A recorded run can be played again without its index."""

import json
import threading

import fakes
import jax
import numpy as np
import pytest
from etils import epath

from configs import quickstart
from stepsearch_jax import files, train, types
from stepsearch_jax.env.actions import ParsedTurn
from stepsearch_jax.evaluation import card as card_lib
from stepsearch_jax.evaluation import playing
from stepsearch_jax.retrieval import factory, rerank
from stepsearch_jax.retrieval import recording as record
from stepsearch_jax.rollout import engine as engine_lib


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


def test_a_record_cut_by_a_kill_goes_on(tmp_path):
  path = tmp_path / "searches.jsonl"
  recorder = record.RecordingRetriever(Described(), path)
  first = recorder.search(["a"], 1)
  recorder.search(["b"], 1)
  whole = path.read_bytes()
  second = whole.index(b'{"query": "b"')
  for end in (0, 5, second, second + 9, len(whole) - 1, len(whole)):
    path.write_bytes(whole[:end])
    again = record.RecordingRetriever(Described(), path)
    assert again.search(["a"], 1) == first
    again.search(["b"], 1)
    assert path.read_bytes() == whole


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


class Closing(Described):
  closed = described = 0

  def close(self):
    self.closed += 1

  def describe(self):
    self.described += 1
    return super().describe()


def test_an_engine_waits_for_its_searches_then_closes_what_records(tmp_path):
  path = tmp_path / "searches.jsonl"
  inner = Closing(delay=0.3)
  reranker = rerank.RerankingRetriever.__new__(rerank.RerankingRetriever)
  reranker._inner = record.RecordingRetriever(inner, path)
  engine = engine_lib.Engine(None, None, reranker, fakes.engine_spec(), 0)
  running = threading.Event()
  engine._pool.submit(
    lambda: running.set() or reranker._inner.search(["a"], 1)
  )
  assert running.wait(10)
  engine.close()
  assert inner.closed == 1 and inner.described == 1
  assert record.ReplayRetriever(path).search(["a"], 1)[0][0].id == "a/0"
  replay = record.ReplayRetriever(path, inner)
  replay.close()
  assert inner.closed == 2


def test_a_record_that_goes_on_is_parsed_once(tmp_path, monkeypatch):
  path = tmp_path / "searches.jsonl"
  record.RecordingRetriever(Described(), path).search(["a"], 1)
  parsed = []
  monkeypatch.setattr(
    files, "_row", lambda *given, inner=files._row: (
      parsed.append(given) or inner(*given))
  )
  record.RecordingRetriever(Described(), path)
  assert len(parsed) == 2


def test_failures_are_used_up_and_come_back_with_a_new_start(tmp_path):
  path = tmp_path / "searches.jsonl"
  rows = [{"searched": {}}, *[{"query": "a", "k": 1, "failed": "down"}] * 2]
  path.write_text(files.to_jsonl(rows))
  for _ in range(2):
    replay = record.ReplayRetriever(path)
    assert [replay.search(["a"], 1) for _ in range(2)] == [[None], [None]]
    with pytest.raises(types.UserError, match="not on record"):
      replay.search(["a"], 1)


class Flaky(Described):
  """Every third search fails, and no two searches find the same."""

  calls = 0

  def search(self, queries, k):
    self.calls += 1
    if self.calls % 3 == 0:
      raise types.SearchError("down")
    self.text = f"answer {self.calls} to {{query}}"
    return super().search(queries, k)


def outcomes(retriever, asked):
  return [retriever.search(queries, 2) for queries in asked]


def test_failures_and_changing_answers_are_replayed_in_their_order(tmp_path):
  asked = [["a"], ["b"], ["c", "a"], ["c"], ["a", "c"], ["d", "c"], ["d"],
           ["b", "d"]]
  path = tmp_path / "searches.jsonl"
  first = outcomes(record.RecordingRetriever(Flaky(), path), asked)
  assert [None in seen for seen in first] == [
    False, False, True, False, False, False, False, False
  ]
  assert first[2] == [None, first[0][0]]  # What is on record needs no search.
  assert first[4] == [first[0][0], first[3][0]]  # What is on record stays.
  assert outcomes(record.ReplayRetriever(path), asked) == first
  row = json.loads(path.read_text().splitlines()[3])
  assert row == {"query": "c", "k": 2, "failed": "down"}


def play(retriever):
  """Rollouts in which every turn of a random policy is a search."""
  tokenizer = fakes.make_tokenizer()
  model = fakes.make_model(tokenizer.vocab_size)
  policy = fakes.make_tag_lover(tokenizer, fakes.make_policy(model))
  engine = fakes.make_engine(tokenizer, model, retriever, slots=3)
  played = engine.run(policy, fakes.make_questions(6), range(6), 1.0)
  engine.close()
  return played.trajectories, played.stats


def test_rollouts_from_a_record_are_the_recorded_ones(tmp_path, monkeypatch):
  monkeypatch.setattr(
    "stepsearch_jax.env.actions.parse",
    lambda text: ParsedTurn(types.Action.SEARCH, text),
  )
  path = tmp_path / "searches.jsonl"
  recorded, stats = play(record.RecordingRetriever(Flaky(), path))
  replayed, again = play(record.ReplayRetriever(path))
  assert stats.searches > 10 and stats.failed_searches > 1
  assert again.failed_searches == stats.failed_searches
  tokenizer = fakes.make_tokenizer()
  card = card_lib.summarize([playing.record(t, tokenizer) for t in recorded])
  assert card["failed_searches"] * 6 == pytest.approx(stats.failed_searches)
  for ours, theirs in zip(replayed, recorded, strict=True):
    assert ours.turns == theirs.turns
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)


@pytest.mark.slow
def test_a_run_from_a_record_needs_no_index_and_ends_with_the_same_bits(
  tmp_path, monkeypatch
):
  def run(name, **retrieval):
    config = quickstart.get_config("runlocal")
    config.warm_start.steps = 2
    config.data.eval_limit = 3
    config.rollout.max_turn = 12
    config.rollout.max_turns = 2
    config.retrieval.update(retrieval)
    workdir = epath.Path(tmp_path) / name
    with jax.numpy_dtype_promotion("standard"):
      train.train(config, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return workdir, [
      {k: v for k, v in json.loads(line).items()
       if not k.startswith(("timing_s/", "perf/"))}
      for line in lines
    ]

  path = str(tmp_path / "searches.jsonl")
  _, recorded = run("recorded", record=path)
  monkeypatch.setattr(
    factory, "_open_engine", lambda *unused: pytest.fail("an index was opened")
  )
  workdir, replayed = run("replayed", replay=path)
  assert replayed == recorded and len(recorded) == 3
  assert not (workdir / "index").exists()
  card = json.loads(
    (workdir / "evaluations/step_000002/card.json").read_text()
  )["settings"]
  assert card["replayed"] == path and card["corpus_hash"]


@pytest.mark.parametrize("row, said", [
  ({"a": 1}, "field query: expected str, got no such field"),
  ({"query": ["q"], "k": 1, "documents": []}, "field query: expected str"),
  ({"query": "q", "k": "1", "failed": "down"}, "field k: expected int"),
  ({"query": "q", "k": 1}, "field documents: expected list, got no such"),
  ({"query": "q", "k": 1, "documents": ["d"]},
   "document: expected a JSON object, got str"),
  ({"query": "q", "k": 1, "documents": [{"id": "1", "contents": "x"}]},
   "document: field title: expected str, got no such field"),
  ({"query": "q", "k": 1, "documents": [
    {"id": "1", "title": "T", "text": None, "score": 0}]},
   "document: field text: expected str, got None"),
])
def test_a_damaged_record_names_its_line(tmp_path, row, said):
  path = tmp_path / "s.jsonl"
  first = {"searched": {"index": "one"}}
  path.write_text("\n" + files.to_jsonl([first, row]))
  with pytest.raises(files.DataError, match=rf"s\.jsonl:3: {said}"):
    record.ReplayRetriever(path)
  path.write_text(files.to_jsonl([first, row]))
  with pytest.raises(files.DataError, match=rf"s\.jsonl:2: {said}"):
    record.RecordingRetriever(Described(), path)
  path.write_text(files.to_jsonl([{"searched": "one"}]))
  with pytest.raises(files.DataError, match=r"s\.jsonl:1: no record"):
    record.ReplayRetriever(path)
