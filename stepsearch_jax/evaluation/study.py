"""A study's runs as one table and one picture.

The figure of a run is its last evaluation, the area under its curve the
second; arms are compared with baselines on the same seeds and questions.
It knows folders of finished runs, and rows that tell the same in short, not how
they were started.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.evaluation import statistics

_DASHES = ("--", ":", "-.")


@dataclasses.dataclass(frozen=True)
class Arm:
  """Outcomes of one arm over its seeds.

  Attributes:
    name: of the arm.
    note: chosen learning rate or other remark for the table; may be "".
    seeds: of its finished runs, ascending.
    questions: digest of the test questions' ids, the same for all seeds.
    em: [seeds, N] exact match per question after the last step.
    curve: {step: mean exact match of the seeds that were evaluated then}.
    hops: {hops: mean exact match}.
    means: further means over seeds and questions: searches, recall; None
      where it is not known.
    seconds: mean seconds of a run.
    step_seconds: mean seconds of a step after the first, which compiles; None
      where nothing was learned from rewards.
  """

  name: str
  note: str
  seeds: tuple[int, ...]
  questions: str
  em: np.ndarray
  curve: dict[int, np.ndarray]
  hops: dict[int, float]
  means: dict[str, float | None]
  seconds: float
  step_seconds: float | None

  @property
  def learned(self) -> bool:
    """Whether there is more than one evaluation, and so a curve."""
    return len(self.curve) > 1

  @property
  def areas(self) -> np.ndarray:
    """Mean exact match along each seed's curve, [seeds] (trapezoids).

    Over the steps at which all seeds were evaluated: at least the last ones.
    """
    everyone = len(self.seeds)
    steps = sorted(s for s, em in self.curve.items() if len(em) == everyone)
    values = np.stack([self.curve[step] for step in steps])
    if len(steps) == 1:
      return values[0]
    return np.trapezoid(values, steps, axis=0) / (steps[-1] - steps[0])


def read_run(folder: epath.Path) -> dict[str, Any]:
  """Returns what a study keeps of a finished run, as a JSON object.

  Its fields: `commit` and `jax` that played it, `questions` (digest of the
  sorted ids) and `count`, `em` (a bit per question in that order, as
  hexadecimal), `em_after` (their mean), `curve` {step: mean exact match},
  `hops` {hops: mean exact match}, `searches`, `recall`, `seconds`,
  `step_seconds` (mean of a step after the first, which compiles).
  """
  evaluations = sorted((folder / "evaluations").glob("step_*"))
  rows = _predictions(evaluations[-1])
  cards = {
    int(place.name.removeprefix("step_")):
      json.loads((place / "card.json").read_text()) for place in evaluations
  }
  last = cards[max(cards)]["settings"]
  hops = collections.defaultdict(list)
  for row in rows:
    hops[row.get("hops", 0)].append(row["em"])
  ids = "\n".join(row["id"] for row in rows)
  summary = json.loads((folder / "summary.json").read_text())
  return {
    "commit": last["commit"], "jax": last["jax"],
    "questions": hashlib.sha256(ids.encode()).hexdigest()[:12],
    "count": len(rows),
    "em": np.packbits([row["em"] > 0 for row in rows]).tobytes().hex(),
    "curve": {
      str(step): card["metrics"]["em"] for step, card in cards.items()
    },
    "hops": {str(n): float(np.mean(em)) for n, em in sorted(hops.items()) if n},
    "searches": _mean([row["searches"] for row in rows]),
    "recall": _mean([row.get("retrieval_recall") for row in rows]),
    "em_after": summary["em_after"],
    "seconds": summary["train_seconds"],
    "step_seconds": _mean(_step_seconds(folder)),
  }


def _mean(values: Sequence[float | None]) -> float | None:
  """Mean of what is known; None where nothing is."""
  known = [value for value in values if value is not None]
  return float(np.mean(known)) if known else None


def gather(
  name: str, runs: Mapping[int, Mapping[str, Any]], note: str = ""
) -> Arm:
  """Returns the outcomes of an arm's finished runs.

  Args:
    name: of the arm.
    runs: what `read_run` returned, per seed.
    note: see `Arm`.

  Raises:
    UserError: two runs were asked different questions.
  """
  seeds = tuple(sorted(runs))
  rows = [runs[seed] for seed in seeds]
  digests = {row["questions"] for row in rows}
  if len(digests) > 1:
    raise types.UserError(
      f"{name}: seeds {seeds} were asked different questions; a study compares "
      "runs on the same ones"
    )
  em = [
    np.unpackbits(np.frombuffer(bytes.fromhex(row["em"]), np.uint8),
                  count=row["count"])
    for row in rows
  ]
  steps = sorted({int(step) for row in rows for step in row["curve"]})

  def over_runs(field):
    return _mean([row[field] for row in rows])

  return Arm(
    name, note, seeds, digests.pop(), np.array(em, np.float64),
    {
      step: np.array([row["curve"][str(step)] for row in rows
                      if str(step) in row["curve"]])
      for step in steps
    },
    {
      int(n): _mean([row["hops"].get(n) for row in rows])
      for n in sorted({n for row in rows for n in row["hops"]}, key=int)
    },
    {field: over_runs(field) for field in ("searches", "recall")},
    over_runs("seconds"), over_runs("step_seconds"),
  )


def _step_seconds(folder: epath.Path) -> list[float]:
  """Seconds of the steps of a run, but for the first, which compiles."""
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [r["timing_s/step"] for r in rows if r["step"] > 1]


def _predictions(folder: epath.Path) -> list[dict]:
  """Rows of an evaluation, in the order of their ids."""
  lines = (folder / "predictions.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return sorted((r for r in rows if "id" in r), key=lambda row: row["id"])


def differences(arm: Arm, baseline: Arm) -> np.ndarray:
  """Returns [seeds, N] differences on the seeds that both arms have.

  Raises:
    UserError: no seed is common, or the questions differ.
  """
  own, others = _common(arm, baseline)
  return arm.em[own] - baseline.em[others]


def _area_differences(arm: Arm, baseline: Arm) -> np.ndarray:
  """[seeds, 1], otherwise as `differences`."""
  own, others = _common(arm, baseline)
  return (arm.areas[own] - baseline.areas[others])[:, None]


def _common(arm: Arm, baseline: Arm) -> tuple[list[int], list[int]]:
  """Places of the common seeds in both arms."""
  common = [seed for seed in arm.seeds if seed in baseline.seeds]
  if not common or arm.questions != baseline.questions:
    raise types.UserError(
      f"{arm.name} and {baseline.name} have no seeds, or not the same "
      f"questions, in common: seeds {arm.seeds} and {baseline.seeds}"
    )
  return (
    [arm.seeds.index(seed) for seed in common],
    [baseline.seeds.index(seed) for seed in common],
  )


def table(arms: Sequence[Arm], baselines: Sequence[str]) -> list[str]:
  """Returns a study as the lines of a Markdown table.

  Means have hierarchical bootstrap intervals over seeds and questions; the
  p-values are of a paired permutation test over seeds' means against a
  baseline, adjusted by Holm over the arms.

  Args:
    arms: with at least one finished run each.
    baselines: names of the arms that the others are compared with; one that is
      not among them gets no column, one that learned also compares areas.
  """
  by_name = {arm.name: arm for arm in arms}
  known = [by_name[name] for name in baselines if name in by_name]
  columns = [_against(arms, base, differences) for base in known]
  curves = [arm for arm in arms if arm.learned]
  leading = [base for base in known if base.learned]
  areas = [_against(curves, base, _area_differences) for base in leading]
  kinds = sorted({n for arm in arms for n in arm.hops})
  head = ["arm", "seeds", "EM (95 %)"]
  for base in known:
    head += [f"EM - {base.name} (95 %)", "p (Holm)"]
  head.append("area")
  for base in leading:
    head += [f"area - {base.name} (95 %)", "p (Holm)"]
  head += [*(f"{n} hops" for n in kinds), "searches", "recall", "s per step",
           "s per run", "note"]
  lines = [_row(head), _row(["---"] * len(head))]
  for arm in arms:
    mean = statistics.hierarchical_bootstrap(arm.em)
    cells = [arm.name, str(len(arm.seeds)), _estimate(mean)]
    for column in columns:
      cells += column.get(arm.name, ("-", "-"))
    cells += [f"{arm.areas.mean():.3f}"]
    for column in areas:
      cells += column.get(arm.name, ("-", "-"))
    cells += [f"{arm.hops[n]:.3f}" if n in arm.hops else "-" for n in kinds]
    cells += [
      _number(arm.means["searches"], 2), _number(arm.means["recall"], 3),
      _number(arm.step_seconds, 2), _number(arm.seconds, 0), arm.note,
    ]
    lines.append(_row(cells))
  return lines


def _against(
  arms: Sequence[Arm], base: Arm, gap_of: Callable[[Arm, Arm], np.ndarray]
) -> dict[str, tuple[str, str]]:
  """Difference and p-value of every arm that shares seeds with a baseline."""
  gaps = {
    arm.name: gap_of(arm, base) for arm in arms
    if arm is not base and set(arm.seeds) & set(base.seeds)
  }
  p_values = statistics.holm([
    statistics.permutation_test(gap.mean(1), np.zeros(len(gap)))
    for gap in gaps.values()
  ])
  return {
    name: (_estimate(statistics.hierarchical_bootstrap(gap), signed=True),
           f"{p:.3f}")
    for (name, gap), p in zip(gaps.items(), p_values, strict=True)
  }


def _row(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cells) + " |"


def _number(value: float | None, digits: int) -> str:
  return "-" if value is None else f"{value:.{digits}f}"


def _estimate(estimate: statistics.Estimate, signed: bool = False) -> str:
  form = "+.3f" if signed else ".3f"
  low, high = estimate.low, estimate.high
  if not signed:  # A share.
    low, high = max(low, 0.0), min(high, 1.0)
  return f"{estimate.value:{form}} ({low:{form}} to {high:{form}})"


def plot(arms: Sequence[Arm], path: epath.Path) -> None:
  """Draws held-out exact match over training steps, bands over seeds."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
  for number, arm in enumerate(arms):
    color = plt.get_cmap("tab20")(number % 20)
    steps = sorted(arm.curve)
    values = [arm.curve[step] for step in steps]
    middle = [value.mean() for value in values]
    if len(steps) == 1:
      axis.axhline(middle[0], linestyle=_DASHES[number % len(_DASHES)],
                   color=color, label=f"{arm.name} ({len(arm.seeds)})")
      continue
    axis.plot(steps, middle, color=color, marker="o",
              label=f"{arm.name} ({len(arm.seeds)})")
    error = [
      1.96 * value.std(ddof=1) / np.sqrt(len(value)) if len(value) > 1 else 0.0
      for value in values
    ]
    axis.fill_between(
      steps, np.subtract(middle, error), np.add(middle, error), alpha=0.15,
      color=color,
    )
  axis.set(xlabel="training step", ylabel="held-out exact match, mean and 95 %")
  axis.grid(alpha=0.3)
  axis.legend(fontsize=8)
  figure.savefig(str(path), dpi=110)
  plt.close(figure)
