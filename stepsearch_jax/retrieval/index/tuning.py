"""Which ScaNN search an index gets, decided by measuring.

The rule, by rows n and dimensions d:

  n < 10,000          exact: anything else costs more than it saves
  n < 200,000         exact, hashed (asymmetric hashing, no tree) and tree are
                      built and the fastest that reaches the recall is kept
  n >= 200,000        tree

Trees have sqrt(n) leaves, trained on 100,000 rows or 40 a leaf; hashing uses 2
dimensions a block up to d = 512 and ceil(d / 256) above, because more than 256
blocks leave the fast lookup path. How many leaves are searched and how many
rows are scored again exactly is swept at search time, without a new build.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from stepsearch_jax.retrieval.index import vectors as vectors_lib

_EXACT_ROWS = 10_000
_TREE_ROWS = 200_000
_QUERIES = 512
_PARALLEL_QUERIES = 16  # Fewer are done before threads have started.
_REORDER = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Setting:
  """One way to search.

  Attributes:
    kind: "exact", "hashed" or "tree".
    leaves: leaves searched; 0 without a tree.
    reorder: rows scored again exactly; 0 in exact search.
  """

  kind: str
  leaves: int = 0
  reorder: int = 0


@dataclasses.dataclass(frozen=True)
class Measured:
  """A setting with what it reached on the sample, and what it weighs."""

  setting: Setting
  recall: float
  queries_per_second: float
  bytes: int = 0


def build(
  scann: Any, vectors: np.ndarray, kind: str, topk: int, soar: bool
) -> Any:
  """A ScaNN searcher of one kind over unit vectors [n, d]."""
  count, dim = vectors.shape
  builder = scann.scann_ops_pybind.builder(vectors, topk, "dot_product")
  if kind == "exact":
    return builder.score_brute_force().build()
  if kind == "tree":
    leaves = leaf_count(count)
    builder = builder.tree(
      leaves, max(leaves // 20, 1),
      # More would not move the centers, but would be copied twice.
      training_sample_size=min(count, max(100_000, 40 * leaves)),
      soar_lambda=1.5 if soar else None,
    )
  return (
    builder.score_ah(_block(dim), anisotropic_quantization_threshold=0.2)
    .reorder(_REORDER[-1])
    .build()
  )


def leaf_count(count: int) -> int:
  """Returns the leaves of a tree over a number of rows."""
  return int(np.sqrt(count))


def _block(dim: int) -> int:
  """Dimensions that share one code."""
  return 2 if dim <= 512 else -(-dim // 256)


def weight(kind: str, count: int, dim: int, soar: bool) -> int:
  """Bytes of a search's assets: on disk, and not exceeded in memory.

  All kinds keep the float32 rows, to score with or to score again; a row's
  codes take a byte a block (half of it in memory), a leaf two float32 centers;
  spilling stores a row's codes and leaf twice.
  """
  total = 4 * count * dim
  if kind == "exact":
    return total
  copies = 2 if soar and kind == "tree" else 1
  total += copies * count * -(-dim // _block(dim))
  if kind == "tree":
    total += copies * 4 * count + 8 * leaf_count(count) * dim
  return total


def kinds(count: int) -> tuple[str, ...]:
  """What is worth building for a number of rows."""
  if count < _EXACT_ROWS:
    return ("exact",)
  if count < _TREE_ROWS:
    return ("exact", "hashed", "tree")
  return ("tree",)


def _settings(kind: str, count: int) -> Iterator[Setting]:
  if kind == "exact":
    yield Setting(kind)
  elif kind == "hashed":
    for reorder in _REORDER:
      yield Setting(kind, 0, reorder)
  else:
    total = leaf_count(count)
    shares = 0.01 * 2 ** np.arange(0, 5.5, 0.25)
    for leaves in sorted({max(int(total * share), 1) for share in shares}):
      for reorder in _REORDER[:-1]:
        yield Setting(kind, leaves, reorder)


def search(
  searcher: Any, setting: Setting, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """(rows [N, k], scores [N, k]) under a setting."""
  batched = searcher.search_batched
  if len(queries) >= _PARALLEL_QUERIES:
    batched = functools.partial(
      searcher.search_batched_parallel,
      batch_size=-(-len(queries) // (os.cpu_count() or 1)),
    )
  if setting.kind == "exact":
    return batched(queries, final_num_neighbors=k)
  # The first pass of a hashed search must leave something to choose from.
  options = {"pre_reorder_num_neighbors": max(setting.reorder, k)}
  if setting.kind == "tree":
    options["leaves_to_search"] = setting.leaves
  return batched(queries, final_num_neighbors=k, **options)


def sample_queries(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
  """Unit vectors near rows of the index, as questions are near passages."""
  rng = np.random.default_rng(seed)
  rows = rng.choice(len(vectors), min(_QUERIES, len(vectors)), replace=False)
  drawn = np.asarray(vectors[np.sort(rows)], np.float32)
  noise = rng.normal(size=drawn.shape) / np.sqrt(drawn.shape[1])
  drawn = drawn + 0.5 * noise.astype(np.float32)
  return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def exact_rows(
  vectors: np.ndarray, queries: np.ndarray, k: int, chunk: int = 65_536
) -> np.ndarray:
  """[N, k] best rows by inner product, a chunk of the index at a time."""
  best = np.full((len(queries), k), -np.inf, np.float32)
  rows = np.zeros((len(queries), k), np.int64)
  for start in range(0, len(vectors), chunk):
    scores = queries @ np.asarray(vectors[start : start + chunk]).T
    take = min(k, scores.shape[1])
    top = np.argpartition(-scores, take - 1, axis=1)[:, :take]
    both = np.concatenate([best, np.take_along_axis(scores, top, 1)], axis=1)
    names = np.concatenate([rows, top + start], axis=1)
    order = np.argsort(-both, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(both, order, 1)
    rows = np.take_along_axis(names, order, 1)
  return rows


def measure(
  searcher: Any, setting: Setting, queries: np.ndarray, truth: np.ndarray,
  repeats: int = 3,
) -> Measured:
  """Recall against exact search, and the best rate of some repeats."""
  k = truth.shape[1]
  rate = 0.0
  for _ in range(repeats):
    began = time.perf_counter()
    rows, _ = search(searcher, setting, queries, k)
    rate = max(rate, len(queries) / (time.perf_counter() - began))
  found = np.asarray(rows, np.int64)
  hits = (found[:, :, None] == truth[:, None, :]).any(2)
  return Measured(setting, float(hits.mean()), rate)


def tune(
  scann: Any, vectors: np.ndarray, k: int, recall: float, topk: int, soar: bool
) -> tuple[Any, Measured, list[Measured]]:
  """The fastest search that reaches a recall.

  Args:
    scann: the module.
    vectors: [n, d] unit rows, possibly memory-mapped.
    k: neighbors that recall counts.
    recall: the target.
    topk: most neighbors that will ever be asked for.
    soar: let trees spill (arXiv 2404.00774).

  Returns:
    (searcher, `Measured` of the choice, all `Measured`).
  """
  count, dim = vectors.shape
  names = kinds(count)
  if names == ("exact",):
    choice = Measured(
      Setting("exact"), 1.0, 0.0, weight("exact", count, dim, soar)
    )
    return build(scann, vectors, "exact", topk, soar), choice, [choice]
  queries = sample_queries(vectors)
  truth = exact_rows(vectors, queries, k)
  vectors_lib.release(vectors)
  table, best, kept = [], None, None
  bar = tqdm.tqdm(names, desc="tune", unit="kind")
  for kind in bar:
    bar.set_postfix_str(kind)
    with vectors_lib.releasing(vectors):
      searcher = build(scann, vectors, kind, topk, soar)
    size = weight(kind, count, dim, soar)
    rows = [
      dataclasses.replace(
        measure(searcher, setting, queries, truth), bytes=size
      )
      for setting in _settings(kind, len(vectors))
    ]
    table += rows
    # Enough recall first, then speed; without enough, the best recall.
    chosen = max(rows, key=lambda m: _rank(m, recall))
    if best is None or _rank(chosen, recall) > _rank(best, recall):
      best, kept = chosen, searcher
  return kept, best, table


def _rank(measured: Measured, recall: float):
  if measured.recall >= recall:
    return (1, measured.queries_per_second)
  return (0, measured.recall)
