"""Outcomes of arms: areas, pairs by seed and question, the table."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.evaluation import study
from tests import fakes


def run(*arguments, **more):
  """What a study keeps of such a run, as it comes back from a record."""
  folder = fakes.write_study_run(*arguments, **more)
  return json.loads(json.dumps(study.read_run(folder)))


@pytest.fixture
def arms(tmp_path):
  base = study.gather("ppo", {
    seed: run(tmp_path / f"ppo{seed}", [1.0, 0.0, 0.0, 0.0])
    for seed in range(4)
  })
  better = study.gather("steppo", {
    seed: run(tmp_path / f"steppo{seed}", [1.0, 1.0, 0.0, 1.0], 0.5)
    for seed in (3, 1, 2)
  }, "policy_lr 0.0003")
  return base, better


def test_an_arm_has_finals_curve_hops_and_area(arms):
  base, better = arms
  assert base.seeds == (0, 1, 2, 3) and better.seeds == (1, 2, 3)
  assert base.em.shape == (4, 4) and base.em.mean() == 0.25
  np.testing.assert_allclose(better.areas, [(0.5 + 0.75) / 2] * 3)
  assert better.hops == {2: 0.5, 3: 1.0}
  assert better.means == {"searches": 3.0, "recall": 0.5}


def test_differences_pair_seeds_and_questions(arms):
  base, better = arms
  gap = study.differences(better, base)
  np.testing.assert_array_equal(gap, [[0, 1, 0, 1]] * 3)


def test_the_table_says_how_sure_a_difference_is(arms):
  lines = study.table(arms, ["ppo", "not played"])
  assert lines[0].startswith("| arm | seeds | EM (95 %) | EM - ppo (95 %)")
  base, better = lines[2:]
  assert base.startswith("| ppo | 4 | 0.250 (")
  assert "| +0.500 (" in better and better.endswith("| policy_lr 0.0003 |")
  # Three equal signs: 2 of 2^3 patterns are as extreme.
  assert "| 0.250 |" in better
  assert "| 2.50 | 7 |" in better and "not played" not in lines[0]


def test_the_table_has_a_difference_per_baseline(arms, tmp_path):
  apart = study.gather("apart", {
    9: run(tmp_path / "apart", [1.0, 1.0, 1.0, 1.0])
  })
  lines = study.table([*arms, apart], ["ppo", "steppo"])
  assert "EM - ppo (95 %) | p (Holm) | EM - steppo (95 %)" in lines[0]
  base, better, other = lines[2:]
  assert "| - | - | -0.500 (" in base and "| +0.500 (" in better
  assert "| 1.000 (1.000 to 1.000) | - | - | - | - | 0.500 |" in other


def test_areas_are_compared_where_there_are_curves(tmp_path):
  """The same ends, but one arm was there from the start in seed 1 alone."""
  base, better = (
    study.gather(name, {
      seed: run(tmp_path / f"{name}{seed}", [1.0, 0.0], start)
      for seed, start in enumerate(starts)
    })
    for name, starts in (("ppo", (0.0, 0.0)), ("steppo", (0.0, 1.0)))
  )
  still = dataclasses.replace(better, name="still", curve={
    10: better.curve[10]
  })
  lines = study.table([base, better, still], ["ppo", "still"])
  assert "area | area - ppo (95 %) | p (Holm) | 2 hops" in lines[0]
  # Two seeds: .25 +- .25 * 12.706 / 1.96 * sqrt(2).
  assert "| 0.500 | +0.250 (-2.042 to +2.542) | 1.000 |" in lines[3]
  assert "| 0.500 | - | - |" in lines[4] and "area - still" not in lines[0]


def test_runs_on_other_questions_are_refused(tmp_path):
  runs = {
    0: run(tmp_path / "a", [1.0, 0.0]),
    1: run(tmp_path / "b", [1.0, 0.0], ids=["x", "y"]),
  }
  with pytest.raises(types.UserError, match="ppo: seeds .0, 1. were asked"):
    study.gather("ppo", runs)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_a_bit_per_question_comes_back(tmp_path, count):
  em = np.random.default_rng(count).integers(0, 2, count).astype(float)
  ids = [f"q{i:04d}" for i in range(count)]  # In the order of the ids.
  row = run(tmp_path / "a", em.tolist(), ids=ids)
  assert len(row["em"]) <= count / 4 + 2
  np.testing.assert_array_equal(study.gather("a", {0: row}).em, [em])


def test_what_a_run_does_not_know_is_a_dash(tmp_path):
  folder = fakes.write_study_run(tmp_path / "a", [1.0])
  (folder / "metrics.jsonl").write_text('{"step": 0}\n')
  place = folder / "evaluations/step_000010/predictions.jsonl"
  row = json.loads(place.read_text())
  place.write_text(json.dumps(row | {"retrieval_recall": None}) + "\n")
  arm = study.gather("a", {0: study.read_run(folder)})
  assert study.table([arm], [])[-1].endswith("| 3.00 | - | - | 7 |  |")


def test_the_curves_are_drawn(arms, tmp_path):
  study.plot(arms, epath.Path(tmp_path) / "study.png")
  assert (tmp_path / "study.png").stat().st_size > 10_000


def test_the_area_is_over_steps_at_which_all_seeds_were_evaluated():
  row = dict(questions="q", em="80", count=1, hops={}, searches=1.0,
             recall=None, seconds=1.0, step_seconds=1.0)
  runs = {0: row | {"curve": {"0": 0.0, "10": 1.0, "40": 1.0}},
          1: row | {"curve": {"0": 0.0, "20": 0.3, "40": 0.5}}}
  np.testing.assert_allclose(study.gather("a", runs).areas, [0.5, 0.25])


def test_the_area_weighs_an_evaluation_by_the_steps_around_it():
  curve = {0: np.array([0.0]), 10: np.array([1.0]), 40: np.array([0.0])}
  arm = study.Arm("a", "", (0,), "", None, curve, {}, {}, 0.0, 0.0)
  assert arm.areas[0] == pytest.approx((10 * 0.5 + 30 * 0.5) / 40)
  curve = {0: np.array([0.0]), 10: np.array([1.0]), 40: np.array([1.0])}
  arm = study.Arm("a", "", (0,), "", None, curve, {}, {}, 0.0, 0.0)
  assert arm.areas[0] == pytest.approx((10 * 0.5 + 30 * 1.0) / 40)
