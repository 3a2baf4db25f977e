"""A precomputed embedding index in a folder.

  manifest.json     encoder settings, corpus hash, count, search kind
  embeddings.npy    [count, dim] float32, unit rows
  passages.jsonl    the passages in the same order
  scann/            ScaNN assets, from 20,000 passages on
  encoder files     what the encoder learned from the corpus

The folder appears complete or not at all. Opening it with another encoder or
corpus is an error, never a silently wrong search.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import tqdm
from absl import logging
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.data import files
from stepsearch_jax.retrieval import corpus as corpus_lib
from stepsearch_jax.retrieval import encoder as encoder_lib

_FORMAT = 1
_BRUTE_FORCE_ROWS = 20_000  # Below this a tree loses more than it saves.
_CHUNK = 512


class IndexMismatchError(ValueError):
  """The index was built with another encoder or corpus."""


def _scann():
  """The ScaNN module, or None where it has no wheel."""
  try:
    import scann
  except ImportError:
    return None
  return scann


def build_index(
  folder: epath.PathLike,
  passages: Sequence[types.Passage],
  encoder: encoder_lib.Encoder,
  topk: int = 10,
  fit: bool = True,
) -> None:
  """Embeds passages and writes an index folder.

  Args:
    folder: must not exist.
    passages: at least one.
    encoder: how to embed them.
    fit: whether the encoder learns its statistics from these passages; False
      if they are one shard of what it has been fitted to.
    topk: neighbours that ScaNN is tuned for.

  Raises:
    ValueError: the folder exists or there are no passages.
  """
  folder = epath.Path(folder)
  if folder.exists():
    raise ValueError(f"index folder {folder} exists already")
  if not passages:
    raise ValueError("an index needs at least one passage")
  if fit:
    encoder.fit(passages)
  temporary = folder.with_name(folder.name + ".partial")
  if temporary.exists():
    temporary.rmtree()
  temporary.mkdir(parents=True)
  vectors = np.empty((len(passages), encoder.dim), np.float32)
  bar = tqdm.tqdm(total=len(passages), unit="passage", desc="embed")
  for start in range(0, len(passages), _CHUNK):
    chunk = passages[start : start + _CHUNK]
    texts = [encoder_lib.passage_text(passage) for passage in chunk]
    vectors[start : start + len(chunk)] = encoder.encode(texts, "passage")
    bar.update(len(chunk))
  bar.close()
  with (temporary / "embeddings.npy").open("wb") as file:
    np.save(file, vectors, allow_pickle=False)
  with (temporary / "passages.jsonl").open("w") as file:
    for p in passages:
      row = {"id": p.id, "title": p.title, "text": p.text}
      file.write(json.dumps(row, ensure_ascii=False) + "\n")
  encoder.save(temporary)
  kind = "exact"
  if len(passages) >= _BRUTE_FORCE_ROWS and _scann() is not None:
    kind = "scann"
    (temporary / "scann").mkdir()
    searcher = _build_tree(vectors, topk)
    searcher.serialize(str(temporary / "scann"), relative_path=True)
  manifest = {
    "format": _FORMAT,
    "encoder": encoder.settings,
    "corpus": corpus_lib.corpus_hash(passages),
    "count": len(passages),
    "dim": encoder.dim,
    "search": kind,
  }
  (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
  temporary.rename(folder)


def _build_tree(vectors: np.ndarray, topk: int):
  """ScaNN's tree + asymmetric hashing + exact reordering."""
  count, dim = vectors.shape
  builder = _scann().scann_ops_pybind.builder(vectors, topk, "dot_product")
  leaves = int(np.sqrt(count))
  # At most 256 hash blocks keep the fast lookup path.
  block = max(2, -(-dim // 256))
  return (
    builder.tree(leaves, max(leaves // 20, 1), training_sample_size=250_000)
    .score_ah(block, anisotropic_quantization_threshold=0.2)
    .reorder(max(100, 10 * topk))
    .build()
  )


class Index:
  """An opened index; `search` maps query vectors to passage rows."""

  def __init__(
    self, folder: epath.Path, manifest: dict,
    passages: list[types.Passage],
  ):
    """Opens embeddings or ScaNN assets; use `open_index`."""
    self.manifest = manifest
    self.passages = passages
    self._searcher = None
    scann = _scann()
    if scann is not None and manifest["search"] == "scann":
      if (folder / "scann" / "scann_docids.pkl").exists():
        raise ValueError(f"{folder}/scann holds a pickle, which is never "
                         "loaded; build the index again")
      self._searcher = scann.scann_ops_pybind.load_searcher(
        str(folder / "scann")
      )
      return
    self._vectors = np.load(
      str(folder / "embeddings.npy"), mmap_mode="r", allow_pickle=False
    )
    if scann is not None:
      # Small enough to build on opening; nothing to store twice.
      self._searcher = (
        scann.scann_ops_pybind.builder(
          np.asarray(self._vectors), min(10, len(passages)), "dot_product"
        )
        .score_brute_force()
        .build()
      )
    elif manifest["search"] == "scann":
      logging.warning("ScaNN is not installed here: searching %s exactly",
                      folder)

  @property
  def hash(self) -> str:
    """Identity of encoder and corpus, the key of caches and cards."""
    encoder = self.manifest["encoder"]
    return f"{encoder['name']}:{self.manifest['corpus']}"

  def search(
    self, vectors: np.ndarray, k: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """The k best rows of each query.

    Args:
      vectors: [N, dim] float32.
      k: neighbours, cut to the number of passages.

    Returns:
      (rows [N, k] int64, inner products [N, k] float32), best first.
    """
    k = min(k, len(self.passages))
    if self._searcher is not None:
      rows, scores = self._searcher.search_batched(
        vectors, final_num_neighbors=k
      )
      return np.asarray(rows, np.int64), np.asarray(scores)
    return exact_search(np.asarray(self._vectors), vectors, k)


def exact_search(
  table: np.ndarray, vectors: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Inner-product search over all rows; ties go to the lower row."""
  scores = vectors @ table.T
  rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return rows, np.take_along_axis(scores, rows, axis=1)


def open_index(
  folder: epath.PathLike,
  encoder: encoder_lib.Encoder,
  corpus_hash: str | None = None,
) -> Index:
  """Opens an index folder and restores the encoder's corpus statistics.

  Args:
    folder: from `build_index`.
    encoder: what queries will be encoded with.
    corpus_hash: of the corpus that the caller means; None accepts any.

  Raises:
    IndexMismatchError: another encoder or corpus, naming both.
    ValueError: no index there.
  """
  folder = epath.Path(folder)
  path = folder / "manifest.json"
  if not path.exists():
    raise ValueError(f"{folder} is no index: manifest.json is missing")
  manifest = json.loads(path.read_text())
  if manifest.get("format") != _FORMAT:
    raise ValueError(f"{folder}: index format {manifest.get('format')}, "
                     f"expected {_FORMAT}; build it again")
  if manifest["encoder"] != encoder.settings:
    raise IndexMismatchError(
      f"index {folder} was built with encoder {manifest['encoder']}, "
      f"retrieval.encoder is {encoder.settings}"
    )
  if corpus_hash is not None and manifest["corpus"] != corpus_hash:
    raise IndexMismatchError(
      f"index {folder} was built over corpus {manifest['corpus']}, this run's "
      f"corpus is {corpus_hash}: build the index again or set data.corpus"
    )
  encoder.load(folder)
  passages = [
    types.Passage(row["id"], row["title"], row["text"])
    for _, row in files.read_rows(folder / "passages.jsonl")
  ]
  return Index(folder, manifest, passages)
