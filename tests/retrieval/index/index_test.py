"""Indexes on disk: right neighbors, wrong encoders and corpora refused."""

import json

import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.retrieval import local as retriever
from stepsearch_jax.retrieval.index import build as index_build
from stepsearch_jax.retrieval.index import corpus, encoder, index, tuning

PASSAGES = [
  types.Passage("a", "Ada", "Ada Rook was born in the town of Lintel."),
  types.Passage("b", "Lintel", "Lintel lies on the river Mossing."),
  types.Passage("c", "Bo", "Bo Rook sells umbrellas in Lintel."),
]


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "index"
  index_build.build_index(path, PASSAGES, encoder.HashedTfidfEncoder())
  return path


def test_search_finds_the_passage_and_scores_fall(folder):
  found = retriever.open_retriever(
    folder, encoder.HashedTfidfEncoder(), corpus.corpus_hash(PASSAGES)
  ).search(["river Mossing", "Ada Rook born", "river Mossing"], 3)
  assert [docs[0].id for docs in found] == ["b", "a", "b"]
  assert found[0][0].text == PASSAGES[1].text
  scores = [doc.score for doc in found[0]]
  assert scores == sorted(scores, reverse=True) and scores[0] > 0.3


def test_hashed_tfidf_equals_a_plain_computation(folder):
  ours = encoder.HashedTfidfEncoder(dim=1 << 20)  # No collisions.
  ours.fit(PASSAGES)
  texts = [encoder.passage_text(p) for p in PASSAGES]
  cosine = ours.encode(texts, "passage") @ ours.encode(texts, "query").T
  words = [t.lower().replace(".", "").split() for t in texts]
  vocabulary = sorted({w for line in words for w in line})
  idf = {
    w: np.log(4 / (1 + sum(w in line for line in words))) + 1
    for w in vocabulary
  }
  table = np.array([
    [(1 + np.log(line.count(w))) * idf[w] if w in line else 0.0
     for w in vocabulary]
    for line in words
  ])
  table /= np.linalg.norm(table, axis=1, keepdims=True)
  np.testing.assert_allclose(cosine, table @ table.T, atol=1e-5)


def test_another_encoder_or_corpus_is_refused(folder):
  with pytest.raises(index.IndexMismatchError, match="'dim': 4096.*'dim': 64"):
    index.open_index(folder, encoder.HashedTfidfEncoder(dim=64))
  other = corpus.corpus_hash(PASSAGES[:2])
  with pytest.raises(index.IndexMismatchError, match=f"corpus is {other}"):
    index.open_index(folder, encoder.HashedTfidfEncoder(), other)


def test_an_encoder_is_known_by_its_weights_where_an_index_tells_them():
  said = {"name": "a/e5", "dim": 3, "weights": "12ab"}
  assert encoder.is_same(said, said | {"name": "b/e5"})
  for other in ({"weights": "ff"}, {"dim": 4}, {"pooling": "cls"}):
    assert not encoder.is_same(said, said | other)
  before = {"name": "a/e5", "dim": 3}  # An index of an earlier version.
  assert encoder.is_same(before, said) and encoder.is_same(said, before)
  assert not encoder.is_same(before, said | {"name": "b/e5"})
  assert not encoder.is_same(before, said | {"dim": 4})


def test_folder_is_complete_or_absent(folder, tmp_path):
  with pytest.raises(ValueError, match="exists already"):
    index_build.build_index(folder, PASSAGES, encoder.HashedTfidfEncoder())

  class Failing(encoder.HashedTfidfEncoder):
    def encode(self, texts, kind):
      raise OSError("disk full")

  with pytest.raises(OSError):
    index_build.build_index(tmp_path / "x", PASSAGES, Failing())
  assert not (tmp_path / "x").exists()
  with pytest.raises(ValueError, match="manifest.json is missing"):
    index.open_index(tmp_path / "x", encoder.HashedTfidfEncoder())


