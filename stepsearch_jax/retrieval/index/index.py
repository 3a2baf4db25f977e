"""A precomputed embedding index in a folder.

  manifest.json     encoder settings, corpus hash, count, search and its tuning
  embeddings.npy    [count, dim] float32, unit rows
  passages.jsonl    the passages in the same order, offsets.npy beside it
  scann/            ScaNN assets, unless the search is exact
  encoder files     what the encoder learned from the corpus

The folder appears complete or not at all. Opening it with another encoder or
corpus is an error, never a silently wrong search.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from stepsearch_jax import buckets, types
from stepsearch_jax.retrieval.index import encoder as encoder_lib
from stepsearch_jax.retrieval.index import encoding, tuning
from stepsearch_jax.retrieval.index import passages as passages_lib

FORMAT = 2


class IndexMismatchError(types.UserError):
  """The index was built with another encoder or corpus."""


def load_scann() -> Any:
  """The ScaNN module, or None where it has no wheel."""
  try:
    import scann
  except ImportError:
    return None
  return scann


class Index:
  """An opened index; `search` maps query vectors to passage rows."""

  def __init__(
    self, folder: epath.Path, manifest: dict,
    passages: passages_lib.PassageStore,
  ):
    """Opens embeddings or ScaNN assets; use `open_index`."""
    self.manifest = manifest
    self.passages = passages
    self._setting = tuning.Setting(**manifest["search"])
    self._searcher = None
    self._vectors = np.load(
      str(folder / "embeddings.npy"), mmap_mode="r", allow_pickle=False
    )
    scann = load_scann()
    if scann is None:
      self._setting = tuning.Setting("exact")
      logging.warning("ScaNN is not installed here: searching %s exactly",
                      folder)
    elif self._setting.kind == "exact":
      # Small enough to build on opening; nothing to store twice.
      self._searcher = tuning.build(
        scann, np.asarray(self._vectors), "exact", min(10, len(passages)),
        False,
      )
    else:
      if (folder / "scann" / "scann_docids.pkl").exists():
        raise types.UserError(
          f"{folder}/scann holds a pickle, which is never "
          "loaded; build the index again"
        )
      self._searcher = scann.scann_ops_pybind.load_searcher(
        str(folder / "scann")
      )

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
      k: neighbors, cut to the number of passages.

    Returns:
      (rows [N, k] int64, inner products [N, k] float32), best first; NaN
      products where fewer than k rows were found.
    """
    k = min(k, len(self.passages))
    if self._searcher is not None:
      rows, scores = tuning.search(self._searcher, self._setting, vectors, k)
      rows, scores = np.array(rows, np.int64), np.array(scores)
      short = np.isnan(scores).any(axis=1)
      if short.any() and self._setting.kind == "tree":
        # The leaves of the setting hold fewer than k rows: search them all.
        everything = dataclasses.replace(
          self._setting, leaves=tuning.leaf_count(len(self.passages))
        )
        rows[short], scores[short] = tuning.search(
          self._searcher, everything, vectors[short], k
        )
      return rows, scores
    return exact_search(np.asarray(self._vectors), vectors, k)


def exact_search(
  table: np.ndarray, vectors: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Inner-product search over all rows; ties go to the lower row."""
  scores = vectors @ table.T
  rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return rows, np.take_along_axis(scores, rows, axis=1)


def read_manifest(
  folder: epath.PathLike, named: str = ""
) -> dict[str, Any]:
  """Returns the manifest of an index folder.

  Args:
    folder: of the index.
    named: what an error begins with, such as the flag that names the folder.

  Raises:
    UserError: no index there, or one of another format.
  """
  path = epath.Path(folder) / "manifest.json"
  if not path.exists():
    raise types.UserError(
      f"{named}{folder} is no index: manifest.json is missing"
    )
  manifest = json.loads(path.read_text())
  if manifest.get("format") != FORMAT:
    raise types.UserError(
      f"{named}{folder}: index format {manifest.get('format')}, "
      f"expected {FORMAT}; build it again"
    )
  return manifest


def encoder_of(
  manifest: Mapping[str, Any]
) -> tuple[str, encoding.EncodingSpec]:
  """Returns the reference and the texts of the encoder that built an index."""
  given = manifest["encoder"]
  if given["name"] == "hashed_tfidf":
    return f"hashed_tfidf:{given['dim']}", encoding.FROM_MODEL
  return given["name"], encoding.EncodingSpec(**{
    field.name: given[field.name]
    for field in dataclasses.fields(encoding.EncodingSpec)
  })


def open_index(
  folder: epath.PathLike,
  encoder: encoder_lib.Encoder,
  corpus_hash: str | None = None,
) -> Index:
  """Opens an index folder and restores the encoder's corpus statistics.

  Args:
    folder: from `build.build_index`; one in a bucket is copied.
    encoder: what queries will be encoded with.
    corpus_hash: of the corpus that the caller means; None accepts any.

  Raises:
    IndexMismatchError: another encoder or corpus, naming both.
    UserError: no index there.
  """
  folder = epath.Path(folder)
  manifest = read_manifest(folder)
  if not encoder_lib.is_same(manifest["encoder"], encoder.settings):
    raise IndexMismatchError(
      f"index {folder} was built with encoder {manifest['encoder']}, "
      f"retrieval.encoder is {encoder.settings}"
    )
  if corpus_hash is not None and manifest["corpus"] != corpus_hash:
    raise IndexMismatchError(
      f"index {folder} was built over corpus {manifest['corpus']}, this run's "
      f"corpus is {corpus_hash}: build the index again or set data.corpus"
    )
  folder = buckets.local_copy(folder)  # Files are mapped into memory.
  encoder.load(folder)
  return Index(folder, manifest, passages_lib.PassageStore(folder))
