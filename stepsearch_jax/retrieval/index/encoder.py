"""Texts to unit vectors: hashed TF-IDF, or a BERT-family encoder.

An encoder is identified by its `settings`, which the index manifest records;
queries must be encoded exactly as the passages were.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.parallel import first_run, sharding
from stepsearch_jax.retrieval.index import encoding, vectors

_WORD = re.compile(r"\w+")


class Encoder(Protocol):
  """What the index needs of an encoder.

  Attributes:
    settings: JSON-able identity: name, pooling, prefixes, dim, weights, ...
    dim: length of a vector.
    counts_words: scores add up what the words of two texts share, so that one
      of 0 or below says that they share none.
  """

  settings: dict
  dim: int
  counts_words: bool

  def fit(self, passages: Sequence[types.Passage]) -> None:
    """Learns corpus statistics, if the encoder has any."""

  def encode(self, texts: Sequence[str], kind: str) -> np.ndarray:
    """[N, dim] float32 unit vectors; kind is "query" or "passage"."""

  def save(self, folder: epath.Path) -> None:
    """Stores what `fit` learned."""

  def load(self, folder: epath.Path) -> None:
    """Restores what `save` stored."""


def is_same(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
  """Whether encoders with these settings make the same vectors.

  Where both tell their weights it does not matter where the files lie. Indexes
  of before do not tell them.
  """
  known = "weights" in theirs and "weights" in ours
  left_out = "name" if known else "weights"
  mine, other = (
    {name: value for name, value in settings.items() if name != left_out}
    for settings in (ours, theirs)
  )
  return mine == other


def _weights(params: types.Tree) -> str:
  """A hash of parameters."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.ascontiguousarray(leaf))
  return digest.hexdigest()[:16]


def passage_text(passage: types.Passage) -> str:
  """What of a passage is embedded: title and text."""
  return f"{passage.title}\n{passage.text}"


def load_encoder(
  reference: str, spec: encoding.EncodingSpec = encoding.FROM_MODEL,
  mesh: sharding.DeviceMesh | None = None,
) -> Encoder:
  """Returns an encoder by name.

  Args:
    reference: "hashed_tfidf" (or "hashed_tfidf:<dimensions>"), or a BERT
      folder, hub id or package:<name>.
    spec: what the user says about the texts of a BERT encoder.
    mesh: local devices over which a BERT encoder splits large batches.

  Raises:
    UserError: no such encoder, or one that is not supported.
  """
  name, _, dim = reference.partition(":")
  if name == "hashed_tfidf":
    if dim and not (dim.isdigit() and int(dim)):
      raise types.UserError(
        f"{reference!r}: the dimensions must be a positive number, got {dim!r}"
      )
    return HashedTfidfEncoder(int(dim)) if dim else HashedTfidfEncoder()
  return BertEncoder(reference, spec, mesh)


class HashedTfidfEncoder:
  """TF-IDF over hashed words (Weinberger et al., 2009); needs no model."""

  counts_words = True

  def __init__(self, dim: int = 4096):
    """Makes an unfitted encoder; `fit` or `load` comes next."""
    self.dim = dim
    self.settings = {"name": "hashed_tfidf", "dim": dim, "hash": "crc32"}
    self._idf: np.ndarray | None = None

  def _buckets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """(bucket, signed weight) per distinct word; signs cancel collisions."""
    counts: dict[str, int] = {}
    for word in _WORD.findall(text.lower()):
      counts[word] = counts.get(word, 0) + 1
    hashes = [zlib.crc32(word.encode()) for word in counts]
    buckets = np.array([h % self.dim for h in hashes], np.int64)
    weights = [
      (1 if h >> 31 else -1) * (1 + math.log(c))
      for h, c in zip(hashes, counts.values(), strict=True)
    ]
    return buckets, np.array(weights, np.float32)

  def fit(self, passages: Sequence[types.Passage]) -> None:
    """Learns document frequencies."""
    frequency = np.zeros(self.dim)
    for passage in passages:
      frequency[np.unique(self._buckets(passage_text(passage))[0])] += 1
    total = len(passages)
    self._idf = (np.log((1 + total) / (1 + frequency)) + 1).astype(np.float32)

  def encode(self, texts: Sequence[str], kind: str) -> np.ndarray:
    """See `Encoder.encode`; a text without words maps to zeros."""
    del kind  # Queries and passages are bags of words alike.
    if self._idf is None:
      raise types.UserError(
        "the hashed TF-IDF encoder must be fitted or loaded"
      )
    out = np.zeros((len(texts), self.dim), np.float32)
    for row, text in enumerate(texts):
      buckets, weights = self._buckets(text)
      np.add.at(out[row], buckets, weights * self._idf[buckets])
    norm = np.linalg.norm(out, axis=1, keepdims=True)
    return out / np.maximum(norm, 1e-12)

  def save(self, folder: epath.Path) -> None:
    """Writes the document frequencies."""
    with (folder / "idf.npy").open("wb") as file:
      np.save(file, self._idf, allow_pickle=False)

  def load(self, folder: epath.Path) -> None:
    """Reads the document frequencies."""
    idf = vectors.read_npy(folder / "idf.npy")
    if idf.shape != (self.dim,) or idf.dtype != np.float32:
      raise files.DataError(
        f"{folder / 'idf.npy'}: expected float32 [{self.dim}], got "
        f"{idf.dtype} {list(idf.shape)}"
      )
    self._idf = idf