def test_scann_equals_exact_search_on_wiki_passages(shared, tmp_path):
  pytest.importorskip("scann")
  path = str(shared / "data/wiki18/wiki18_passages.jsonl")
  passages = corpus.load_corpus(path)[:3000]
  ours = encoder.HashedTfidfEncoder(512)
  index_build.build_index(tmp_path / "wiki", passages, ours)
  opened = index.open_index(tmp_path / "wiki", ours)
  queries = ours.encode([p.text[:80] for p in passages[:50]], "query")
  rows, scores = opened.search(queries, 3)
  table = np.load(tmp_path / "wiki" / "embeddings.npy")
  _, want = index.exact_search(table, queries, 3)
  np.testing.assert_allclose(scores, want, atol=1e-5)
  assert (np.einsum("nkd,nd->nk", table[rows], queries) - want).max() < 1e-5


@pytest.mark.slow
def test_tree_search_reaches_the_exact_neighbors(tmp_path):
  pytest.importorskip("scann")
  rng = np.random.default_rng(0)
  centers = rng.normal(size=(400, 32))
  table = centers[rng.integers(0, 400, 21_000)] + 0.3 * rng.normal(
    size=(21_000, 32)
  )
  table = (table / np.linalg.norm(table, axis=1, keepdims=True)).astype(
    np.float32
  )

  class Rows(encoder.HashedTfidfEncoder):
    def encode(self, texts, kind):
      return table[[int(t.split("\n")[0]) for t in texts]]

  passages = [types.Passage(str(i), str(i), "x") for i in range(len(table))]
  index_build.build_index(tmp_path / "tree", passages, Rows(32))
  manifest = json.loads((tmp_path / "tree" / "manifest.json").read_text())
  assert manifest["search"]["kind"] in ("hashed", "tree")
  rows, _ = index.open_index(tmp_path / "tree", Rows(32)).search(table[:200], 3)
  want, _ = index.exact_search(table, table[:200], 3)
  recall = np.mean([
    len(set(a) & set(b)) / 3 for a, b in zip(rows, want, strict=True)
  ])
  assert recall > 0.95


@pytest.mark.parametrize("k", [3, 60, 2000])
def test_a_tree_asked_for_more_than_its_leaves_hold_finds_it_elsewhere(
  tmp_path, monkeypatch, k
):
  pytest.importorskip("scann")
  rng = np.random.default_rng(0)
  table = rng.normal(size=(900, 16)).astype(np.float32)
  table /= np.linalg.norm(table, axis=1, keepdims=True)

  class Rows(encoder.HashedTfidfEncoder):
    counts_words = False

    def encode(self, texts, kind):
      return table[[int(t.split("\n")[0]) for t in texts]]

  monkeypatch.setattr(tuning, "kinds", lambda count: ("tree",))
  one_leaf = [tuning.Setting("tree", 1, 16)]
  monkeypatch.setattr(tuning, "_settings", lambda kind, count: one_leaf)
  passages = [types.Passage(str(i), str(i), "x") for i in range(len(table))]
  index_build.build_index(tmp_path / "tree", passages, Rows(16))
  opened = retriever.open_retriever(tmp_path / "tree", Rows(16))
  found = opened.search([str(i) for i in range(20)], k)
  for row in found:
    assert len({p.id for p in row}) == len(row) == min(k, len(table))
    scores = [p.score for p in row]
    assert np.isfinite(scores).all()
    assert scores == sorted(scores, reverse=True)


def test_rows_that_no_search_can_find_are_left_out(folder):
  opened = retriever.open_retriever(folder, encoder.HashedTfidfEncoder())
  opened._encoder.counts_words = False  # As an encoder of meanings.
  opened.index.search = lambda vectors, k: (
    np.array([[1, 0, 0]]), np.array([[0.5, np.nan, np.nan]], np.float32)
  )
  ((passage,),) = opened.search(["Lintel"], 3)
  assert passage.id == "b"


def test_cache_returns_the_same_and_forgets_the_oldest(folder):
  opened = retriever.open_retriever(
    folder, encoder.HashedTfidfEncoder(), cache_size=1
  )
  first = opened.search(["Ada"], 2)
  opened.search(["Bo"], 2)
  assert list(opened._cache) == [(2, "Bo")]
  assert opened.search(["Ada"], 2) == first
