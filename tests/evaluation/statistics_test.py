"""Intervals and tests against closed forms, enumeration and hand work."""

import itertools
import math

import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.evaluation import statistics


def test_bootstrap_interval_covers_what_normal_theory_gives():
  values = np.random.default_rng(0).random(400) < 0.3
  half = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
  found = statistics.bootstrap_mean(values)
  assert found.value == values.mean()
  assert found.low == pytest.approx(values.mean() - half, abs=0.006)
  assert found.high == pytest.approx(values.mean() + half, abs=0.006)


def test_bootstrap_interval_of_a_coin_matches_the_normal_one():
  values = np.array([0.0, 1.0] * 200)
  found = statistics.bootstrap_mean(values)
  assert found.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
  assert found.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)
  assert statistics.bootstrap_mean(values) == found


def test_pairing_removes_what_the_questions_have_in_common():
  rng = np.random.default_rng(0)
  hard = rng.normal(0, 10, 300)
  noise = rng.normal(0, 1, 300)
  found = statistics.paired_bootstrap(hard + 0.5 + noise, hard)
  half = 1.96 * noise.std() / math.sqrt(300)
  assert found.value == pytest.approx(0.5 + noise.mean())
  assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
  assert found.low > 0
  back = statistics.paired_bootstrap(hard, hard + 0.5 + noise)
  assert back.value == -found.value and back.high < 0


def test_hierarchical_interval_is_that_of_the_sum_of_both_variances():
  rng = np.random.default_rng(1)
  seeds, count = 12, 200
  table = (rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 3, (1, count))
           + 0.4)
  found = statistics.hierarchical_bootstrap(table)
  # Student's t of 11 degrees of freedom, for the seeds alone.
  spread = math.sqrt((2.201 / 1.96) ** 2 * table.mean(1).var(ddof=1) / seeds
                     + table.mean(0).var() / count)
  assert found.value == pytest.approx(table.mean())
  assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.08)


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds):
  rng, covered = np.random.default_rng(seeds), 0
  for _ in range(100):
    found = statistics.hierarchical_bootstrap(rng.normal(0, 1, (seeds, 1)))
    covered += found.low <= 0 <= found.high
  # As it comes, a bootstrap covers .75 and .84.
  assert covered / 100 == pytest.approx(0.95, abs=0.05)


def test_few_values_are_widened_by_students_t():
  """Quantiles of the table in Fisher and Yates."""
  for count, t in ((2, 12.706), (5, 2.776), (10, 2.262), (11, 2.228),
                   (21, 2.086), (61, 2.000)):
    wanted = t / 1.959964 * math.sqrt(count / (count - 1))
    assert statistics.small_sample(count) == pytest.approx(wanted, rel=3e-4)
  assert statistics.small_sample(1) == 1


def test_one_seed_leaves_the_questions_and_equal_seeds_add_nothing():
  row = np.random.default_rng(2).normal(1, 1, 100)
  one = statistics.hierarchical_bootstrap(row[None])
  many = statistics.hierarchical_bootstrap(np.repeat(row[None], 8, axis=0))
  plain = statistics.bootstrap_mean(row)
  width = plain.high - plain.low
  assert one.high - one.low == pytest.approx(width, rel=0.1)
  assert many.high - many.low == pytest.approx(width, rel=0.1)


@pytest.mark.parametrize("count", [1, 3, 8, 12])
def test_permutation_p_equals_enumeration_in_plain_python(count):
  rng = np.random.default_rng(count)
  ours, theirs = rng.normal(0.3, 1, count), np.zeros(count)
  observed = abs(sum(ours))
  reached = sum(
    abs(sum(s * d for s, d in zip(signs, ours, strict=True)))
    >= observed - 1e-12
    for signs in itertools.product((1, -1), repeat=count)
  )
  p = statistics.permutation_test(ours, theirs)
  assert p == pytest.approx(reached / 2**count)
  assert p == statistics.permutation_test(theirs, ours)


def test_drawn_patterns_come_near_the_sign_test():
  # 20 questions won, 5 lost, 75 equal: a binomial tail on 25.
  ours = np.array([1.0] * 20 + [0.0] * 5 + [1.0] * 75)
  theirs = np.array([0.0] * 20 + [1.0] * 5 + [1.0] * 75)
  tail = 2 * sum(math.comb(25, k) for k in range(20, 26)) / 2**25
  p = statistics.permutation_test(ours, theirs, samples=40_000)
  assert p == pytest.approx(tail, abs=0.001)


def test_p_is_never_zero_and_equal_scores_give_one():
  ours = np.linspace(1, 2, 60)
  assert statistics.permutation_test(ours, ours) == 1.0
  assert statistics.permutation_test(ours, 0 * ours) == 1 / 10_001


def test_holm_equals_the_hand_worked_example():
  # .01 * 4, .02 * 3 = .06, .03 * 2 = .06, .04 * 1 -> raised to .06.
  assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx(
    [0.06, 0.04, 0.06, 0.06])
  assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
  assert statistics.holm([]) == []


@pytest.mark.parametrize("ours, theirs", [
  ([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]]),
])
def test_scores_of_other_questions_are_refused(ours, theirs):
  for compare in (statistics.paired_bootstrap, statistics.permutation_test):
    with pytest.raises(types.UserError, match="same questions"):
      compare(np.array(ours), np.array(theirs))
