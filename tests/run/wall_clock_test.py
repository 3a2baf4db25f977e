"""Where the time of a run went, by a clock that the test turns."""

import jax
import jax.numpy as jnp
import pytest

from stepsearch_jax.run import wall_clock


@pytest.fixture
def now(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(wall_clock.time, "monotonic", lambda: now[0])
  return now


def run(now, folder, *spans, compiled=0.0):
  """One start: (what, seconds, step or None) one after the other."""
  clock = wall_clock.WallClock(folder)
  for what, seconds, step in spans:
    now[0] += seconds
    clock._compilations.seconds += compiled
    clock.lap(what, step)
  return clock


def test_every_second_is_somewhere_and_steps_done_twice_are_repeated(
  tmp_path, now
):
  run(now, tmp_path, ("start", 4, None), ("evaluation", 6, None),
      ("step", 10, 1), ("checkpoint", 2, None), ("step", 10, 2),
      ("step", 8, 3))  # And killed.
  now[0] += 1e6  # Nobody's time.
  run(now, tmp_path, ("start", 5, None), ("step", 10, 2), ("step", 10, 3),
      ("rollback", 1, None), ("step", 10, 3))
  clock = run(now, tmp_path, ("step", 14, 4), ("evaluation", 10, None))
  found = clock.summary(4)
  assert found.pop("wall_seconds") == 100
  assert found == pytest.approx({
    "goodput": 0.44, "share_start": 0.09, "share_evaluation": 0.16,
    "share_checkpoint": 0.02, "share_repeated": 0.28, "share_rollback": 0.01,
  })
  assert sum(found.values()) == pytest.approx(1)


def test_steps_behind_the_end_were_in_vain():
  rows = [{"what": "step", "seconds": 2.0, "step": step} for step in (1, 2, 3)]
  assert wall_clock.spent(rows, 2) == {"step": 4.0, "repeated": 2.0}


def test_compiling_is_taken_out_of_the_span_that_it_is_in(tmp_path, now):
  clock = run(now, tmp_path, ("step", 10, 1), compiled=4.0)
  assert clock.summary(1) == {
    "wall_seconds": 10, "goodput": 0.6, "share_compile": 0.4
  }
  side_by_side = run(now, tmp_path / "b", ("start", 10, None), compiled=16.0)
  assert side_by_side.summary(0)["share_compile"] == 1.0


def test_programs_that_jax_compiles_count(tmp_path):
  clock = wall_clock.WallClock(tmp_path)
  jax.jit(lambda x: x * 3 - 1)(jnp.ones(7)).block_until_ready()
  clock.lap("step", 1)
  assert 0 < clock.summary(1)["share_compile"] < 1
  clock.close()
  assert [row["what"] for row in clock._log.rows()] == [
    "step", "compile", "end"
  ]


def test_a_process_that_must_not_write_does_not(tmp_path):
  clock = wall_clock.WallClock(tmp_path, active=False)
  clock.lap("start")
  clock.close()
  assert clock.summary(1) == {} and list(tmp_path.iterdir()) == []
