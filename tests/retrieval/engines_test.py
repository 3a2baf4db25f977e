"""BM25, the cross-encoder and the web search against independent references."""

import dataclasses
import json
import logging
import math
import threading
from http import server

import fakes
import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.retrieval import bm25, online, remote, rerank
from stepsearch_jax.retrieval import local as retriever
from stepsearch_jax.retrieval import recording as record
from stepsearch_jax.retrieval.index import build as index_build
from stepsearch_jax.retrieval.index import encoder

PASSAGES = [
  types.Passage("a", "Ada", "Ada Rook was born in Lintel, Lintel indeed."),
  types.Passage("b", "Lintel", "Lintel lies on the river Mossing."),
  types.Passage("c", "Bo", "Bo Rook sells umbrellas near the harbour."),
]


def test_bm25_scores_equal_the_formula():
  pytest.importorskip("bm25s")
  (found,) = bm25.Bm25Retriever(PASSAGES).search(["Lintel"], 3)
  texts = [f"{p.title} {p.text}".lower() for p in PASSAGES]
  stop = {"was", "in", "on", "the"}
  words = [
    [w.strip(".,") for w in text.split() if w.strip(".,") not in stop]
    for text in texts
  ]
  mean = np.mean([len(line) for line in words])
  holding = sum("lintel" in line for line in words)
  idf = math.log(1 + (3 - holding + 0.5) / (holding + 0.5))
  want = {}
  for passage, line in zip(PASSAGES, words, strict=True):
    count = line.count("lintel")
    norm = 1.5 * (1 - 0.75 + 0.75 * len(line) / mean)
    want[passage.id] = idf * count / (count + norm)  # Lucene's variant.
  for passage in found:
    assert passage.score == pytest.approx(want[passage.id], abs=1e-3)
  assert [p.id for p in found][:2] == sorted(want, key=lambda i: -want[i])[:2]


def test_cross_encoder_equals_torch_and_reorders(tmp_path):
  torch = pytest.importorskip("torch")
  import transformers

  torch.manual_seed(0)
  config = transformers.BertConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=64, num_labels=1,
  )
  model = transformers.BertForSequenceClassification(config).eval()
  for parameter in model.parameters():  # Sharper than the initial 0.02.
    parameter.data.normal_(0.0, 0.3)
  model.save_pretrained(tmp_path)
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({
    w.strip(".,").lower() for p in PASSAGES
    for w in f"{p.title} {p.text}".split()
  }), "where"]
  (tmp_path / "vocab.txt").write_text("\n".join(words))
  tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
  tokenizer.save_pretrained(tmp_path)

  class All:
    def search(self, queries, k):
      return [PASSAGES[:k] for _ in queries]

    def describe(self):
      return {"index": "all"}

  ours = rerank.RerankingRetriever(All(), str(tmp_path), candidates=3)
  (found,) = ours.search(["where Lintel"], 3)
  with torch.no_grad():
    encoded = tokenizer(
      ["where Lintel"] * 3, [f"{p.title}\n{p.text}" for p in PASSAGES],
      return_tensors="pt", padding=True,
    )
    want = model(**encoded).logits[:, 0].numpy()
  got = {p.id: p.score for p in found}
  np.testing.assert_allclose(
    [got[p.id] for p in PASSAGES], want, atol=1e-4
  )
  assert [p.id for p in found] == [PASSAGES[i].id for i in np.argsort(-want)]
  assert ours.describe()["candidates"] == 3


def test_queries_longer_than_the_cross_encoder_are_cut(tmp_path):
  """As sentence-transformers does: the longer of the two gives way."""
  import transformers

  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ada", "rook"]
  (tmp_path / "vocab.txt").write_text("\n".join(words))
  ours = rerank.RerankingRetriever.__new__(rerank.RerankingRetriever)
  ours._hf = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
  ours._limit, ours._params = 64, None
  seen = []

  def score(params, tokens, kinds, mask):
    seen.append(tokens[0][mask[0]].tolist())
    return np.zeros(len(tokens), np.float32)

  ours._score = score
  ours._scores([("rook " * 600, "ada ada")])
  assert seen == [[2, *[6] * 59, 3, 5, 5, 3]]
  seen.clear()
  ours._scores([("rook", "ada " * 600)])
  assert seen == [[2, 6, 3, *[5] * 60, 3]]


@pytest.fixture
def engine():
  """A web search engine that wants a key and can be told to fail."""
  seen = {"keys": [], "status": 200, "asked": []}

  class Handler(server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      seen["keys"].append(self.headers["X-API-KEY"])
      seen["asked"].append(body["q"])
      if body["q"] == "refused":
        self.send_response(400)
        self.end_headers()
        return
      self.send_response(seen["status"])
      self.end_headers()
      if seen["status"] != 200:  # Some servers repeat the key.
        self.wfile.write(f"invalid key {self.headers['X-API-KEY']}".encode())
        return
      if body["q"] == "nothing":
        self.wfile.write(b'{"searchParameters": {}}')
        return
      results = [
        {"title": f"{body['q']} {i}", "link": f"http://x/{i}", "snippet": "s"}
        for i in range(5)
      ]
      self.wfile.write(json.dumps({"organic": results}).encode())

    def log_message(self, *unused):
      pass

  http = server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=http.serve_forever, daemon=True)
  thread.start()
  yield f"http://127.0.0.1:{http.server_port}/search", seen
  http.shutdown()


