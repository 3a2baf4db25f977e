"""What a finished run tells of its steps, from a log written by hand."""

import json

import pytest
from bench import sizes

from configs import quickstart
from stepsearch_jax.bench import training
from stepsearch_jax.run import settings

RECORD = {
  "perf/compilations": 0.0, "perf/tokens_per_second": 500.0,
  "perf/total_num_tokens": 640.0, "response_length/mean": 3.0,
  "timing_s/step": 8.0, "timing_s/update": 6.0, "timing_s/ref": 0.5,
  "timing_s/old_log_prob": 0.5, "timing_s/values": 0.5,
}
# A layer: q 16x16, k and v 16x8 each, o 16x16, three of 16x24, norms of 16.
LAYER = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16
# 64 trajectories of 10 tokens; two products of 2 x 16 x 5 each in attention.
READ = 640 * (2 * LAYER + 2 * 2 * 16 * 5)
WRITTEN = 64 * 3 * 2 * 16 * 512  # Tokens times the vocabulary's matrix.


def test_work_is_counted_as_by_hand():
  found = training.step_flops(RECORD, sizes.MODEL, 64, epochs=2)
  policy = READ + WRITTEN
  assert found == {
    "rollout": policy, "scores": 2 * policy + READ,
    "update": 6 * (policy + READ),
  }


@pytest.mark.parametrize("absent, scores", [
  ("values", 2 * (READ + WRITTEN)), ("old_log_prob", 2 * READ + WRITTEN)
])
def test_a_model_that_scored_nothing_counts_for_nothing(absent, scores):
  record = {k: v for k, v in RECORD.items() if k != f"timing_s/{absent}"}
  found = training.step_flops(record, sizes.MODEL, 64, epochs=1)
  assert found["scores"] == scores
  trained = 1 + (absent != "values")
  assert found["update"] == 3 * (trained * READ + WRITTEN)


@pytest.fixture
def run(tmp_path):
  """A folder with config and log of a quickstart run of 25 steps."""
  config = settings.Settings.from_config(quickstart.get_config()).config
  (tmp_path / "config.json").write_text(json.dumps({"config": config}))
  records = [{"step": 0, "val/em": 0.5}] + [
    RECORD | {"step": i, "timing_s/step": 8.0 if i > 4 else 900.0}
    for i in range(1, 26)
  ]
  (tmp_path / "metrics.jsonl").write_text(
    "".join(json.dumps(record) + "\n" for record in records)
  )
  return tmp_path


def test_steps_stand_beside_their_own_arithmetic(run, monkeypatch):
  monkeypatch.setattr(training, "gemm_rate", lambda side: 2e9)
  monkeypatch.setattr(
    training.arithmetic, "model_shape", lambda config: sizes.MODEL
  )
  found = {r.what: r for r in training.readings(str(run))}
  assert list(found) == [
    "recompilations after warm-up",
    "rollout, sampled and ingested tokens a second",
    "step beside its own arithmetic", "update beside its own arithmetic",
    "float32 matrix product",
  ]
  step = found["step beside its own arithmetic"]
  assert step.goal == "at most 1.8, aim 1.4"
  assert step.work == (
    f"20 training steps of {run.name}, 64 trajectories each"
  )
  flops = 6 * (READ + WRITTEN) + 4 * READ
  assert step.read() == pytest.approx(8.0 * 2e9 / flops)
  update = found["update beside its own arithmetic"]
  assert update.read() == pytest.approx(
    6.0 * 2e9 / (3 * (2 * READ + WRITTEN))
  )
  assert found["float32 matrix product"].read() == 2.0


def test_the_machines_rate_is_taken_where_the_reading_is(run, monkeypatch):
  monkeypatch.setattr(training, "_SIDE", 64)
  readings = {r.what: r for r in training.readings(str(run))}
  assert readings["float32 matrix product"].read() > 0
  assert readings["step beside its own arithmetic"].read() > 0
