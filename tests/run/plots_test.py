"""The picture of a run: what its curves show, with intervals and units."""

import json

import numpy as np
import pytest
from etils import epath

from stepsearch_jax.evaluation import card
from stepsearch_jax.run import plots


@pytest.fixture
def figure(tmp_path, monkeypatch):
  """The curves of a run of three evaluations, the last one without a card."""
  records = []
  for step, right in ((0, 1), (2, 6), (4, 8)):
    rows = [
      {"id": str(i), "data_source": "ab"[i % 2], "hops": 2 + i % 2,
       "em": float(i < right), "f1": float(i < right) / 2} for i in range(10)
    ]
    made = card.make_card({}, rows)
    if step < 4:
      card.write_card(tmp_path / f"evaluations/step_{step:06d}", made)
    records.append({"step": step, "critic/kl": 0.1 * step} | {
      f"val/{name}": value for name, value in made["metrics"].items()
    })
  (tmp_path / "metrics.jsonl").write_text(
    "".join(json.dumps(record) + "\n" for record in records)
  )
  kept = []
  monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
  plots.learning_curves(epath.Path(tmp_path))
  (drawn,) = kept
  yield tmp_path, {axis.get_title(): axis for axis in drawn.axes}
  plots._pyplot().close(drawn)


def reaches(axis, number):
  """[points, 2] the ends of the error bars of a line; NaN without one."""
  bars = axis.containers[number].lines[2][0]
  return np.array([
    segment[:, 1] if len(segment) else [np.nan] * 2
    for segment in bars.get_segments()
  ])


def test_held_out_points_have_the_intervals_of_their_cards(figure):
  folder, axes = figure
  axis = axes["held-out, 95 % intervals"]
  names = [container.get_label() for container in axis.containers]
  assert names == ["val/em", "val/f1", "val/em_2_hops", "val/em_3_hops"]
  for number, name in enumerate(names):
    drawn = reaches(axis, number)
    for place, step in enumerate((0, 2)):
      path = folder / f"evaluations/step_{step:06d}/card.json"
      made = json.loads(path.read_text())
      wanted = made["intervals"][name.removeprefix("val/")]
      np.testing.assert_allclose(drawn[place], wanted, atol=1e-9)
    assert np.isnan(drawn[2:]).all()
  low, high = reaches(axis, 0)[1]
  assert 0.2 < low < 0.6 < high < 1.0  # Six of ten are right.


def test_axes_have_units_and_other_curves_no_intervals(figure):
  _, axes = figure
  assert {axis.get_xlabel() for axis in axes.values()} == {"training step"}
  assert all(axis.get_ylabel() for axis in axes.values())
  axis = axes["KL to the reference"]
  assert axis.get_ylabel() == "nats per token"
  (container,) = axis.containers
  assert not container.has_yerr
  assert container.lines[0].get_ydata().tolist() == [0.0, 0.2, 0.4]


def test_a_source_may_repeat_the_ids_of_another():
  rows = [{"id": str(i % 3), "data_source": "ab"[i // 6], "em": 1.0, "f1": 1.0}
          for i in range(12)]
  made = card.make_card({}, rows + [rows[0] | {"id": "3"}] * 2, attempts=2)
  assert made["intervals"] == {"em": [1.0, 1.0], "f1": [1.0, 1.0]}


def test_the_card_shows_the_intervals_of_its_metrics(tmp_path):
  rows = [{"id": str(i), "data_source": "a", "hops": 2, "em": i % 2, "f1": 1.0,
           "searches": 3} for i in range(50)]
  made = card.make_card({}, rows)
  assert made["intervals"]["em"] == made["sources"]["a"]["em_interval"]
  assert made["intervals"]["em_2_hops"] == made["intervals"]["em"]
  card.write_card(epath.Path(tmp_path), made)
  low, high = made["intervals"]["em"]
  text = (tmp_path / "card.md").read_text()
  assert f"| em | 0.5000 ({low:.4f}-{high:.4f}) |\n" in text
  assert "| searches | 3.0000 |\n" in text
