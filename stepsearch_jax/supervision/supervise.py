"""Step supervision as a whole: from questions to a file and its report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from absl import logging
from etils import epath

from stepsearch_jax import buckets, files, types
from stepsearch_jax.retrieval import bm25, remote
from stepsearch_jax.retrieval import local as retriever
from stepsearch_jax.retrieval.index import build as index_build
from stepsearch_jax.retrieval.index import corpus as corpus_lib
from stepsearch_jax.retrieval.index import encoder
from stepsearch_jax.supervision import hops
from stepsearch_jax.supervision import pipeline as supervision
from stepsearch_jax.supervision import writers as writers_lib


def is_url(name: str) -> bool:
  """Returns whether a writer or retriever is a server."""
  return name.startswith(("http://", "https://"))


def open_writer(name: str, cache: epath.Path) -> supervision.CachedWriter:
  """Returns a cached writer: "rules", URL#MODEL, or a local model."""
  if name == "rules":
    writer = supervision.RuleWriter()
  elif is_url(name):
    url, separator, model = name.partition("#")
    if not separator:
      raise types.UserError(f"--writers: {name!r} must be URL#MODEL")
    writer = writers_lib.EndpointWriter(url, model)
  else:
    writer = writers_lib.LocalWriter(name)
  return supervision.CachedWriter(writer, cache / "writers")


def open_retrievers(
  names: Sequence[str], passages: Sequence[types.Passage], cache: epath.Path
) -> dict[str, types.Retriever]:
  """Returns retrievers by name: "bm25", a /retrieve URL, or an encoder.

  Indexes stay in `cache`.
  """
  digest = corpus_lib.corpus_hash(passages)
  opened: dict[str, types.Retriever] = {}
  for name in names:
    if name == "bm25":
      opened[name] = bm25.Bm25Retriever(passages)
      continue
    if is_url(name):
      opened[name] = remote.RemoteRetriever(name, remote.PATIENCE)
      continue
    embed = encoder.load_encoder(name)
    safe = "".join(c if c.isalnum() else "_" for c in name)
    folder = cache / f"index_{safe}_{digest}"
    if not (folder / "manifest.json").exists():
      built = buckets.new_scratch(folder)
      index_build.build_index(built, passages, embed)
      if built != folder:
        buckets.publish(built, folder, last="manifest.json")
    opened[name] = retriever.open_retriever(folder, embed, digest)
  return opened


@dataclasses.dataclass(frozen=True)
class Supervision:
  """How search keys are written and filtered.

  Attributes:
    writers: names, see `open_writer`.
    retrievers: names, see `open_retrievers`.
    queries: per sub-question and writer.
    topk: passages per search.
    cache: folder of what was asked already.
  """

  writers: list[str]
  retrievers: list[str]
  queries: int
  topk: int
  cache: epath.Path


def supervise(
  questions: list[types.Question], passages: list[types.Passage],
  how: Supervision, output: epath.Path,
) -> str:
  """Writes questions with filtered search keys; returns the report.

  Questions without supporting passages get pseudo-labels (passages that hold a
  sub-answer) and are flagged; those without a decomposition get one from the
  first language model among the writers, or from their supporting passages.
  """
  writers = [open_writer(name, how.cache) for name in how.writers]
  models = [w for w in writers if w.name != "rules"]
  retrievers = open_retrievers(how.retrievers, passages, how.cache)
  questions = hops.decompose(questions, models[0] if models else None)
  questions = supervision.pseudo_label(questions, retrievers, how.topk)
  ready = [q for q in questions if q.decomposition and q.support]
  if len(ready) < len(questions):
    logging.warning("%d questions without decomposition or support left out",
                    len(questions) - len(ready))
  if not ready:
    raise types.UserError(
      "no question has supporting passages, or a decomposition to find them "
      "by: --writers needs a language model to write one, --corpus passages "
      "with the sub-answers"
    )
  written = supervision.write_queries(ready, writers, how.queries)
  kept, report = supervision.filter_queries(
    ready, written, retrievers, how.topk
  )
  rows = [supervision.released_row(q) for q in kept]
  supervision.write_rows(output, rows)
  files.write_text(
    output.with_name(output.name + ".report.json"),
    json.dumps(report, indent=2) + "\n",
  )
  return supervision.render_report(report, list(retrievers))
