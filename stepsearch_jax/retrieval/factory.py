"""Chooses the retriever of a run, and builds its index where none is given.

Owns `RetrievalSpec`, the checked form of `config.retrieval`. It knows neither
the config nor where the passages come from.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
from collections.abc import Sequence

import jax
from absl import logging
from etils import epath

from stepsearch_jax import buckets, types
from stepsearch_jax.parallel import distributed
from stepsearch_jax.retrieval import (
  bm25,
  local,
  online,
  recording,
  rerank,
)
from stepsearch_jax.retrieval import remote as remote_lib
from stepsearch_jax.retrieval.index import build as index_build
from stepsearch_jax.retrieval.index import corpus as corpus_lib
from stepsearch_jax.retrieval.index import encoder as encoder_lib
from stepsearch_jax.retrieval.index import encoding as encoding_lib
from stepsearch_jax.retrieval.index import passages as passages_lib


class SearchEngine(enum.StrEnum):
  """What searches when no server is asked."""

  INDEX = "index"
  BM25 = "bm25"
  ONLINE = "online"


class ReplayMiss(enum.StrEnum):
  """What happens to a query that the replayed record does not hold."""

  ERROR = "error"
  SEARCH = "search"


@dataclasses.dataclass(frozen=True)
class RetrievalSpec:
  """How a run searches: the fields of `config.retrieval`.

  Attributes:
    engine: a `SearchEngine`; ignored when `remote` is set.
    reranker: reference of a cross-encoder, empty for none.
    candidates: passages that the cross-encoder scores per query.
    encoder: "hashed_tfidf" or the reference of a BERT-family encoder.
    encoding: what is said about the encoder's texts.
    index: folder of a ready index; empty builds one in the work directory.
    remote: URL of a /retrieve server; empty searches in this process.
    patience: limits of the client of a server or web search.
    record: JSONL file that every search is written to; empty for none.
    replay: record that answers the searches; empty for none.
    replay_miss: a `ReplayMiss`.
    topk: passages per search.
    cache: queries that an index remembers.
  """

  engine: str
  reranker: str
  candidates: int
  encoder: str
  encoding: encoding_lib.EncodingSpec
  index: str
  remote: str
  patience: remote_lib.RemoteSpec
  record: str
  replay: str
  replay_miss: str
  topk: int
  cache: int

  def __post_init__(self):
    for field, kind in (("engine", SearchEngine), ("replay_miss", ReplayMiss)):
      if getattr(self, field) not in list(kind):
        raise types.UserError(
          f"retrieval.{field} must be one of {', '.join(kind)}, got "
          f"{getattr(self, field)!r}"
        )
    for field, least in (("topk", 1), ("candidates", 1), ("cache", 0)):
      if getattr(self, field) < least:
        raise types.UserError(
          f"retrieval.{field} must be at least {least}, got "
          f"{getattr(self, field)}"
        )
    if self.reranker and self.candidates < self.topk:
      raise types.UserError(
        f"retrieval.candidates = {self.candidates} must be at least "
        f"retrieval.topk = {self.topk}"
      )
    for first, second in (
      ("remote", "index"), ("record", "replay"),
    ):
      if getattr(self, first) and getattr(self, second):
        raise types.UserError(
          f"set retrieval.{first} or retrieval.{second}, not both: "
          f"{getattr(self, first)!r} and {getattr(self, second)!r}"
        )
    if self.searches and not self.remote:
      _check_available(self.engine)

  @property
  def searches(self) -> bool:
    """Whether anything is searched: not when a record must hold it all."""
    return not self.replay or self.replay_miss == ReplayMiss.SEARCH

  @property
  def searches_passages(self) -> bool:
    """Whether searches go over the run's own passages, on this machine."""
    own = not self.remote and self.engine != SearchEngine.ONLINE
    return self.searches and own

  @property
  def uses_index(self) -> bool:
    """Whether searches read an index on this machine."""
    return not self.remote and self.engine == SearchEngine.INDEX


def _check_available(engine: str) -> None:
  """Raises UserError where an engine's package or key is missing."""
  if engine == SearchEngine.ONLINE:
    online.api_key()
  if engine == SearchEngine.BM25 and importlib.util.find_spec("bm25s") is None:
    raise types.UserError(bm25.MISSING)


