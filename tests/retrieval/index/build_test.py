"""Builds that are killed, take ready vectors, and choose their search."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from retrieval.index_parts import ROWS, Rows, unit

from stepsearch_jax import types
from stepsearch_jax.retrieval.index import build as index_build
from stepsearch_jax.retrieval.index import (
  corpus,
  encoder,
  index,
  passages,
  tuning,
  vectors,
)


def test_passages_are_read_back_one_by_one(tmp_path):
  count, digest = passages.write_passages(tmp_path, iter(ROWS))
  store = passages.PassageStore(tmp_path)
  assert (count, digest) == (40, corpus.corpus_hash(ROWS))
  assert list(store) == ROWS and store[7] == ROWS[7]


@pytest.mark.parametrize("dies_at, left", [(0, 0), (8, 8), (20, 16), (39, 32)])
def test_a_killed_build_embeds_only_what_is_missing(
  tmp_path, monkeypatch, dies_at, left, capsys
):
  monkeypatch.setattr(index_build, "_SHARD", 8)
  table = unit(40, 16)
  folder = tmp_path / "index"
  with pytest.raises(KeyboardInterrupt):
    index_build.build_index(folder, ROWS, Rows(table, dies_at=dies_at))
  assert not folder.exists()
  capsys.readouterr()
  second = Rows(table)
  index_build.build_index(folder, ROWS, second)
  assert second.encoded == list(range(left, 40))
  np.testing.assert_array_equal(np.load(folder / "embeddings.npy"), table)
  kept = {path.name for path in folder.iterdir()}
  assert kept == {"embeddings.npy", "manifest.json", "passages.jsonl",
                  "offsets.npy"}
  shown = capsys.readouterr().err
  assert f"{left}/40" in shown and "40/40" in shown and "passage/s" in shown


@pytest.mark.parametrize("parts", [(3, 1), (1, 2), (2, 3)])
def test_another_number_of_processes_goes_on_without_embedding_again(
  tmp_path, monkeypatch, parts
):
  monkeypatch.setattr(index_build, "_SHARD", 4)
  earlier, later = parts
  partial = epath.Path(tmp_path) / "i.partial"
  table = unit(40, 16)
  about = index_build._prepare(partial, ROWS, Rows(table), None)
  store = passages.PassageStore(partial)
  memory = index_build._open_table(partial, about)

  def embed(part, parts, dies_at=None):
    ours = Rows(table, dies_at)
    try:
      index_build._embed(partial, store, ours, memory, part, parts)
    except KeyboardInterrupt:
      pass
    return ours.encoded

  first = [i for p in range(earlier) for i in embed(p, earlier, 20 + 4 * p)]
  assert first
  second = [i for p in range(later) for i in embed(p, later)]
  assert sorted(first + second) == list(range(40))
  np.testing.assert_array_equal(memory, table)
  assert index_build._finished(partial) == set(range(10))


def test_another_corpus_starts_anew(tmp_path, monkeypatch):
  monkeypatch.setattr(index_build, "_SHARD", 8)
  table, folder = unit(40, 16), tmp_path / "index"
  with pytest.raises(KeyboardInterrupt):
    index_build.build_index(folder, ROWS, Rows(table, dies_at=20))
  second = Rows(table)
  index_build.build_index(folder, ROWS[:30], second)
  assert second.encoded == list(range(30))


@pytest.mark.slow
def test_sigkill_in_the_command_line_tool_is_survived(tmp_path):
  source = tmp_path / "corpus.jsonl"
  source.write_text("".join(
    json.dumps({"id": str(i), "title": "t", "text": f"word{i} " * 60}) + "\n"
    for i in range(30_000)
  ))
  command = [
    sys.executable, "-m", "stepsearch_jax.tools.build_index",
    f"--corpus={source}", "--encoder=hashed_tfidf:64",
    f"--output={tmp_path}/index",
  ]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  partial = tmp_path / "index.partial"
  process = subprocess.Popen(command, env=environment,
                             stderr=subprocess.DEVNULL)
  while not list(partial.glob("done_*")) and process.poll() is None:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (tmp_path / "index").exists()
  done = subprocess.run(command, env=environment, capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "going on with" in done.stderr
  opened = index.open_index(tmp_path / "index", encoder.HashedTfidfEncoder(64))
  assert len(opened.passages) == 30_000


@pytest.mark.slow
def test_two_processes_are_killed_go_on_and_embed_one_index(tmp_path):
  source = tmp_path / "corpus.jsonl"
  source.write_text("".join(
    json.dumps({"id": str(i), "title": "t", "text": f"word{i} river " * 40})
    + "\n" for i in range(24_000)  # Six shards for two processes.
  ))
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}

  def start(folder, *joining):
    return subprocess.Popen(
      [sys.executable, "-m", "stepsearch_jax.tools.build_index",
       f"--corpus={source}", "--encoder=hashed_tfidf:64",
       f"--output={folder}", *joining],
      env=environment, stderr=subprocess.PIPE, text=True,
      stdout=subprocess.DEVNULL,
    )

  def start_both():
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    return [
      start(tmp_path / "two", f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2", f"--process_id={i}")
      for i in range(2)
    ]

  handles = start_both()
  while not list((tmp_path / "two.partial").glob("done_*")) and all(
    handle.poll() is None for handle in handles
  ):
    time.sleep(0.01)
  for handle in handles:
    handle.send_signal(signal.SIGKILL)
    handle.communicate()
  assert not (tmp_path / "two").exists()
  for handle in [*start_both(), start(tmp_path / "one")]:
    _, errors = handle.communicate(timeout=300)
    assert handle.returncode == 0, errors[-2000:]
  two, one = (np.load(tmp_path / n / "embeddings.npy") for n in ("two", "one"))
  np.testing.assert_array_equal(two, one)
  manifests = [
    json.loads((tmp_path / n / "manifest.json").read_text())["corpus"]
    for n in ("two", "one")
  ]
  assert manifests[0] == manifests[1]


class Trap:
  """Unpickling it would create a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), "w")


