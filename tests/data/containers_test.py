"""Files that hold questions: every container, every damage to one."""

import gzip
import io
import json

import pytest

from stepsearch_jax import files
from stepsearch_jax.data import questions

GOOD = {"id": "a", "question": "q?", "golden_answers": ["A"]}


def test_every_container_gives_the_same_questions(tmp_path):
  import pyarrow
  from pyarrow import parquet

  line, table = json.dumps(GOOD), io.BytesIO()
  parquet.write_table(pyarrow.Table.from_pylist([GOOD]), table)
  binary = io.BytesIO()
  parquet.write_table(pyarrow.Table.from_pylist(
    [{k: v.encode() if isinstance(v, str) else v for k, v in GOOD.items()}]
  ), binary)
  for name, data in {
    "a.jsonl": line.encode(), "b.json": f" \n\t[{line}\n]\n".encode(),
    "c.json": json.dumps(GOOD, indent=2).encode(), "d.json": line.encode(),
    "e.json": f"\n{line}\n\n".encode(), "f.jsonl": b"\xef\xbb\xbf\n" +
    line.encode(), "g.json": b"\xef\xbb\xbf" + f"[{line}]".encode(),
    "h.jsonl": json.dumps([GOOD], indent=1).encode(),
    "i.jsonl": line.encode() + b"\r\n\r\n", "j.parquet": table.getvalue(),
    "k.parquet": binary.getvalue(),
  }.items():
    (tmp_path / name).write_bytes(data)
    (tmp_path / (name + ".gz")).write_bytes(gzip.compress(data))
    for path in (tmp_path / name, tmp_path / (name + ".gz")):
      assert list(dict(files.read_rows(path)).values()) == [GOOD], path
      assert len(questions.load_questions(str(path))) == 1


def test_every_damage_is_one_line_that_names_the_file(tmp_path):
  import pyarrow
  from pyarrow import parquet

  many = "".join(
    json.dumps({**GOOD, "id": i * 7919 % 1000}) + "\n" for i in range(500)
  ).encode()
  table = io.BytesIO()
  parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 50), table)
  packed, table = gzip.compress(many), table.getvalue()
  flipped = bytearray(packed)
  flipped[len(packed) // 2] ^= 0xFF
  for name, data in {
    "cut.jsonl.gz": packed[: len(packed) // 2], "bits.jsonl.gz": bytes(flipped),
    "tail.jsonl.gz": packed + b"rubbish", "head.jsonl.gz": b"xx" + packed[2:],
    "plain.jsonl.gz": many, "empty.jsonl.gz": b"", "packed.jsonl": packed,
    "latin.jsonl": '{"question": "é"}'.encode("latin-1"),
    "latin.json": '[{"question": "é"}]'.encode("latin-1"),
    "wide.jsonl": json.dumps(GOOD).encode("utf-16"),
    "deep.jsonl": b"[" * 100_000, "deep.json": b"[" * 100_000,
    "deeper.jsonl": b'{"a": ' * 100_000,
    "digits.jsonl": b'{"question": ' + b"9" * 5000 + b"}",
    "cut.json": b'[{"question": "q"}, {"ques', "half.jsonl": b'{"question": "',
    "list.json": b"[1, 2]", "text.json": b'"text"', "empty.json": b"",
    "blank.jsonl": b"\n \n", "cut.parquet": table[: len(table) // 2],
    "hole.parquet": table[:30] + b"\0" * 40 + table[70:],
    "none.parquet": b"", "x.csv": b"a,b", "x.jsonl.zst": b"(\xb5/\xfd",
  }.items():
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(files.DataError, match=name.replace(".", r"\.")) as at:
      questions.load_questions(str(path))
    assert "\n" not in str(at.value) and len(str(at.value)) < 400, name
