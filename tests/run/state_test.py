"""What a run remembers of its evaluations, and what a checkpoint holds."""

from stepsearch_jax.run.state import RunState


def test_the_first_evaluation_is_the_baseline_and_the_best_is_kept():
  state = RunState(0, learner=None)
  for step, em in ((0, 0.2), (3, 0.5), (6, 0.5), (9, 0.4)):
    state.step = step
    state.note_evaluation({"em": em, "f1": em + 0.1})
  assert state.baseline == {"em": 0.2, "f1": 0.2 + 0.1}
  assert state.latest["em"] == 0.4
  assert state.best == {"step": 3, "em": 0.5}  # The first of two equals.


def test_progress_is_all_but_step_and_arrays():
  state = RunState(4, learner="arrays", asked=12, seconds=1.5)
  assert RunState(4, "arrays", **state.progress()) == state
  assert state.progress()["asked"] == 12
  assert not {"step", "learner"} & set(state.progress())