def test_no_file_of_an_index_is_unpickled(tmp_path):
  def spring(path):
    np.save(path, np.array([Trap(tmp_path / "sprung")], dtype=object),
            allow_pickle=True)

  spring(tmp_path / "v.npy")
  with pytest.raises(ValueError, match="object|dtype"):
    vectors.open_vectors(str(tmp_path / "v.npy"))
  folder = tmp_path / "index"
  index_build.build_index(folder, ROWS, encoder.HashedTfidfEncoder(64))
  names = [path.name for path in folder.glob("*.npy")]
  assert sorted(names) == ["embeddings.npy", "idf.npy", "offsets.npy"]
  for name in names:
    whole = (folder / name).read_bytes()
    spring(folder / name)
    with pytest.raises(ValueError, match="allow_pickle|Python objects"):
      index.open_index(folder, encoder.HashedTfidfEncoder(64))
    (folder / name).write_bytes(whole)
  assert not (tmp_path / "sprung").exists()
  index.open_index(folder, encoder.HashedTfidfEncoder(64))


def test_a_pickle_among_the_search_assets_is_refused(tmp_path, monkeypatch):
  pytest.importorskip("scann")
  monkeypatch.setattr(tuning, "_EXACT_ROWS", 1)
  monkeypatch.setattr(tuning, "kinds", lambda count: ("hashed",))
  table = unit(400, 16)
  rows = [types.Passage(str(i), f"T{i}", "x") for i in range(400)]
  index_build.build_index(tmp_path / "i", rows, Rows(table))
  assert len(index.open_index(tmp_path / "i", Rows(table)).passages) == 400
  (tmp_path / "i/scann/scann_docids.pkl").write_bytes(b"cos\nsystem\n.")
  with pytest.raises(ValueError, match="holds a pickle, which is never"):
    index.open_index(tmp_path / "i", Rows(table))


@pytest.mark.parametrize("kind, soar", [
  ("exact", False), ("hashed", False), ("tree", False), ("tree", True)
])
@pytest.mark.parametrize("dim", [32, 768])
def test_weight_is_what_the_assets_take_on_disk(tmp_path, kind, soar, dim):
  scann = pytest.importorskip("scann")
  searcher = tuning.build(scann, unit(2000, dim), kind, 10, soar)
  searcher.serialize(str(tmp_path), relative_path=True)
  stored = sum(path.stat().st_size for path in tmp_path.iterdir())
  assert tuning.weight(kind, 2000, dim, soar) == pytest.approx(stored, rel=0.03)


def test_exact_rows_in_chunks_equal_one_product():
  table, queries = unit(500, 8), unit(20, 8, seed=1)
  want = np.argsort(-(queries @ table.T), axis=1)[:, :3]
  np.testing.assert_array_equal(
    tuning.exact_rows(table, queries, 3, chunk=64), want
  )


def test_kind_follows_the_documented_rule():
  assert tuning.kinds(9_999) == ("exact",)
  assert tuning.kinds(10_000) == ("exact", "hashed", "tree")
  assert tuning.kinds(200_000) == ("tree",)


def test_choice_is_the_fastest_that_reaches_the_recall():
  def row(recall, rate):
    return tuning.Measured(tuning.Setting("exact"), recall, rate)

  rows = [row(1.0, 10), row(0.985, 30), row(0.97, 99)]
  assert max(rows, key=lambda m: tuning._rank(m, 0.98)) == rows[1]
  assert max(rows, key=lambda m: tuning._rank(m, 0.999)) == rows[0]
  assert max(rows[1:], key=lambda m: tuning._rank(m, 0.999)) == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("soar", [False, True])
def test_tuned_index_reaches_its_recall_and_says_how(
  tmp_path, soar, monkeypatch
):
  if soar:
    monkeypatch.setattr(tuning, "kinds", lambda count: ("tree",))
  pytest.importorskip("scann")
  rng = np.random.default_rng(0)
  table = unit(400, 32)[rng.integers(0, 400, 12_000)]
  table = table + 0.1 * rng.normal(size=table.shape).astype(np.float32)
  table /= np.linalg.norm(table, axis=1, keepdims=True)
  rows = [types.Passage(str(i), f"T{i}", "x") for i in range(12_000)]
  index_build.build_index(
    tmp_path / "i", rows, Rows(table),
    index_build.IndexSpec(recall=0.95, soar=soar),
  )
  manifest = json.loads((tmp_path / "i/manifest.json").read_text())
  assert manifest["recall"] >= 0.95 and len(manifest["tuning"]) > 5
  assert manifest["soar"] == soar
  assert soar == (tmp_path / "i/scann/hashed_dataset_soar.npy").exists()
  for row in manifest["tuning"]:
    assert set(row) == {"setting", "recall", "queries_per_second", "bytes"}
    assert row["queries_per_second"] > 0 and row["bytes"] >= table.nbytes
  opened = index.open_index(tmp_path / "i", Rows(table))
  queries = tuning.sample_queries(table, seed=5)
  truth = tuning.exact_rows(table, queries, 3)
  found, _ = opened.search(queries, 3)
  hits = (found[:, :, None] == truth[:, None, :]).any(2).mean()
  assert hits > 0.93
