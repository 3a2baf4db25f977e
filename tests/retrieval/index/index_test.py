"""Indexes on disk: right neighbors, wrong encoders and corpora refused."""

import io
import json

import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.retrieval import local as retriever
from stepsearch_jax.retrieval.index import build as index_build
from stepsearch_jax.retrieval.index import (
  corpus,
  encoder,
  encoding,
  index,
  passages,
  tuning,
)

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


def manifest(**changes):
  """Changes fields of a manifest; None leaves one out."""
  return lambda old: json.dumps({
    name: value for name, value in (json.loads(old) | changes).items()
    if value is not None
  }).encode()


def array(change):
  """Changes the array of an .npy file."""
  def changed(old):
    file = io.BytesIO()
    np.save(file, change(np.load(io.BytesIO(old))))
    return file.getvalue()
  return changed


EXACT = {"kind": "exact", "leaves": 0, "reorder": 0}


@pytest.mark.parametrize("name, change, said", [
  ("manifest.json", lambda old: b"", r"manifest.json:1: malformed JSON"),
  ("manifest.json", lambda old: old[:50], "manifest.json:4: malformed JSON"),
  ("manifest.json", lambda old: b"[]", "expected a JSON object, got list"),
  ("manifest.json", lambda old: b'{"format": 2, "x": "\xe9"}', "UTF-8"),
  ("manifest.json", manifest(format="2"), "index format '2', expected 2"),
  *[("manifest.json", manifest(**{name: None}),
     f"manifest.json: field {name}: expected {kind}, got no such field")
    for name, kind in (("encoder", "dict"), ("corpus", "str"), ("dim", "int"),
                       ("count", "int"), ("search", "dict"))],
  ("manifest.json", manifest(encoder="hashed"), "encoder: expected dict"),
  ("manifest.json", manifest(encoder={"dim": 4096}), "encoder: field name"),
  ("manifest.json", manifest(search={"kind": "exact"}), "search: field leaves"),
  ("manifest.json", manifest(search=EXACT | {"zzz": 1}), "got .*'zzz': 1"),
  ("manifest.json", manifest(search=EXACT | {"kind": "x"}), "one of .*'tree'"),
  ("manifest.json", manifest(count=99), "says 99 passages .* holds 3 and "),
  ("embeddings.npy", array(lambda old: old[:2]), r"float32 \[2, 4096\]; build"),
  ("embeddings.npy", array(lambda old: old[:, :8]), r"float32 \[3, 8\]; build"),
  ("embeddings.npy", array(np.float64), r"float64 \[3, 4096\]; build"),
  ("embeddings.npy", lambda old: old[:-4], "embeddings.npy: cannot be read"),
  ("embeddings.npy", lambda old: b"", "embeddings.npy: cannot be read as an"),
  ("idf.npy", lambda old: old[:-4], "idf.npy: cannot be read as an .npy"),
  ("idf.npy", array(lambda old: old[1:]), r"float32 \[4096\], got .*\[4095\]"),
  ("offsets.npy", lambda old: old[:-8], "offsets.npy: cannot be read as an"),
  ("offsets.npy", array(lambda old: old[:-1]), "passages.jsonl: 229 bytes"),
  ("offsets.npy", array(lambda old: old[:0]), "passages.jsonl: 229 bytes"),
  ("offsets.npy", array(lambda old: old[[0, 1, 3]]), "jsonl holds 2 and"),
  ("passages.jsonl", lambda old: b"", r"0 bytes, but offsets.npy ends at"),
  ("passages.jsonl", lambda old: old[:-1], r"228 bytes, but .* at \[229\]"),
  ("passages.jsonl", lambda old: old + b"\n", r"230 bytes, but .* at \[229\]"),
])
def test_a_damaged_index_is_refused_when_it_is_opened(
  folder, name, change, said
):
  path = folder / name
  path.write_bytes(change(path.read_bytes()))
  with pytest.raises(types.UserError, match=said) as error:
    index.open_index(folder, encoder.HashedTfidfEncoder())
  assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_manifest_may_begin_with_a_mark(folder):
  path = folder / "manifest.json"
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert index.open_index(folder, encoder.HashedTfidfEncoder()).manifest[
    "count"] == 3


def test_an_altered_passage_names_its_line(folder):
  path = folder / "passages.jsonl"
  whole = path.read_bytes()
  path.write_bytes(whole.replace(b'"b", "title"', b'"b", "titel"'))
  store = passages.PassageStore(folder)
  assert store[0] == PASSAGES[0]
  with pytest.raises(types.UserError, match=r"passages.jsonl:2: no passage"):
    _ = store[1]


def test_a_search_without_its_assets_is_refused(folder):
  pytest.importorskip("scann")
  path = folder / "manifest.json"
  path.write_bytes(manifest(search=EXACT | {"kind": "tree"})(path.read_bytes()))
  with pytest.raises(types.UserError, match="index/scann: missing or damaged"):
    index.open_index(folder, encoder.HashedTfidfEncoder())


def test_the_encoder_of_a_manifest_has_all_its_texts():
  given = {"name": "a/e5", "pooling": "mean", "query_prefix": "query: ",
           "passage_prefix": "passage: ", "max_length": 9, "weights": "12ab"}
  assert index.encoder_of({"encoder": given}) == (
    "a/e5", encoding.EncodingSpec("mean", "query: ", "passage: ", 9))
  for name in ("pooling", "query_prefix", "passage_prefix", "max_length"):
    less = {k: v for k, v in given.items() if k != name}
    with pytest.raises(types.UserError, match=f"encoder: field {name}"):
      index.encoder_of({"encoder": less})
  assert index.encoder_of({"encoder": {"name": "hashed_tfidf"}, "dim": 7}) == (
    "hashed_tfidf:7", encoding.FROM_MODEL)
