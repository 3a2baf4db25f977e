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
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from stepsearch_jax import buckets, files, types
from stepsearch_jax.retrieval.index import encoder as encoder_lib
from stepsearch_jax.retrieval.index import encoding, tuning
from stepsearch_jax.retrieval.index import passages as passages_lib
from stepsearch_jax.retrieval.index import vectors as vectors_lib

FORMAT = 2
_FIELDS = {
  "encoder": dict, "corpus": str, "count": int, "dim": int, "search": dict,
}
_SEARCH = {"kind": str, "leaves": int, "reorder": int}
_ENCODING = {  # As in `encoding.EncodingSpec`.
  "pooling": str, "query_prefix": str, "passage_prefix": str,
  "max_length": int,
}
_KINDS = ("exact", "hashed", "tree")


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
    """Opens embeddings or ScaNN assets; use `open_index`.

    Raises:
      DataError: files are damaged or cut, or do not belong together.
    """
    self.manifest = manifest
    self.passages = passages
    self._setting = tuning.Setting(**manifest["search"])
    self._searcher = None
    self._vectors = vectors_lib.read_npy(
      folder / "embeddings.npy", mapped=True
    )
    shape, count = self._vectors.shape, manifest["count"]
    if len(passages) != count or shape != (count, manifest["dim"]) or (
      self._vectors.dtype != np.float32
    ):
      raise files.DataError(
        f"{folder}: manifest.json says {count} passages and float32 "
        f"[{count}, {manifest['dim']}], {passages_lib.TEXTS} holds "
        f"{len(passages)} and embeddings.npy {self._vectors.dtype} "
        f"{list(shape)}; build the index again"
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
      try:
        self._searcher = scann.scann_ops_pybind.load_searcher(
          str(folder / "scann")
        )
      except (RuntimeError, ValueError) as error:
        raise files.DataError(
          f"{folder}/scann: missing or damaged, build the index again "
          f"({types.first_line(error)})"
        ) from error

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
    UserError: no index there, one of another format, or a damaged manifest.
  """
  path = epath.Path(folder) / "manifest.json"
  if not path.exists():
    raise types.UserError(
      f"{named}{folder} is no index: manifest.json is missing"
    )
  manifest = files.read_object(path, {})
  if manifest.get("format") != FORMAT:
    raise types.UserError(
      f"{named}{folder}: index format {manifest.get('format')!r}, "
      f"expected {FORMAT}; build it again"
    )
  where = f"{named}{path}"
  files.check_fields(where, manifest, _FIELDS)
  search = manifest["search"]
  files.check_fields(f"{where}: encoder", manifest["encoder"], {"name": str})
  files.check_fields(f"{where}: search", search, _SEARCH)
  if search.keys() != _SEARCH.keys() or search["kind"] not in _KINDS:
    raise files.DataError(
      f"{where}: field search: expected {list(_SEARCH)} with kind one of "
      f"{_KINDS}, got {search}"
    )
  return manifest


def encoder_of(
  manifest: Mapping[str, Any]
) -> tuple[str, encoding.EncodingSpec]:
  """Returns the reference and the texts of the encoder that built an index."""
  given = manifest["encoder"]
  if given["name"] == "hashed_tfidf":
    return f"hashed_tfidf:{manifest['dim']}", encoding.FROM_MODEL
  files.check_fields("manifest.json: encoder", given, _ENCODING)
  return given["name"], encoding.EncodingSpec(**{
    name: given[name] for name in _ENCODING
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