def open_passages(spec: RetrievalSpec) -> passages_lib.PassageStore:
  """Opens the passages of a ready index, which stay on disk.

  Raises:
    UserError: `retrieval.index` names no index.
  """
  return passages_lib.PassageStore(buckets.local_copy(_ready_index(spec)))


def load_retriever(
  spec: RetrievalSpec,
  workdir: epath.Path,
  passages: Sequence[types.Passage],
  corpus_path: str = "",
) -> types.Retriever:
  """Opens the retriever of a run; builds its index first if it must.

  Args:
    spec: how to search.
    workdir: of the run; an index that has to be built goes there.
    passages: the corpus; not looked at unless `spec.searches_passages`.
    corpus_path: file of the corpus where `passages` are those of a ready
      index, to which the file is then compared.

  Raises:
    UserError: a record of several processes, or an index that is missing or of
      another encoder or corpus.
  """
  if spec.record and jax.process_count() > 1:
    raise types.UserError(
      "retrieval.record needs a run of one process, this has "
      f"{jax.process_count()}"
    )
  if not spec.searches:
    return recording.ReplayRetriever(spec.replay)
  retriever = _open_engine(spec, workdir, passages, corpus_path)
  if spec.reranker and not isinstance(retriever, local.EmptyRetriever):
    retriever = rerank.RerankingRetriever(
      retriever, spec.reranker, spec.candidates
    )
  if spec.replay:
    return recording.ReplayRetriever(spec.replay, retriever)
  if spec.record:
    return recording.RecordingRetriever(retriever, spec.record)
  return retriever


def _open_engine(spec, workdir, passages, corpus_path):
  """A client, BM25, or an index: ready, or built in the work directory."""
  if spec.uses_index:
    encoder = encoder_lib.load_encoder(spec.encoder, spec.encoding)
    if spec.index:
      return _open_ready(spec, encoder, passages, corpus_path)
    return _open_built(spec, encoder, workdir, passages)
  # One process asks; the others learn the answer when results are merged.
  if not distributed.is_primary():
    return local.EmptyRetriever()
  if spec.remote:
    return remote_lib.RemoteRetriever(spec.remote, spec.patience)
  if spec.engine == SearchEngine.ONLINE:
    return online.OnlineRetriever(spec.patience)
  return bm25.Bm25Retriever(passages)


def _ready_index(spec: RetrievalSpec) -> epath.Path:
  folder = epath.Path(spec.index)
  if not (folder / "manifest.json").exists():
    raise types.UserError(
      f"retrieval.index = {spec.index!r} does not exist: build it with "
      "stepsearch index"
    )
  return folder


def _open_ready(spec, encoder, passages, corpus_path):
  folder = _ready_index(spec)
  if corpus_path == str(folder / passages_lib.TEXTS):
    # Its own passages: nothing to compare, and there may be many.
    return local.open_retriever(folder, encoder, None, spec.cache)
  if corpus_path:
    logging.info("comparing %s with the index", corpus_path)
    passages = corpus_lib.stream_corpus(corpus_path)
  return local.open_retriever(
    folder, encoder, corpus_lib.corpus_hash(passages), spec.cache
  )


def _open_built(spec, encoder, workdir, passages):
  """The index in the work directory: whole, or a shard per process."""
  folder = workdir / "index"
  everything = passages
  if jax.process_count() > 1 and not _is_whole(folder):
    passages = distributed.share(passages)
    folder = workdir / (
      f"index_{jax.process_index()}_of_{jax.process_count()}"
    )
  if not _is_whole(folder):
    logging.info("building an index of %d passages", len(passages))
    encoder.fit(everything)  # Not on its shard, so that all scores compare.
    built = buckets.scratch(folder)
    if built != folder and built.exists():
      built.rmtree()  # Of a bucket that has been emptied since.
    index_build.build_index(built, passages, encoder, fit=False)
    if built != folder:
      buckets.publish(built, folder, last="manifest.json")
  return local.open_retriever(
    folder, encoder, corpus_lib.corpus_hash(passages), spec.cache
  )


def _is_whole(folder: epath.Path) -> bool:
  """Whether an index is there, its last file included."""
  return (folder / "manifest.json").exists()
