"""Intervals and tests for scores of questions, over seeds or without.

Comparisons are paired: the same questions, in the same order, on both sides.
Everything is a function of its inputs and a seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types

_SAMPLES = 2000
_LEVEL = 0.95
# 97.5 % quantiles of the normal distribution, and of Student's t with 1 to 9
# degrees of freedom.
_NORMAL = 1.959964
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060,
            2.2622)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean, or a difference of means, with its 95 % interval."""

  value: float
  low: float
  high: float


def bootstrap_mean(
  values: np.ndarray, seed: int = 0, samples: int = 1000
) -> Estimate:
  """Returns a mean with its percentile bootstrap interval (Efron, 1979).

  Args:
    values: [N] scores, at least one.
    seed: of the resampling.
    samples: number of resamples.

  Raises:
    UserError: there are no values.
  """
  values = np.asarray(values, np.float64)
  if not values.size:
    raise types.UserError("an interval needs at least one value")
  rng = np.random.default_rng(seed)
  means = np.array([
    values[rng.integers(0, values.size, values.size)].mean()
    for _ in range(samples)
  ])
  return _estimate(float(values.mean()), means)


def paired_bootstrap(
  ours: np.ndarray, theirs: np.ndarray, seed: int = 0,
) -> Estimate:
  """Returns mean(ours - theirs) with an interval over questions.

  Args:
    ours: [N] score per question.
    theirs: of the same questions in the same order.
    seed: of the resampling.

  Raises:
    UserError: the two do not belong to the same questions.
  """
  ours, theirs = _paired(ours, theirs)
  return bootstrap_mean(ours - theirs, seed, _SAMPLES)


def hierarchical_bootstrap(
  differences: np.ndarray, seed: int = 0
) -> Estimate:
  """Returns the mean with an interval over seeds and, inside them, questions.

  Training seeds are drawn first, then questions, the same ones for all drawn
  seeds, since all seeds were asked the same questions. How far the drawn seeds'
  mean lies from that of all is widened by `small_sample`: as they come, such
  intervals of 3, 5 and 10 seeds would cover 75, 84 and 90 % instead of 95. One
  seed says nothing about others; its interval is over questions alone.

  Args:
    differences: [seeds, N] scores, or differences of scores, of questions.
    seed: of the resampling.

  Raises:
    UserError: there is no value.
  """
  differences = np.asarray(differences, np.float64)
  if differences.ndim != 2 or not differences.size:
    raise types.UserError(
      "need differences per seed and question, got shape "
      f"{list(differences.shape)}"
    )
  seeds, count = differences.shape
  by_seed, more = differences.mean(axis=1), small_sample(seeds) - 1
  rng = np.random.default_rng(seed)
  means = np.empty(_SAMPLES)
  for i in range(_SAMPLES):
    rows = rng.integers(0, seeds, seeds)
    columns = rng.integers(0, count, count)
    means[i] = differences[rows].mean(axis=0)[columns].mean()
    means[i] += more * (by_seed[rows].mean() - by_seed.mean())
  return _estimate(float(differences.mean()), means)


def small_sample(count: int) -> float:
  """Returns by how much a bootstrap of so few values is too narrow.

  sqrt(n / (n - 1)), since resampling knows the variance of the sample only,
  times Student's 97.5 % quantile over the normal one; 1 for one value.
  """
  if count < 2:
    return 1.0
  free, z = count - 1, _NORMAL
  # Behind the table by Cornish and Fisher's expansion, right to .0003.
  student = _STUDENT[free - 1] if free <= len(_STUDENT) else (
    z + (z**3 + z) / (4 * free)
    + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
  )
  return student / z * (count / free) ** 0.5


def permutation_test(
  ours: np.ndarray,
  theirs: np.ndarray,
  seed: int = 0,
  samples: int = 10_000,
) -> float:
  """Returns the two-sided p of a paired permutation test of the mean.

  Under the null the two scores of a pair may be exchanged, so the signs of the
  differences are random. Up to 2^12 sign patterns are all counted; of more,
  `samples` are drawn, and the observed one is counted with them.

  Args:
    ours: [N] score per pair, a question or a seed.
    theirs: of the same pairs.
    seed: of the drawing.
    samples: patterns that are drawn.
  """
  ours, theirs = _paired(ours, theirs)
  differences = ours - theirs
  differences = differences[differences != 0]  # Their sign changes nothing.
  count = len(differences)
  if not count:
    return 1.0
  # Sums that equal the observed one must not fall short of it by rounding.
  observed = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
  if count <= 12:
    patterns = np.arange(2**count)[:, None] >> np.arange(count) & 1
    sums = (1 - 2 * patterns) @ differences
    return float(np.mean(np.abs(sums) >= observed))
  rng, reached, left = np.random.default_rng(seed), 0, samples
  while left:
    part = min(left, 1000)
    signs = rng.integers(0, 2, (part, count), np.int8) * 2 - 1
    reached += int((np.abs(signs @ differences) >= observed).sum())
    left -= part
  return (reached + 1) / (samples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
  """Returns p-values adjusted for their number by Holm (1979).

  The i-th smallest of n is multiplied by n - i + 1, and none is made smaller
  than an earlier one or larger than 1.
  """
  count = len(p_values)
  adjusted, reached = [0.0] * count, 0.0
  for rank, place in enumerate(np.argsort(p_values, kind="stable")):
    reached = max(reached, min((count - rank) * p_values[place], 1.0))
    adjusted[place] = float(reached)
  return adjusted


def _paired(ours, theirs) -> tuple[np.ndarray, np.ndarray]:
  ours, theirs = (np.asarray(v, np.float64) for v in (ours, theirs))
  if ours.shape != theirs.shape or ours.ndim != 1 or not ours.size:
    raise types.UserError(
      "a paired comparison needs the same questions on both sides, got "
      f"{list(ours.shape)} and {list(theirs.shape)} scores"
    )
  return ours, theirs


def _estimate(value: float, means: np.ndarray) -> Estimate:
  tail = (1 - _LEVEL) / 2
  low, high = np.quantile(means, [tail, 1 - tail])
  return Estimate(value, float(low), float(high))