@dataclasses.dataclass(frozen=True)
class _Shapes:
  """Rows and lengths of batches: a further shape is one more compilation."""

  lengths: tuple[int, ...]
  rows: tuple[int, ...]


# Padded tokens cost a CPU as much as others; elsewhere compiling costs more.
_CLOSE = _Shapes(
  (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512), (1, 4, 16, 32)
)
_FEW = _Shapes((16, 32, 64, 128, 256, 512), (8, 64))


class BertEncoder:
  """A BERT-family sentence encoder, jitted per (rows, length) bucket."""

  counts_words = False

  def __init__(
    self, reference: str, spec: encoding.EncodingSpec = encoding.FROM_MODEL,
    mesh: sharding.DeviceMesh | None = None,
  ):
    """Loads weights.

    Args:
      reference: HF folder or id, or package:<name>.
      spec: what the user says about pooling, prefixes and length.
      mesh: devices over which full batches are split; None = the first one.

    Raises:
      UserError: the model asks for something that is not supported.
    """
    import transformers

    from stepsearch_jax.models import bert
    from stepsearch_jax.models.weights import hf as hf_weights

    path = hf_weights.resolve(reference)
    chosen = encoding.resolve(reference, path, spec)
    self._config, params = bert.load_bert(path)
    shapes = _CLOSE if jax.default_backend() == "cpu" else _FEW
    self._lengths, self._rows, self._where = shapes.lengths, shapes.rows, None
    if mesh is not None and mesh.size > 1:
      self._rows = (*shapes.rows[:-1], shapes.rows[-1] * mesh.size)
      self._where = sharding.batch(mesh)
      params = jax.device_put(params, sharding.replicated(mesh))
    self._params = jax.device_put(params)
    self._hf = transformers.AutoTokenizer.from_pretrained(path)
    self.dim = self._config.hidden_size
    self._limit = min(chosen.max_length, self._config.max_positions)
    self.settings = {
      "name": reference, "dim": self.dim,
      **dataclasses.asdict(chosen), "max_length": self._limit,
      "weights": _weights(params),
    }
    self._embed = jax.jit(
      functools.partial(
        bert.embed, config=self._config, pooling=self.settings["pooling"]
      )
    )

  def fit(self, passages: Sequence[types.Passage]) -> None:
    """Nothing to learn."""

  def save(self, folder: epath.Path) -> None:
    """Nothing to store."""

  def load(self, folder: epath.Path) -> None:
    """Nothing to restore."""

  def encode(self, texts: Sequence[str], kind: str) -> np.ndarray:
    """See `Encoder.encode`. Rows of like length are embedded together."""
    prefix = self.settings[f"{kind}_prefix"]
    ids = self._hf(
      [prefix + text for text in texts],
      truncation=True,
      max_length=self._limit,
    )["input_ids"]
    out = np.empty((len(texts), self.dim), np.float32)
    buckets: dict[int, list[int]] = {}
    for i, tokens in enumerate(ids):
      length = next(
        (b for b in self._lengths if b >= len(tokens)), len(tokens)
      )
      buckets.setdefault(min(length, self._limit), []).append(i)
    for length, group in buckets.items():
      while group:
        rows = _row_bucket(len(group), self._rows)
        part, group = group[:rows], group[rows:]
        out[part] = self._forward([ids[i] for i in part], rows, length)
    return out

  def _forward(self, ids, rows: int, length: int) -> np.ndarray:
    """[len(ids), dim] vectors of token lists, padded to [rows, length]."""
    tokens = np.zeros((rows, length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    mask[:, 0] = True  # Padding rows need one visible token.
    for row, own in enumerate(ids):
      tokens[row, : len(own)] = own
      mask[row, : len(own)] = True
    if self._where is not None and rows == self._rows[-1]:
      tokens, mask = jax.device_put((tokens, mask), self._where)
    with first_run.working():
      found = np.asarray(self._embed(self._params, tokens, mask))
    return found[: len(ids)]


def _row_bucket(count: int, sizes: Sequence[int]) -> int:
  """Rows of the next batch: all of `count` if little padding does it."""
  if count >= sizes[-1]:
    return sizes[-1]
  above = next(size for size in sizes if size >= count)
  if above <= 1.25 * count:
    return above
  return max((size for size in sizes if size <= count), default=above)
