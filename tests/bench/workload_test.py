"""What the trajectories of a workload share, and what stays as recorded."""

import numpy as np
import pytest

from stepsearch_jax.bench import workload
from stepsearch_jax.bench.workload import STEPSEARCH, Replay

VOCAB = 49_152


def common(one, other):
  """Tokens that two prompts begin with."""
  size = min(len(one), len(other))
  return int(np.append(one[:size] == other[:size], False).argmin())


@pytest.mark.parametrize("rollouts", [1, 4])
def test_prompts_share_the_template_and_a_questions_rollouts_all(rollouts):
  replays = workload.behind(workload.made_up(12), STEPSEARCH, rollouts)
  prompts = workload.prompts(replays, VOCAB)
  assert [len(p) for p in prompts] == [271] * 12
  for i in range(12):
    for j in range(i):
      same = i // rollouts == j // rollouts
      assert common(prompts[i], prompts[j]) == (271 if same else 244)


def test_recorded_prompts_share_nothing():
  replays = workload.made_up(6)
  prompts = workload.prompts(replays, VOCAB)
  assert [len(p) for p in prompts] == [r.prompt for r in replays]
  assert all(common(prompts[i], prompts[j]) == 0
             for i in range(6) for j in range(i))


def test_prompts_are_the_same_in_every_call_and_no_padding():
  replays = workload.behind(workload.made_up(4), STEPSEARCH, 2)
  one, other = (workload.prompts(replays, VOCAB) for _ in range(2))
  np.testing.assert_array_equal(one, other)
  assert min(p.min() for p in workload.prompts(replays, 2)) == 1
  assert one[0].dtype == np.int32


def test_turns_stay_as_recorded_behind_other_prompts(shared):
  recorded = workload.load(str(shared / "bench/workload.json"), 32)
  replays = workload.behind(recorded, STEPSEARCH, 4)
  assert [r.turns for r in replays] == [r.turns for r in recorded]
  assert sum(r.generated for r in replays) == 4468
  # 35,350 tokens with prompts of 4,846 in all.
  assert sum(r.total for r in replays) == 35350 - 4846 + 32 * 271
  assert workload.describe(recorded) == (
    "32 trajectories, 35350 tokens, 4468 of them sampled"
  )
  assert workload.describe(replays) == (
    "32 trajectories, 39176 tokens, 4468 of them sampled, prompts of 271, "
    "244 of them common, 8 questions x 4"
  )
  alone = workload.describe(workload.behind(recorded, STEPSEARCH))
  assert alone.endswith("prompts of 271, 244 of them common")


def test_questions_are_numbered_in_the_order_of_their_appearance():
  replays = [Replay(5, (), question=q) for q in (7, None, 7, 1, None)]
  assert workload.questions(replays).tolist() == [0, 1, 0, 2, 3]
  grouped = workload.behind(workload.made_up(6), STEPSEARCH, 3)
  assert workload.questions(grouped).tolist() == [0, 0, 0, 1, 1, 1]


def test_questions_of_too_few_trajectories_are_an_error():
  with pytest.raises(ValueError, match="6 trajectories .* groups of 4"):
    workload.behind(workload.made_up(6), STEPSEARCH, 4)
