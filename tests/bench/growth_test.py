"""The axes along which a step is measured."""

import pytest

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
