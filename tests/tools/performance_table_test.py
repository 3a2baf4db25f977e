"""The README's table says what the JSON says, and nothing else changes."""

import pytest

from stepsearch_jax.tools import performance_table
from stepsearch_jax.tools.bench import duel


def test_results_become_rows_between_the_markers():
  amounts = iter([9.0, 2.0, 4.0, 3.0])  # The first of each warms up.
  ours = lambda: duel.Measured("x", next(amounts))  # noqa: E731
  theirs = lambda: duel.Measured("x", 6.0)  # noqa: E731
  compared = duel.Duel(
    "decode", "8 rows", "peer", ours, theirs, lambda a, b: None, goal="1.3"
  ).measure(3)
  assert compared["ours"] == 3.0 and compared["ratio"] == 2.0
  alone = duel.Reading("waits", "16 slots", lambda: 0.25).measure(3)
  report = {"versions": {"commit": "0123456789"},
            "results": [compared, alone]}
  table = performance_table.table([report])
  assert table.splitlines()[2:] == [
    "| decode (8 rows) | peer | 3 s | 6 s | **2.00** | 1.3 | 0123456 |",
    "| waits (16 slots) | - | 0.25 | - | - | - | 0123456 |",
  ]
  text = f"a\n{performance_table.BEGIN}\nold\n{performance_table.END}\nb\n"
  filled = performance_table.fill(text, table)
  assert filled.startswith("a\n") and filled.endswith("\nb\n")
  assert table in filled and "old" not in filled
  assert performance_table.fill(filled, table) == filled


def test_results_that_are_not_the_same_work_are_an_error():
  def differ(ours, theirs):
    raise ValueError(f"{ours} is not {theirs}")

  with pytest.raises(ValueError, match="1 is not 2"):
    duel.Duel("w", "w", "p", lambda: 1, lambda: 2, differ).measure(3)


def test_a_file_without_markers_is_an_error():
  with pytest.raises(ValueError, match="performance"):
    performance_table.fill("nothing here", "table")
