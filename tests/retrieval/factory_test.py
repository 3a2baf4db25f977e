"""Which retriever a spec stands for, and which specs are refused."""

import json

import fakes
import jax
import pytest
from etils import epath

from configs import common
from stepsearch_jax import types
from stepsearch_jax.retrieval import factory, local, online, recording, remote
from stepsearch_jax.retrieval.index import encoder, encoding
from stepsearch_jax.retrieval.index import index as index_lib

PASSAGES = [
  types.Passage("1", "Ada Rook", "Ada Rook was born in Lintel."),
  types.Passage("2", "Lintel", "Lintel lies on the river Mossing."),
  types.Passage("3", "Bo", "Bo sells umbrellas near the harbour."),
]


def spec(**changes):
  """The config's defaults with changes."""
  given = common.base().retrieval.to_dict()
  given["patience"] = remote.RemoteSpec(**given["patience"])
  given["encoding"] = encoding.EncodingSpec(**given["encoding"])
  return factory.RetrievalSpec(**given | changes)


@pytest.mark.parametrize("changes, message", [
  ({"engine": "faiss"},
   "retrieval.engine must be one of index, bm25, online, got 'faiss'"),
  ({"replay_miss": "ask"},
   "retrieval.replay_miss must be one of error, search, got 'ask'"),
  ({"topk": 0}, "retrieval.topk must be at least 1, got 0"),
  ({"cache": -1}, "retrieval.cache must be at least 0, got -1"),
  ({"candidates": 0}, "retrieval.candidates must be at least 1, got 0"),
  ({"reranker": "m", "candidates": 2},
   "retrieval.candidates = 2 must be at least retrieval.topk = 3"),
  ({"remote": "http://x", "index": "wiki"},
   "retrieval.remote or retrieval.index, not both: 'http://x' and 'wiki'"),
  ({"record": "a", "replay": "b"},
   "retrieval.record or retrieval.replay, not both: 'a' and 'b'"),
])
def test_contradictions_are_refused_with_field_and_value(changes, message):
  with pytest.raises(types.UserError) as error:
    spec(**changes)
  assert message in str(error.value)


@pytest.mark.parametrize("field, value, least", [
  ("retries", -1, "at least 0"), ("open_after", 0, "at least 1"),
  ("backoff_seconds", -0.5, "at least 0"), ("open_seconds", -1, "at least 0"),
  ("timeout_seconds", 0, "positive"),
])
def test_impossible_patience_is_refused(field, value, least):
  given = common.base().retrieval.patience.to_dict() | {field: value}
  message = f"retrieval.patience.{field} must be {least}, got {value}"
  with pytest.raises(types.UserError, match=message):
    remote.RemoteSpec(**given)


def test_what_an_engine_needs_is_missed_before_anything_is_read(monkeypatch):
  monkeypatch.delenv(online.KEY_VARIABLE, raising=False)
  with pytest.raises(types.UserError, match=online.KEY_VARIABLE):
    spec(engine="online")
  spec(engine="online", remote="http://x")  # Then the engine is not asked.
  spec(engine="online", replay="searches.jsonl")
  with pytest.raises(types.UserError, match=online.KEY_VARIABLE):
    spec(engine="online", replay="searches.jsonl", replay_miss="search")
  monkeypatch.setattr(factory.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(types.UserError, match="bm25 needs the extra"):
    spec(engine="bm25")


def test_an_index_is_built_once_in_the_work_directory(tmp_path, monkeypatch):
  workdir = epath.Path(tmp_path)
  first = factory.load_retriever(spec(), workdir, PASSAGES)
  monkeypatch.setattr(
    factory.index_build, "build_index", lambda *unused, **also: pytest.fail()
  )
  again = factory.load_retriever(spec(cache=0), workdir, PASSAGES)
  for retriever in (first, again):
    ((found,),) = retriever.search(["river Mossing"], 1)
    assert (found.id, found.text) == ("2", PASSAGES[1].text)
  with pytest.raises(index_lib.IndexMismatchError, match="corpus"):
    factory.load_retriever(spec(), workdir, PASSAGES[:2])


def test_an_index_is_not_compared_with_its_own_passages(tmp_path, monkeypatch):
  workdir = epath.Path(tmp_path)
  factory.load_retriever(spec(), workdir, PASSAGES)
  monkeypatch.setattr(
    factory.corpus_lib, "corpus_hash", lambda passages: pytest.fail("compared")
  )
  index = str(workdir / "index")
  found = factory.load_retriever(
    spec(index=index), workdir, (), f"{index}/passages.jsonl"
  )
  assert found.search(["river Mossing"], 1)[0][0].id == "2"


def test_a_shard_that_is_ready_is_opened_without_counting_words_again(
  tmp_path, monkeypatch
):
  workdir = epath.Path(tmp_path)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  counted = []
  fit = encoder.HashedTfidfEncoder.fit
  monkeypatch.setattr(
    encoder.HashedTfidfEncoder, "fit", lambda self, passages: (
      counted.append(len(passages)) or fit(self, passages))
  )
  for _ in range(2):
    found = factory.load_retriever(spec(), workdir, PASSAGES)
    # The word counts of all passages, the passages of this process.
    assert counted == [3] and found.describe()["passages"] < 3
    ((best,),) = found.search(["Ada"], 1)
    assert best.id == "1"


def test_only_one_process_asks_what_all_could_ask(tmp_path, monkeypatch):
  monkeypatch.setattr(factory.distributed, "is_primary", lambda: False)
  for changes in ({"engine": "bm25"}, {"remote": "http://127.0.0.1:9"}):
    found = factory.load_retriever(
      spec(**changes), epath.Path(tmp_path), PASSAGES
    )
    assert isinstance(found, local.EmptyRetriever)


def test_a_record_of_several_processes_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(types.UserError, match="one process, this has 2"):
    factory.load_retriever(
      spec(record=str(tmp_path / "r.jsonl")), epath.Path(tmp_path), PASSAGES
    )


class Reversing:
  """Stands for the cross-encoder: turns the candidates around."""

  def __init__(self, inner, reference, candidates):
    self.inner, self.reference, self.candidates = inner, reference, candidates

  def search(self, queries, k):
    return [row[::-1][:k] for row in
            self.inner.search(queries, self.candidates)]

  def describe(self):
    return {**self.inner.describe(), "reranker": self.reference}


class Described(fakes.FakeRetriever):
  def describe(self):
    return {"index": "fake"}


def test_what_is_not_on_record_is_reranked_as_it_was_when_recorded(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(factory.rerank, "RerankingRetriever", Reversing)
  monkeypatch.setattr(
    factory, "_open_engine", lambda *unused: Described()
  )
  path, workdir = str(tmp_path / "searches.jsonl"), epath.Path(tmp_path)
  given = dict(reranker="m", candidates=5)
  live = factory.load_retriever(spec(record=path, **given), workdir, PASSAGES)
  assert isinstance(live, recording.RecordingRetriever)
  assert [p.id for p in live.search(["a"], 2)[0]] == ["a/4", "a/3"]
  replay = factory.load_retriever(
    spec(replay=path, replay_miss="search", **given), workdir, PASSAGES
  )
  found = replay.search(["a", "b"], 2)
  assert [[p.id for p in row] for row in found] == [
    ["a/4", "a/3"], ["b/4", "b/3"]
  ]
  assert replay.describe() == {
    "index": "fake", "reranker": "m", "replayed": path,
    "misses_searched": {"index": "fake", "reranker": "m"},
  }
  header = json.loads((tmp_path / "searches.jsonl").read_text().split("\n")[0])
  assert header == {"searched": {"index": "fake", "reranker": "m"}}
