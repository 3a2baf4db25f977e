"""How a training step's time grows with the work, and with nothing else."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from stepsearch_jax.bench import replay, update, workload
from stepsearch_jax.models import decoder, heads

_SLOTS = 32
_MICRO_TOKENS = 8192
_PHASES = ("rollout", "scores", "update")


@dataclasses.dataclass
class Growth:
  """Step time along one axis, everything else held.

  Attributes:
    what, work, goal: see `duel.Duel`.
    axis: name of what grows.
    points: (its value, the workload).
  """

  what: str
  work: str
  axis: str
  points: list[tuple[int, list[workload.Replay]]]
  goal: str = "1"

  def measure(self, repeats: int, before: dict | None = None) -> Iterator[dict]:
    """Medians at every point, exponents in tokens; see `duel.Reading`."""
    if before:
      return
    config = small_decoder()
    params = heads.init_policy(config, jax.random.key(0))
    rows = []
    for value, replays in tqdm.tqdm(self.points, desc=self.what, leave=False):
      step = _Step(config, params, replays)
      step.seconds()  # Compiles.
      found = [step.seconds() for _ in range(repeats)]
      rows.append({
        self.axis: value,
        "tokens": sum(r.total for r in replays),
        **{p: statistics.median(f[p] for f in found) for p in _PHASES},
        "step": statistics.median(sum(f.values()) for f in found),
      })
    yield {
      "what": self.what, "work": self.work, "goal": self.goal,
      "unit": "exponent", "axis": self.axis, "points": rows,
      "exponents": {p: exponent(rows, p) for p in (*_PHASES, "step")},
      "value": exponent(rows, "step"),
    }


def exponent(rows: list[dict], phase: str) -> float:
  """Slope of log seconds over log tokens, by least squares."""
  tokens, seconds = (
    np.log([row[name] for row in rows]) for name in ("tokens", phase)
  )
  return float(np.polyfit(tokens, seconds, 1)[0])


def small_decoder() -> decoder.DecoderConfig:
  """A model small enough for 256 trajectories on a CPU."""
  return decoder.DecoderConfig(
    family="qwen2", vocab_size=2048, hidden_size=128, intermediate_size=256,
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, qkv_bias=True,
    dtype=jnp.float32,
  )


class _Step:
  """Rollout, scores and update of one workload."""

  def __init__(self, config, params, replays):
    self._rollout = replay.Ours(config, params, replays, _SLOTS)
    batch = update.batch_of(replays, config.vocab_size)
    length = update.row_length(batch)
    self._learner = update.Ours(
      config, params, batch, "gae", _MICRO_TOKENS // length, length
    )

  def seconds(self) -> dict[str, float]:
    """Of each phase."""
    clock = [time.perf_counter()]
    self._rollout.play()
    clock.append(time.perf_counter())
    experience = self._learner.scores()
    clock.append(time.perf_counter())
    self._learner.update(experience)
    clock.append(time.perf_counter())
    return dict(zip(_PHASES, np.diff(clock).tolist(), strict=True))


def _even(count: int, turns: int, observed: int) -> list[workload.Replay]:
  """Trajectories that search `turns - 1` times and differ a little."""
  rng = np.random.default_rng(0)

  def near(length):
    return int(rng.integers(round(0.8 * length), length + 1))

  return [
    workload.Replay(
      150, (*((near(70), near(observed)) for _ in range(turns - 1)),
            (near(16), 0)),
    )
    for _ in range(count)
  ]


def _context(length: int) -> list[workload.Replay]:
  """32 trajectories of about `length` tokens in three turns."""
  return _even(32, 3, max((length - 150 - 2 * 70 - 16) // 2, 16))


def _grouped(rollouts: int) -> list[workload.Replay]:
  """32 questions in three turns each, asked `rollouts` times.

  Each point has the same questions, and already the first fills all slots, so
  that the others gain by what they share and by nothing else.
  """
  return workload.behind(
    _even(_SLOTS * rollouts, 3, 150), workload.STEPSEARCH, rollouts
  )


def growths(path: str | None) -> Iterator[Growth]:
  """Step time against trajectories, context, turns and rollouts per question.

  Args:
    path: unused; the workloads are made up.
  """
  del path
  shape = "2-layer model of width 128, 32 slots"
  yield Growth(
    "step time against tokens, more trajectories",
    f"8 to 256 trajectories of three turns; {shape}", "trajectories",
    [(n, _even(n, 3, 150)) for n in (8, 16, 32, 64, 128, 256)],
  )
  yield Growth(
    "step time against tokens, longer contexts",
    f"32 trajectories of 512 to 4096 tokens; {shape}", "context",
    [(n, _context(n)) for n in (512, 1024, 2048, 4096)],
    goal="1, attention aside",
  )
  yield Growth(
    "step time against tokens, more turns",
    f"32 trajectories of 1 to 8 turns; {shape}", "turns",
    [(n, _even(32, n, 150)) for n in (1, 2, 4, 8)],
    goal="1, attention aside",
  )
  yield Growth(
    "step time against tokens, more rollouts per question",
    f"32 questions x 1 to 8 rollouts of three turns; {shape}",
    "rollouts per question",
    [(n, _grouped(n)) for n in (1, 2, 4, 8)],
  )
