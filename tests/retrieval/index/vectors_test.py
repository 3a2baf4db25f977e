"""Vectors that somebody else computed: formats, norms, refusals."""

import struct

import numpy as np
import pytest
from retrieval.index_parts import ROWS, Rows, unit

from stepsearch_jax import types
from stepsearch_jax.retrieval.index import build as index_build
from stepsearch_jax.retrieval.index import vectors


def ready(table, normalize=False):
  return vectors.ReadyVectors("v.npy", table, normalize)


def test_ready_vectors_are_not_embedded_again(tmp_path):
  table = unit(40, 16)
  ours = Rows(table, dies_at=0)  # Encoding would raise.
  index_build.build_index(
    tmp_path / "i", ROWS, ours, vectors=ready(table.astype(np.float16))
  )
  np.testing.assert_allclose(
    np.load(tmp_path / "i/embeddings.npy"), table, atol=1e-3
  )
  with pytest.raises(ValueError, match=r"\[39, 16\].*need \[40, 16\]"):
    index_build.build_index(
      tmp_path / "j", ROWS, ours, vectors=ready(table[:39])
    )


def test_vectors_of_other_norms_are_refused_or_normalized_if_asked(tmp_path):
  table = unit(40, 16)
  longer = table * np.where(np.arange(40) == 7, 3.0, 1.0)[:, None]
  ours = Rows(table, dies_at=0)
  message = r"v.npy: expected unit vectors, row 7 has norm 3 \(1 of 40 rows"
  with pytest.raises(types.UserError, match=message):
    index_build.build_index(
      tmp_path / "i", ROWS, ours, vectors=ready(longer)
    )
  assert not list(tmp_path.iterdir())  # Said before anything was written.
  index_build.build_index(
    tmp_path / "i", ROWS, ours, vectors=ready(longer, normalize=True)
  )
  np.testing.assert_allclose(
    np.load(tmp_path / "i/embeddings.npy"), table, atol=1e-6
  )
  for bad in (np.nan, np.inf):
    longer[39, 0] = bad
    with pytest.raises(types.UserError, match="row 39 holds NaN or infinity"):
      index_build.build_index(
        tmp_path / "j", ROWS, ours, vectors=ready(longer, normalize=True)
      )


def test_a_row_that_the_sample_misses_is_refused_when_copied(monkeypatch):
  monkeypatch.setattr(vectors, "_SAMPLE", 3)
  table = unit(40, 16)
  table[5] *= 2
  given = ready(table)
  given.check_sample()  # Looks at rows 0, 19 and 39.
  with pytest.raises(types.UserError, match="row 5 has norm 2"):
    given.unit(np.arange(0, 40))


def test_released_pages_read_the_same_again(tmp_path):
  np.save(tmp_path / "v.npy", unit(1000, 16))
  table = vectors.open_vectors(str(tmp_path / "v.npy"))
  before = table.sum()
  with vectors.releasing(table, every=0.001):
    assert table.sum() == before
  assert table.sum() == before


@pytest.mark.parametrize("fourcc", [b"IxFI", b"IxF2"])
def test_faiss_flat_files_are_read_without_faiss(tmp_path, fourcc):
  table = unit(5, 8)
  metric = 0 if fourcc == b"IxFI" else 1
  path = tmp_path / "flat.index"
  path.write_bytes(
    fourcc + struct.pack("<iqqqbi", 8, 5, 1 << 20, 1 << 20, 1, metric)
    + struct.pack("<Q", 40) + table.tobytes()
  )
  np.testing.assert_array_equal(vectors.open_vectors(str(path)), table)
  faiss = pytest.importorskip("faiss")
  flat = faiss.IndexFlatIP(8) if metric == 0 else faiss.IndexFlatL2(8)
  flat.add(table)
  faiss.write_index(flat, str(tmp_path / "theirs.index"))
  np.testing.assert_array_equal(
    vectors.open_vectors(str(tmp_path / "theirs.index")), table
  )


@pytest.mark.parametrize("content, message", [
  (b"hello", "begins with b'hell'"),
  (b"IxFI" + struct.pack("<iqqqbi", 8, 5, 0, 0, 1, 0) + struct.pack("<Q", 9),
   "promises 5 x 8 floats"),
  (b"IxFI" + struct.pack("<iqqqbi", -8, -5, 0, 0, 1, 0)
   + struct.pack("<Q", 40) + bytes(160), "promises -5 x -8 floats"),
  (b"IxFI" + struct.pack("<iqqqbi", 8, 5, 0, 0, 1, 0) + struct.pack("<Q", 40)
   + bytes(100), "145 bytes cannot hold 5 x 8 floats"),
  (b"IxFI\x08", "the header of a FAISS index ends early"),
  (b"IxFI" + struct.pack("<iqqqbi", 8, 5, 0, 0, 1, 7) + struct.pack("<Q", 40),
   "metric 7 is not supported"),
])
def test_other_vector_files_are_refused(tmp_path, content, message):
  path = tmp_path / "x.index"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    vectors.open_vectors(str(path))


def test_bare_memmaps_are_read_by_the_dimensions_of_the_encoder(tmp_path):
  table = unit(6, 8)
  path = str(tmp_path / "emb_e5.memmap")
  theirs = np.memmap(path, np.float32, "w+", shape=table.shape)
  theirs[:] = table
  theirs.flush()
  np.testing.assert_array_equal(vectors.open_vectors(path, 8), table)
  with pytest.raises(ValueError, match="192 bytes are no float32 rows of 7"):
    vectors.open_vectors(path, 7)


def test_a_damaged_npy_file_is_named_whatever_numpy_raises(tmp_path):
  path = tmp_path / "v.npy"
  np.save(path, unit(5, 8))
  whole = path.read_bytes()
  assert whole[8:10] == b"\x76\x00"  # The length of the header.
  for damaged in (
    whole[:6], whole[:20], whole[:-9], whole[:8] + b"\x20" + whole[9:],
    whole[:10] + b"{'descr': '<f4', 'a', }" + whole[33:],
    whole.replace(b"'<f4'", b"'|O4'"),
  ):
    path.write_bytes(damaged)
    with pytest.raises(types.UserError, match=r"v\.npy: cannot be read as an"):
      vectors.open_vectors(str(path))
  path.write_bytes(whole)
  np.testing.assert_array_equal(vectors.read_npy(path), unit(5, 8))


@pytest.mark.parametrize("table, said", [
  (np.zeros((0, 8), np.float32), r"at least one row, got float32 \[0, 8\]"),
  (np.zeros((5, 0), np.float32), r"at least one row, got float32 \[5, 0\]"),
  (np.zeros(5, np.float32), r"\[n, d\], at least one row, got float32 \[5\]"),
  (np.zeros((5, 8)), r"expected float32 or float16 .* got float64 \[5, 8\]"),
])
def test_arrays_that_hold_no_vectors_are_refused(tmp_path, table, said):
  np.save(tmp_path / "v.npy", table)
  with pytest.raises(types.UserError, match=said):
    vectors.open_vectors(str(tmp_path / "v.npy"))
