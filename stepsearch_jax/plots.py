"""Pictures of a run, drawn from its metrics file when it ends."""

from __future__ import annotations

import io
import json

from etils import epath

_PANELS = (
  ("reward per question", ("critic/score/mean", "critic/answer_correct/mean")),
  ("step rewards", ("critic/information_gain/mean", "critic/redundancy/mean",
                    "critic/search_key/mean")),
  ("held-out", ("val/em", "val/f1")),
  ("searches per question", ("env/searches_per_question",)),
  ("KL to the reference", ("critic/kl",)),
  ("entropy", ("actor/entropy",)),
)
_PHASES = ("gen", "reward", "adv", "update")


def read_metrics(path: epath.Path) -> list[dict]:
  """Records of a `metrics.jsonl`, oldest first."""
  return [json.loads(line) for line in path.read_text().splitlines()]


def learning_curves(workdir: epath.PathLike) -> epath.Path | None:
  """Draws `curves.png` into the run folder.

  Returns:
    The picture's path, or None when there is nothing to draw.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  workdir = epath.Path(workdir)
  records = read_metrics(workdir / "metrics.jsonl")
  if not records:
    return None
  figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
  for axis, (title, names) in zip(axes.flat, _PANELS, strict=False):
    for name in names:
      points = [(r["step"], r[name]) for r in records if name in r]
      if points:
        marker = "o" if len(points) < 20 else ""
        axis.plot(*zip(*points, strict=True), label=name, marker=marker)
    axis.set_title(title)
    axis.set_xlabel("step")
    if axis.lines:
      axis.legend(fontsize=8)
  seconds = axes.flat[len(_PANELS)]
  records = [r for r in records if "timing_s/gen" in r]
  steps = [r["step"] for r in records]
  seconds.stackplot(
    steps,
    [[r.get(f"timing_s/{p}", 0.0) for r in records] for p in _PHASES],
    labels=_PHASES,
  )
  seconds.set_title("seconds per step")
  seconds.set_xlabel("step")
  seconds.legend(fontsize=8)
  axes.flat[-1].axis("off")
  picture = io.BytesIO()
  figure.savefig(picture, format="png", dpi=100)
  plt.close(figure)
  path = workdir / "curves.png"
  path.write_bytes(picture.getvalue())
  return path
