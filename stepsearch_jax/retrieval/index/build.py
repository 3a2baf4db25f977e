"""Builds an index folder: passages, embeddings, search.

Works on corpora larger than memory, goes on after a kill at the last finished
shard, and splits the embedding over the processes of a run.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.parallel import distributed
from stepsearch_jax.retrieval.index import encoder as encoder_lib
from stepsearch_jax.retrieval.index import index as index_lib
from stepsearch_jax.retrieval.index import passages as passages_lib
from stepsearch_jax.retrieval.index import tuning
from stepsearch_jax.retrieval.index import vectors as vectors_lib

_SHARD = 4096  # Passages between two notes of progress.


@dataclasses.dataclass(frozen=True)
class IndexSpec:
  """How the search is chosen.

  Attributes:
    recall: share of the exact neighbors that the search must find.
    k: neighbors that recall counts.
    topk: most neighbors that will ever be asked for.
    soar: let tree partitions spill (more memory, better recall).
  """

  recall: float = 0.98
  k: int = 3
  topk: int = 10
  soar: bool = False

  def __post_init__(self):
    if not 0 < self.recall <= 1 or not 1 <= self.k <= self.topk:
      raise types.UserError(f"need 0 < recall <= 1 and 1 <= k <= topk: {self}")


def build_index(
  folder: epath.PathLike,
  passages: Iterable[types.Passage],
  encoder: encoder_lib.Encoder,
  spec: IndexSpec = IndexSpec(),
  fit: bool = True,
  vectors: vectors_lib.ReadyVectors | None = None,
  together: bool = False,
) -> None:
  """Embeds passages and writes an index folder.

  What a killed build has embedded is kept in `<folder>.partial` and used if the
  same passages and encoder are given again.

  Args:
    folder: must not exist.
    passages: at least one; read once, in order.
    encoder: how to embed them.
    spec: how to search them.
    fit: whether the encoder learns its statistics from these passages; False
      if they are one shard of what it has been fitted to.
    vectors: ready embeddings in the order of the passages, instead of
      embedding them here.
    together: all processes of the run call this with the same arguments and
      split the embedding; else this process builds an index of its own.

  Raises:
    UserError: the folder exists, there are no passages, or the vectors do not
      belong to them.
  """
  folder = epath.Path(folder)
  if folder.exists():
    raise types.UserError(f"index folder {folder} exists already")
  if vectors is not None:
    vectors.check_sample()
  partial = folder.with_name(folder.name + ".partial")
  part = jax.process_index() if together else 0
  parts = jax.process_count() if together else 1
  in_turn = distributed.in_turn if together else lambda work: work()
  about = in_turn(
    lambda: _prepare(partial, passages, encoder, vectors)
    if part == 0
    else json.loads((partial / "about.json").read_text())
  )
  store = passages_lib.PassageStore(partial)
  if fit:
    encoder.fit(store)
  table = _open_table(partial, about)
  if vectors is None:
    _embed(partial, store, encoder, table, part, parts)
  elif part == 0:
    _copy(vectors, table)
  table.flush()
  del table  # Its pages would count twice while the search is built.
  if together:
    distributed.wait("embedded")
  if part == 0:
    _finish(folder, partial, about, encoder, spec)
  if together:
    distributed.wait("built")


def _prepare(partial, passages, encoder, vectors) -> dict:
  """Writes the passages, or recognizes those of an earlier attempt."""
  fresh = partial.with_name(partial.name + ".passages")
  if fresh.exists():
    fresh.rmtree()
  fresh.mkdir(parents=True)
  count, digest = passages_lib.write_passages(fresh, passages)
  if not count:
    fresh.rmtree()
    raise types.UserError("an index needs at least one passage")
  if vectors is not None and vectors.rows.shape != (count, encoder.dim):
    fresh.rmtree()
    raise types.UserError(
      f"{vectors.path}: the vectors are {list(vectors.rows.shape)}, {count} "
      f"passages and encoder {encoder.settings['name']} need "
      f"[{count}, {encoder.dim}]"
    )
  about = {
    "format": index_lib.FORMAT, "encoder": encoder.settings, "corpus": digest,
    "count": count, "dim": encoder.dim,
  }
  path = partial / "about.json"
  if path.exists() and json.loads(path.read_text()) == about:
    logging.info("going on with %s", partial)
    fresh.rmtree()
    return about
  if partial.exists():
    partial.rmtree()
  _reserve(fresh / "embeddings.npy", (count, encoder.dim))
  (fresh / "about.json").write_text(json.dumps(about))
  fresh.rename(partial)
  return about


def _reserve(path: epath.Path, shape: Sequence[int]) -> None:
  """Makes a file of float32 zeros that has all of its room on disk.

  Without it a disk that fills up ends the program by a bus error, hours later.
  """
  np.lib.format.open_memmap(str(path), "w+", np.float32, tuple(shape)).flush()
  if not hasattr(os, "posix_fallocate"):
    return
  size = path.stat().length
  with open(os.fspath(path), "r+b") as file:
    try:
      os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
      raise types.UserError(
        f"{path}: no room for {size / 1e9:.3g} GB of vectors: {error.strerror}"
      ) from error


def _open_table(partial, about):
  table = np.load(
    str(partial / "embeddings.npy"), mmap_mode="r+", allow_pickle=False
  )
  assert table.shape == (about["count"], about["dim"])
  return table


def _finished(partial) -> set[int]:
  """Shards that earlier attempts embedded, with however many processes."""
  shards = set()
  for note in partial.glob("done_*_of_*.json"):
    _, part, _, parts = note.stem.split("_")
    count = json.loads(note.read_text())
    shards.update(int(part) + i * int(parts) for i in range(count))
  return shards


def _embed(partial, store, encoder, table, part, parts) -> None:
  """Embeds every `parts`-th shard from `part` on, noting each finished one."""
  done = _finished(partial)
  note = partial / f"done_{part}_of_{parts}.json"
  mine = range(part, -(-len(store) // _SHARD), parts)

  def span(shard):
    return shard * _SHARD, min((shard + 1) * _SHARD, len(store))

  sizes = {shard: span(shard)[1] - span(shard)[0] for shard in mine}
  bar = tqdm.tqdm(
    total=sum(sizes.values()), unit="passage", desc="embed",
    # What was done before must not count as speed.
    initial=sum(size for shard, size in sizes.items() if shard in done),
  )
  for number, shard in enumerate(mine, 1):
    if shard not in done:
      start, stop = span(shard)
      texts = [encoder_lib.passage_text(store[i]) for i in range(start, stop)]
      table[start:stop] = encoder.encode(texts, "passage")
      table.flush()
      bar.update(stop - start)
    files.write_text(note, json.dumps(number))
  bar.close()


def _copy(vectors, table) -> None:
  """Copies ready vectors as unit vectors."""
  for start in tqdm.trange(0, len(table), _SHARD, desc="copy", unit="shard"):
    stop = min(start + _SHARD, len(table))
    table[start:stop] = vectors.unit(np.arange(start, stop))
    vectors_lib.release(vectors.rows)


def _finish(folder, partial, about, encoder, spec) -> None:
  """Chooses and stores the search, then names the folder."""
  encoder.save(partial)
  vectors = np.load(
    str(partial / "embeddings.npy"), mmap_mode="r", allow_pickle=False
  )
  scann = index_lib.load_scann()
  choice, rows = tuning.Measured(
    tuning.Setting("exact"), 1.0, 0.0, vectors.nbytes
  ), []
  if scann is not None and tuning.kinds(len(vectors)) != ("exact",):
    searcher, choice, rows = tuning.tune(
      scann, vectors, min(spec.k, len(vectors)), spec.recall, spec.topk,
      spec.soar,
    )
    vectors_lib.release(vectors)
    if choice.setting.kind != "exact":
      assets = partial / "scann"
      if assets.exists():
        assets.rmtree()
      assets.mkdir()
      searcher.serialize(str(assets), relative_path=True)
    if choice.recall < spec.recall:
      logging.warning("recall@%d is %.3f, short of %.3f", spec.k,
                      choice.recall, spec.recall)
  manifest = {
    **about,
    "search": dataclasses.asdict(choice.setting),
    "recall": choice.recall,
    "recall_k": spec.k,
    "soar": spec.soar,
    "bytes": sum(f.stat().length for f in (partial / "scann").iterdir())
    if (partial / "scann").exists() else vectors.nbytes,
    "tuning": [dataclasses.asdict(row) for row in rows],
  }
  (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
  for note in partial.glob("done_*.json"):
    note.unlink()
  (partial / "about.json").unlink()
  partial.rename(folder)
