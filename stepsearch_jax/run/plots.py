"""Pictures of a run, drawn from its metrics file when it ends."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Sequence

import numpy as np
from etils import epath

# Title, metrics, unit of the axis.
_PANELS = (
  ("reward", ("critic/score/mean", "critic/answer_correct/mean"),
   "reward per question"),
  ("step rewards", ("critic/information_gain/mean", "critic/redundancy/mean",
                    "critic/search_key/mean"), "mean per question"),
  ("held-out, 95 % intervals", (
    "val/em", "val/f1", "val/em_2_hops", "val/em_3_hops", "val/em_4_hops",
  ), "mean per question (1 = all right)"),
  ("searches", ("env/searches_per_question",), "searches per question"),
  ("KL to the reference", ("critic/kl",), "nats per token"),
  ("entropy", ("actor/entropy",), "nats per token"),
)


def read_metrics(path: epath.Path) -> list[dict]:
  """Records of a `metrics.jsonl`, oldest first."""
  return [json.loads(line) for line in path.read_text().splitlines()]


def learning_curves(workdir: epath.PathLike) -> epath.Path | None:
  """Draws `curves.png` into the run folder.

  Returns:
    The picture's path, or None when there is nothing to draw.
  """
  plt = _pyplot()
  workdir = epath.Path(workdir)
  records = read_metrics(workdir / "metrics.jsonl")
  if not records:
    return None
  figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
  for axis, (title, names, unit) in zip(axes.flat, _PANELS, strict=True):
    for name in names:
      points = [(r["step"], r[name]) for r in records if name in r]
      if points:
        marker = "o" if len(points) < 20 else ""
        axis.errorbar(
          *zip(*points, strict=True), _error_bars(workdir, name, points),
          label=name, marker=marker, capsize=3, elinewidth=1,
        )
    axis.set(title=title, xlabel="training step", ylabel=unit)
    if axis.lines:
      axis.legend(fontsize=8)
  return _save(figure, workdir / "curves.png")


def _error_bars(
  workdir: epath.Path, name: str, points: Sequence[tuple[int, float]]
) -> np.ndarray | None:
  """[2, points] how far the intervals of the cards reach down and up.

  NaN for an evaluation without one; None for a metric of no evaluation.
  """
  if not name.startswith("val/"):
    return None
  reach = np.full((2, len(points)), np.nan)
  for i, (step, value) in enumerate(points):
    path = workdir / "evaluations" / f"step_{step:06d}" / "card.json"
    card = json.loads(path.read_text()) if path.exists() else {}
    interval = card.get("intervals", {}).get(name.removeprefix("val/"))
    if interval:
      reach[:, i] = value - interval[0], interval[1] - value
  return reach.clip(min=0)


def overlay(workdirs: Sequence[epath.Path], path: epath.Path) -> None:
  """Draws the curves of several runs into one picture, panel by panel."""
  plt = _pyplot()
  figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
  styles = ("-", "--", ":", "-.")
  for i, workdir in enumerate(workdirs):
    records = read_metrics(workdir / "metrics.jsonl")
    for axis, (_, names, unit) in zip(axes.flat, _PANELS, strict=True):
      points = [(r["step"], r[names[0]]) for r in records if names[0] in r]
      if points:
        axis.plot(*zip(*points, strict=True), styles[i % 4],
                  label=workdir.name)
      axis.set(title=names[0], xlabel="training step", ylabel=unit)
      axis.title.set_fontsize(9)
  axes.flat[0].legend(fontsize=8)
  _save(figure, path)


def step_seconds(workdir: epath.PathLike) -> dict[str, list[float]]:
  """Where the seconds of every training step of a run went.

  Args:
    workdir: of the run.

  Returns:
    Seconds by phase in the order of a step, one for each step; the phases add
    up to the step without its evaluation. "step" holds the steps' numbers.
  """
  records = read_metrics(epath.Path(workdir) / "metrics.jsonl")
  records = [r for r in records if "timing_s/old_log_prob" in r]

  def column(name):
    return np.array([r.get(f"timing_s/{name}", 0.0) for r in records])

  rollout = {
    "rollout decode": column("gen_decode"),
    "rollout extend": column("gen_extend"),
    "retrieval wait": column("gen_retrieval_wait"),
    "answer probe": column("gen_probe"),
  }
  scoring = {
    "policy": column("old_log_prob"),
    "reference": column("ref"),
    "value": column("values"),
  }
  found = {
    **rollout,
    "rollout host": column("gen") - sum(rollout.values()),
    "rewards": column("reward"),
    **scoring,
    "advantages": column("adv") - sum(scoring.values()),
    "update": column("update"),
  }
  return {"step": [r["step"] for r in records]} | {
    name: seconds.tolist() for name, seconds in found.items()
  }


def step_time(workdir: epath.PathLike) -> epath.Path | None:
  """Draws `step_time.png` into the run folder, see `step_seconds`.

  Returns:
    The picture's path, or None when there is nothing to draw.
  """
  plt = _pyplot()
  seconds = step_seconds(workdir)
  steps = seconds.pop("step")
  if not steps:
    return None
  medians = [statistics.median(values) for values in seconds.values()]
  colors = plt.get_cmap("tab10").colors
  figure, (over, share) = plt.subplots(
    1, 2, figsize=(13, 5), layout="constrained"
  )
  over.stackplot(steps, list(seconds.values()), colors=colors)
  over.set(title="seconds per step", xlabel="step", ylabel="seconds")
  later = np.sum(list(seconds.values()), axis=0)[1:]
  if len(later):  # The first step compiles; it may leave the picture.
    over.set_ylim(0, 1.3 * later.max())
  bars = share.barh(list(seconds), medians, color=colors)
  share.bar_label(
    bars, [f"{m:.2f} s, {m / sum(medians):.0%}" for m in medians], padding=3,
    fontsize=8,
  )
  share.invert_yaxis()
  share.margins(x=0.2)
  share.set(title="median step", xlabel="seconds")
  return _save(figure, epath.Path(workdir) / "step_time.png")


def _pyplot():
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  return pyplot


def _save(figure, path: epath.Path) -> epath.Path:
  picture = io.BytesIO()
  figure.savefig(picture, format="png", dpi=100)
  _pyplot().close(figure)
  path.write_bytes(picture.getvalue())
  return path
