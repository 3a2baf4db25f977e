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


@pytest.mark.parametrize("content, said", [
  (b"", r"o\.json:1: malformed JSON"), (b'{\n"a"', r"o\.json:2: malformed"),
  (b"[]", r"o\.json: expected a JSON object, got list"),
  (b'{"a": "\xe9"}', r"o\.json: cannot be read as text, expected UTF-8"),
  (b"[" * 100_000, r"o\.json: malformed JSON"),
  (b'{"n": 1}', r"o\.json: field a: expected dict, got no such field"),
  (b'{"a": null, "n": 1}', r"o\.json: field a: expected dict, got None"),
  (b'{"a": {}, "n": "1"}', r"o\.json: field n: expected float, got '1'"),
])
def test_an_object_that_cannot_be_used_names_file_and_field(
  tmp_path, content, said
):
  path = tmp_path / "o.json"
  path.write_bytes(content)
  with pytest.raises(files.DataError, match=said) as error:
    files.read_object(path, {"a": dict, "n": float})
  assert "\n" not in str(error.value)


def test_an_object_may_begin_with_a_mark_and_hold_more(tmp_path):
  path = tmp_path / "o.json"
  path.write_bytes(b'\xef\xbb\xbf{"a": {}, "n": 1, "more": [NaN]}')
  row = files.read_object(path, {"a": dict, "n": float})
  assert (row["a"], row["n"], len(row["more"])) == ({}, 1, 1)


def arrow_columns():
  """Columns that Python or JSON has no values for, and what is read."""
  import pyarrow as pa

  second = "1970-01-01 00:00:01.000000001"
  moment, count = pa.timestamp("ns"), 1_000_000_001
  return {
    "moment": (pa.array([count, None], moment), [second, None]),
    "day": (pa.array([18262, 2**31 - 1], pa.date32()),
            ["2020-01-01", "<value out of range: 2147483647>"]),
    "clock": (pa.array([count, 0], pa.time64("ns")),
              ["00:00:01.000000001", "00:00:00.000000000"]),
    "span": (pa.array([1, 10**18], pa.duration("ns")), ["1", str(10**18)]),
    "zoned": (pa.array([7, 0], pa.timestamp("us", "Mars/Base")), [7, 0]),
    "list": (pa.array([[count], None], pa.list_(moment)), [[second], None]),
    "large": (pa.array([[count], []], pa.large_list(moment)), [[second], []]),
    "inner": (pa.array([{"t": count, "n": 3}, None], pa.struct(
      [("t", moment), ("n", pa.int64())])), [{"t": second, "n": 3}, None]),
    "image": (pa.array([b"\xff\xd8", b"text"]), [b"\xff\xd8", "text"]),
    "picture": (pa.array([{"bytes": b"\xff", "path": "x"}, None]),
                [{"bytes": b"\xff", "path": "x"}, None]),
  }


def test_columns_that_nobody_reads_refuse_no_parquet_file(tmp_path):
  import pyarrow
  from pyarrow import parquet

  columns = {name: array for name, (array, _) in arrow_columns().items()}
  parquet.write_table(
    pyarrow.table({"question": ["q", "r"], **columns}), tmp_path / "t.parquet"
  )
  rows = dict(files.read_rows(tmp_path / "t.parquet"))
  assert list(rows) == [f"{tmp_path}/t.parquet:{n}" for n in (1, 2)]
  assert [row["question"] for row in rows.values()] == ["q", "r"]
  for name, (_, expected) in arrow_columns().items():
    assert [row[name] for row in rows.values()] == expected, name


def test_a_column_that_cannot_be_read_is_named(tmp_path):
  import pyarrow as pa
  from pyarrow import parquet

  column = pa.array([[("k", 1)]], pa.map_(pa.string(), pa.timestamp("ns")))
  parquet.write_table(
    pa.table({"question": ["q"], "seen": column}), tmp_path / "t.parquet"
  )
  with pytest.raises(files.DataError, match=r"t\.parquet: column seen behind"):
    list(files.read_rows(tmp_path / "t.parquet"))
