"""Files that are whole or not there, and logs that go on after a kill."""

import json
import threading

import pytest
from etils import epath

from stepsearch_jax import files


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path = epath.Path(tmp_path) / "new" / "a.txt"
  files.write_text(path, "é\n")
  assert path.read_bytes() == "é\n".encode()
  with pytest.raises(RuntimeError), files.writing(path) as file:
    file.write(b"half")
    raise RuntimeError
  assert path.read_bytes() == "é\n".encode()
  assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("left, rows", [
  (b"", []), (b'{"a": 1}\n', [1]), (b'{"a": 1}\n{"a": ', [1]),
  (b'{"a": 1}\n{"a": 2}', [1, 2]), (b'{"a"', []), (b'{"a": 1}\n7', [1]),
  (b'{"a": 1}\n{"a": "\xc3', [1]), (b'\n{"a": 1}\n\n', [1]),
])
def test_a_log_goes_on_behind_its_last_whole_row(tmp_path, left, rows):
  path = tmp_path / "log.jsonl"
  path.write_bytes(left)
  log = files.RowLog(path)
  assert [row["a"] for row in log.rows()] == rows
  log.append({"a": "é"})
  assert [row["a"] for row in files.RowLog(path).rows()] == [*rows, "é"]
  assert path.read_bytes().endswith('{"a": "é"}\n'.encode())


def test_rows_are_on_disk_before_the_log_is_closed(tmp_path):
  log = files.RowLog(tmp_path / "deep" / "log.jsonl")
  log.append({"a": 1})
  assert (tmp_path / "deep/log.jsonl").read_text() == '{"a": 1}\n'


def test_damage_in_the_middle_is_named_and_not_repaired(tmp_path):
  path = tmp_path / "log.jsonl"
  path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
  with pytest.raises(files.DataError, match=r"log.jsonl:2: malformed"):
    files.RowLog(path).rows()


def test_unwanted_rows_are_dropped_and_appending_goes_on(tmp_path):
  log = files.RowLog(tmp_path / "log.jsonl")
  for step in range(5):
    log.append({"step": step})
  log.keep(lambda row: row["step"] < 3)
  log.append({"step": 7})
  assert [row["step"] for row in log.rows()] == [0, 1, 2, 7]


def test_threads_do_not_mix_their_lines(tmp_path):
  log = files.RowLog(tmp_path / "log.jsonl")

  def write(name):
    for number in range(50):
      log.append({"name": name, "number": number, "text": "x" * 500})

  threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  found = {(row["name"], row["number"]) for row in log.rows()}
  assert found == {(i, j) for i in range(8) for j in range(50)}


def test_a_bucket_log_is_written_anew_and_not_appended(tmp_path, monkeypatch):
  written = {}

  class Object:
    """An object of a bucket: no appending, and every write is counted."""

    name = "log.jsonl"

    def __str__(self):
      return "gs://bucket/log.jsonl"

    __fspath__ = __str__

    def exists(self):
      return "data" in written

    def read_bytes(self):
      return written["data"].encode()

    def open(self, mode):
      assert mode == "rb"
      path = tmp_path / "copy"
      path.write_text(written["data"])
      return path.open("rb")

  def write_text(path, text):
    written["data"] = text
    written["times"] = written.get("times", 0) + 1

  monkeypatch.setattr(files, "write_text", write_text)
  monkeypatch.setattr(files.epath, "Path", lambda path: path)
  log = files.RowLog(Object())
  for step in range(100):
    log.append({"step": step})
  assert written["times"] <= 2
  log.close()
  assert len(written["data"].splitlines()) == 100
  again = files.RowLog(Object())
  again.append({"step": 100})
  again.close()
  assert [json.loads(line)["step"] for line in
          written["data"].splitlines()] == list(range(101))
