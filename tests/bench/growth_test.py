"""The axes along which a step is measured."""

import jax
import pytest
from bench import sizes

from stepsearch_jax.bench import growth, workload


@pytest.fixture
def axes():
  return {item.axis: item for item in growth.growths(None)}


def test_rollouts_per_question_grow_and_questions_do_not(axes):
  assert list(axes) == [
    "trajectories", "context", "turns", "rollouts per question"
  ]
  grown = axes["rollouts per question"]
  assert grown.goal == "1"
  for rollouts, replays in grown.points:
    asked = workload.questions(replays)
    assert asked.tolist() == [i // rollouts for i in range(32 * rollouts)]
    assert {(r.prompt, r.common) for r in replays} == {(271, 244)}
    assert {len(r.turns) for r in replays} == {3}
  assert [n for n, _ in grown.points] == [1, 2, 4, 8]


@pytest.mark.slow
def test_a_point_is_played_scored_and_trained_on(axes, monkeypatch):
  monkeypatch.setattr(growth, "small_decoder", lambda: sizes.MODEL)
  monkeypatch.setattr(growth, "_SLOTS", 2)
  grown = axes["rollouts per question"]
  grown.points = [(n, growth._grouped(n)) for n in (1, 2)]
  with jax.numpy_dtype_promotion("standard"):  # As outside of tests.
    (found,) = grown.measure(1)
  assert [p["rollouts per question"] for p in found["points"]] == [1, 2]
  assert all(p[phase] > 0 for p in found["points"]
             for phase in ("rollout", "scores", "update"))
  assert found["value"] == found["exponents"]["step"]
