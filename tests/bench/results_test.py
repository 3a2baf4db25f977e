"""The README's table says what the JSON says, and nothing else changes."""

import json

import pytest

from stepsearch_jax.bench import duel, growth
from stepsearch_jax.bench import results as performance_table
from stepsearch_jax.run import plots


def test_results_become_rows_between_the_markers():
  amounts = iter([9.0, 2.0, 4000.0, 3000.0])  # The first warms up.
  ours = lambda: duel.Measured("x", next(amounts))  # noqa: E731
  theirs = lambda: duel.Measured("x", 6000.0)  # noqa: E731
  *_, compared = duel.Duel(
    "decode", "8 rows", "peer", ours, theirs, lambda a, b: None, goal="1.3"
  ).measure(3)
  assert compared["ours"] == 3000.0 and compared["ratio"] == 2.0
  (alone,) = duel.Reading("waits", "16 slots", lambda: 0.25).measure(3)
  report = {"versions": {"commit": "0123456789", "machine": "2 x cpu"},
            "results": [compared, alone]}
  table = performance_table.table([report])
  assert table.splitlines()[2:] == [
    "| decode (8 rows) | peer | 3,000 s | 6,000 s | **2.00** | 1.3 | 0123456 "
    "| 2 x cpu |",
    "| waits (16 slots) | - | 0.25 | - | - | - | 0123456 | 2 x cpu |",
  ]
  text = "a\n<!-- performance -->\nold\n<!-- /performance -->\nb\n"
  filled = performance_table.fill(text, "performance", table)
  assert filled.startswith("a\n") and filled.endswith("\nb\n")
  assert table in filled and "old" not in filled
  assert performance_table.fill(filled, "performance", table) == filled


def test_only_rows_that_were_measured_again_change():
  def report(what, value, machine):
    reading = duel.Reading(what, "16 slots", lambda: value)
    return {"versions": {"commit": "0123456789-dirty", "machine": machine},
            "results": list(reading.measure(3))}

  before = performance_table.table(
    [report("a", 1.0, "old"), report("b", 2.0, "old")]
  )
  after = performance_table.table(
    [report("c", 3.0, "new"), report("a", 4.0, "new")], before
  )
  assert after.splitlines()[2:] == [
    "| a (16 slots) | - | 4 | - | - | - | 0123456-dirty | new |",
    before.splitlines()[3],
    "| c (16 slots) | - | 3 | - | - | - | 0123456-dirty | new |",
  ]


def test_results_that_are_not_the_same_work_are_an_error():
  def differ(ours, theirs):
    raise ValueError(f"{ours} is not {theirs}")

  with pytest.raises(ValueError, match="1 is not 2"):
    list(duel.Duel("w", "w", "p", lambda: 1, lambda: 2, differ).measure(3))


def test_a_figure_of_too_few_repeats_is_not_shown():
  counted = duel.Duel(
    "decode", "8 rows", "p", lambda: 1, lambda: 1, lambda a, b: None
  )
  first = next(counted.measure(3))
  report = {"versions": {"commit": "c", "machine": "m"}, "results": [first]}
  with pytest.raises(ValueError, match="decode has 1 of 3 repeats"):
    performance_table.table([report])


def test_a_file_without_markers_is_an_error():
  with pytest.raises(ValueError, match="performance"):
    performance_table.fill("nothing here", "performance", "table")


def test_growth_is_fitted_over_tokens_and_shown_with_its_points():
  rows = [{"turns": n, "tokens": 10 * n, "rollout": 2.0 * n, "scores": 1.0,
           "update": 3.0 * n * n, "step": 4.0 * n} for n in (1, 2, 4)]
  exponents = {p: growth.exponent(rows, p)
               for p in ("rollout", "scores", "update", "step")}
  assert exponents == pytest.approx(
    {"rollout": 1, "scores": 0, "update": 2, "step": 1}, abs=1e-9
  )
  result = {"axis": "turns", "points": rows, "exponents": exponents}
  lines = performance_table.growth_table([{"results": [result]}]).splitlines()
  assert lines[3] == "| 2 turns | 20 | 4.00 | 1.00 | 12.00 | 8.00 |"
  assert lines[-1] == "| **exponent** | | 1.00 | 0.00 | 2.00 | 1.00 |"


def test_the_chart_divides_the_median_step_without_a_rest(tmp_path):
  step = {"gen": 10.0, "gen_decode": 4.0, "gen_extend": 3.0,
          "gen_retrieval_wait": 1e-4, "reward": 0.5, "adv": 6.0,
          "old_log_prob": 2.0, "ref": 1.5, "values": 1.0, "update": 7.0}
  records = [{"step": 0, "val/em": 0.5}] + [
    {"step": i, **{f"timing_s/{k}": i * v for k, v in step.items()}}
    for i in (1, 2, 3)
  ]
  (tmp_path / "metrics.jsonl").write_text(
    "".join(json.dumps(record) + "\n" for record in records)
  )
  lines = performance_table.chart(tmp_path).splitlines()
  assert lines[0] == "```mermaid" and lines[-1] == "```"
  assert "3 steps" in lines[1]
  shown = dict(line.split(" : ") for line in lines[2:-1])
  assert {name.strip(' "'): float(v) for name, v in shown.items()} == {
    "rollout decode": 8.0, "rollout extend": 6.0,  # Waiting shows as 0.000.
    "rollout host": 6.0, "rewards": 1.0, "policy": 4.0, "reference": 3.0,
    "value": 2.0, "advantages": 3.0, "update": 14.0,
  }
  assert len(plots.step_time(tmp_path).read_bytes()) > 10_000