def test_web_search_returns_titles_and_snippets_in_rank_order(
  engine, monkeypatch
):
  url, seen = engine
  monkeypatch.setenv(online.KEY_VARIABLE, "secret-key")
  ours = online.OnlineRetriever(remote.PATIENCE, url)
  first, second = ours.search(["moon", "sun"], 2)
  assert [p.title for p in first] == ["moon 0", "moon 1"]
  assert [p.title for p in second] == ["sun 0", "sun 1"]
  assert first[0].score > first[1].score and first[0].text == "s"
  assert seen["keys"] == ["secret-key"] * 2
  assert "secret-key" not in json.dumps(ours.describe())


def test_web_searches_fail_alone_and_may_find_nothing(engine, monkeypatch):
  url, seen = engine
  monkeypatch.setenv(online.KEY_VARIABLE, "secret-key")
  patient = dataclasses.replace(remote.PATIENCE, open_after=1)
  ours = online.OnlineRetriever(patient, url)
  for _ in range(3):
    found = ours.search(["refused", "nothing", " ", "moon"], 1)
    assert found[:3] == [None, [], []]
    assert [p.title for p in found[3]] == ["moon 0"]
    with pytest.raises(types.SearchError, match="status 400"):
      ours.search(["refused"], 1)
  assert " " not in seen["asked"]


def test_web_search_never_shows_its_key(engine, monkeypatch, caplog):
  caplog.set_level(logging.DEBUG)
  url, seen = engine
  with pytest.raises(ValueError, match="SERPER_API_KEY"):
    monkeypatch.delenv(online.KEY_VARIABLE, raising=False)
    online.OnlineRetriever(remote.PATIENCE, url)
  monkeypatch.setenv(online.KEY_VARIABLE, "secret-key")
  seen["status"] = 403
  patient = dataclasses.replace(
    remote.PATIENCE, retries=1, backoff_seconds=0.0
  )
  with pytest.raises(types.SearchError) as error:
    online.OnlineRetriever(patient, url).search(["moon"], 2)
  assert "status 403: invalid key [secret]" in str(error.value)
  assert "secret-key" not in str(error.value) + caplog.text


def test_fakes_and_engines_speak_one_protocol(tmp_path):
  pytest.importorskip("bm25s")
  embed = encoder.HashedTfidfEncoder(64)
  index_build.build_index(tmp_path / "index", PASSAGES, embed)
  recorder = record.RecordingRetriever(
    bm25.Bm25Retriever(PASSAGES), tmp_path / "searches.jsonl"
  )
  for engine in (
    fakes.FakeRetriever(), bm25.Bm25Retriever(PASSAGES), recorder,
    retriever.open_retriever(tmp_path / "index", embed),
  ):
    found = engine.search(["Lintel", "Rook"], 2)
    assert len(found) == 2 and all(len(row) == 2 for row in found)
    assert engine.search([], 2) == []


@pytest.mark.parametrize("query", ["", "the of", "?!", "zeppelin", "\n"])
def test_what_no_passage_shares_a_word_with_finds_nothing(tmp_path, query):
  pytest.importorskip("bm25s")
  embed = encoder.HashedTfidfEncoder(1 << 16)
  passages = [types.Passage("1", "Ada", "Ada Rook was born in Lintel.")]
  index_build.build_index(tmp_path / "index", passages, embed)
  for engine in (
    bm25.Bm25Retriever(passages),
    retriever.open_retriever(tmp_path / "index", embed),
  ):
    assert engine.search([query], 3) == [[]]
    # Nor does a hit bring others along.
    hit, miss = engine.search([f"Rook {query}", query], 3)
    assert [p.id for p in hit] == ["1"] and miss == []


def test_a_corpus_without_words_is_searched_in_vain():
  pytest.importorskip("bm25s")
  ours = bm25.Bm25Retriever([types.Passage("1", "The", "of the and")])
  assert ours.search(["the", "Ada"], 3) == [[], []]


def test_the_reranker_keeps_the_best_with_its_own_scores():
  likes = {p.id: score for p, score in
           zip(PASSAGES, (0.5, -2.0, 3.0), strict=False)}

  class All:
    def search(self, queries, k):
      return [None if q == "refused" else PASSAGES[:k] for q in queries]

  ours = rerank.RerankingRetriever.__new__(rerank.RerankingRetriever)
  ours._inner, ours._candidates = All(), 3
  by_text = {f"{p.title}\n{p.text}": likes[p.id] for p in PASSAGES[:3]}
  ours._scores = lambda pairs: np.array([by_text[text] for _, text in pairs])
  first, refused = ours.search(["a", "refused"], 2)
  assert refused is None
  assert [(p.id, p.score) for p in first] == [
    (PASSAGES[2].id, 3.0), (PASSAGES[0].id, 0.5)
  ]
