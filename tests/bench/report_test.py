"""A benchmark that was stopped goes on where it was, or says why it cannot."""

import json

import pytest

from stepsearch_jax.bench import duel, report

HEAD = {"suite": "step", "versions": {"commit": "a"}}


def _duel(amounts):
  """Ours takes these amounts in turn and no others; the peer always 12."""
  amounts = iter(amounts)
  return duel.Duel(
    "step", "8 rows", "torch", lambda: duel.Measured("x", next(amounts)),
    lambda: duel.Measured("x", 12.0), lambda a, b: None, warm_up=False,
  )


def test_a_stopped_duel_takes_only_the_repeats_it_lacks(tmp_path):
  path = tmp_path / "step.json"
  with pytest.raises(RuntimeError):  # No third amount.
    report.Report(path, HEAD).measure(_duel([2.0, 9.0]), 3)
  assert json.loads(path.read_text())["results"][0]["repeats"] == {
    "ours": [2.0, 9.0], "peer": [12.0, 12.0]
  }
  result = report.Report(path, HEAD).measure(_duel([4.0]), 3)
  assert result["repeats"]["ours"] == [2.0, 9.0, 4.0]
  assert result["ours"] == 4.0 and result["ratio"] == 3.0
  written = path.read_text()
  assert json.loads(written) == HEAD | {"results": [result]}
  assert report.Report(path, HEAD).measure(_duel([]), 3) == result
  assert path.read_text() == written


def test_the_results_are_compared_again_when_a_duel_goes_on(tmp_path):
  def differ(ours, theirs):
    raise ValueError(f"{ours} is not {theirs}")

  path = tmp_path / "step.json"
  with pytest.raises(RuntimeError):
    report.Report(path, HEAD).measure(_duel([2.0]), 3)
  other = _duel([3.0, 3.0])
  other.same = differ
  with pytest.raises(ValueError, match="x is not x"):
    report.Report(path, HEAD).measure(other, 3)


def test_finished_readings_stay_and_others_join_them(tmp_path):
  path = tmp_path / "waits.json"
  first = report.Report(path, HEAD).measure(
    duel.Reading("waits", "16 slots", lambda: 0.25), 3
  )
  again = report.Report(path, HEAD)
  assert again.measure(duel.Reading("waits", "16 slots", lambda: 9.0), 3) == (
    first
  )
  second = again.measure(duel.Reading("waits", "8 slots", lambda: 0.5), 3)
  assert json.loads(path.read_text())["results"] == [first, second]


def test_figures_of_other_code_or_machines_are_not_mixed(tmp_path):
  path = tmp_path / "step.json"
  report.Report(path, HEAD).measure(duel.Reading("w", "w", lambda: 1.0), 3)
  before = path.read_text()
  other = HEAD | {"versions": {"commit": "b"}}
  with pytest.raises(ValueError, match="step.json.*commit.*give --json"):
    report.Report(path, other)
  assert path.read_text() == before


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_file_that_is_no_report_is_named(tmp_path, text):
  path = tmp_path / "notes.json"
  path.write_text(text)
  with pytest.raises(ValueError, match="notes.json is no report"):
    report.Report(path, HEAD)
  assert path.read_text() == text


def test_a_failure_is_kept_until_the_figure_is_taken(tmp_path):
  path = tmp_path / "parity.json"
  reading = duel.Reading("scores", "bfloat16", lambda: 0.5)
  report.Report(path, HEAD).failed(reading, RuntimeError("no\nkernel"))
  found = json.loads(path.read_text())
  assert found["results"] == []
  assert [f["error"] for f in found["failures"]] == [
    "RuntimeError: no | kernel"
  ]
  versions = {"versions": {"commit": "a", "machine": "H100"}, "suite": "s"}
  assert "FAILED  scores (bfloat16): RuntimeError: no | kernel" in (
    report.summary([found | versions])
  )
  report.Report(path, HEAD).measure(reading, 3)
  assert "failures" not in json.loads(path.read_text())
