"""The steps that are compared: one batch for both sides, and what is shared."""

import types as python_types

import jax
import numpy as np
import pytest
from bench import sizes

from stepsearch_jax import bench
from stepsearch_jax.bench import peers, update, workload
from stepsearch_jax.models import attention
from stepsearch_jax.ppo import learner

TEMPLATE = workload.Template(prompt=40, common=33)


@pytest.fixture(autouse=True)
def promotion():
  with jax.numpy_dtype_promotion("standard"):  # As outside of tests.
    yield


def replays(rollouts=1):
  return workload.behind(
    [workload.Replay(9, ((4, 30), (3, 0)))] * 8, TEMPLATE, rollouts
  )


def test_rows_begin_with_their_prompts_and_groups_follow_questions():
  batch = update.batch_of(replays(4), 512)
  prompts = workload.prompts(replays(4), 512)
  np.testing.assert_array_equal(batch.tokens[:, :40], prompts)
  assert batch.group.tolist() == [0] * 4 + [1] * 4
  assert not batch.policy_mask[:, :40].any()
  assert batch.policy_mask[0, 40:].tolist() == [1] * 4 + [0] * 30 + [1] * 3
  # What was observed and sampled is each trajectory's own.
  assert len({row.tobytes() for row in batch.tokens[:, 40:]}) == 8
  assert update.batch_of(replays(), 512).group.tolist() == list(range(8))


@pytest.mark.parametrize("longest, length", [
  (77, 2048), (2048, 2048), (2049, 2176)
])
def test_packed_rows_hold_the_longest_trajectory(longest, length):
  batch = python_types.SimpleNamespace(tokens=np.zeros((1, longest)))
  assert update.row_length(batch) == length


@pytest.mark.slow
def test_the_learner_beside_ours_packs_without_prefixes_and_scores_the_same():
  batch, logps = update.batch_of(replays(8), 512), []
  for kind, shared in ((learner.Learner, 40), (update.WholeLearner, 0)):
    ours = update.Ours(
      sizes.MODEL, peers.policy(sizes.MODEL), batch, "grpo", 1, 640, kind
    )
    packings, packer = [], ours._learner._packer
    packing = packer.packing
    packer.packing = lambda *given, packing=packing, seen=packings, **named: (
      seen.append(packing(*given, **named)) or seen[-1]
    )
    logps.append(ours.step())
    assert len(packings) == 2  # Of the scores and of the update.
    for found in packings:
      assert (found.segment_ids == attention.PREFIX).sum() == shared
  assert (logps[0][batch.policy_mask > 0] < 0).all()
  np.testing.assert_allclose(*logps, atol=1e-4)


class Torch:
  """Stands in for `torch_ppo.TorchPpo`; its log-probabilities are zero."""

  made = []

  def __init__(self, config, params, micro_rows, checkpointing, has_value):
    assert config is sizes.MODEL and (micro_rows, checkpointing) == (2, True)
    self.has_value, self.batch = has_value, None
    self.made.append(self)

  def step(self, batch, advantages):
    self.batch = batch
    return np.zeros(advantages.shape)


@pytest.fixture
def duels(tmp_path, monkeypatch):
  monkeypatch.setattr(
    bench, "torch_ppo", python_types.SimpleNamespace(TorchPpo=Torch),
    raising=False,
  )
  monkeypatch.setattr(Torch, "made", [])
  return update.steps(sizes.workloads(tmp_path), sizes.MODEL)


def test_the_suite_has_every_row_with_what_was_asked(duels):
  rows = [(d.what, d.peer.split(",")[0], d.goal, d.work.partition("prompts")[2])
          for d in duels]
  template = " of 271, 244 of them common"
  assert rows == [
    ("PPO step, 32 trajectories", "ours without shared prefixes", "1.2",
     template),
    ("PPO step, 8 trajectories", "torch", "2.5, aim 3", ""),
    ("PPO step, 32 trajectories", "torch", "2.5, aim 3", ""),
    ("PPO step, 32 trajectories", "torch", "2.5, aim 3", template),
    ("GRPO step, 32 trajectories", "torch", "2.6, aim 3.2",
     f"{template}, 8 questions x 4"),
  ]


@pytest.mark.slow
def test_torch_steps_on_the_batch_of_ours(duels):
  found = list(duels)
  kinds = [type(side.__self__._learner)
           for side in (found[0].ours, found[0].theirs)]
  assert kinds == [learner.Learner, update.WholeLearner]
  for duel in found[1:]:
    duel.theirs()
  assert [torch.has_value for torch in Torch.made] == [True] * 3 + [False]
  batches = [torch.batch for torch in Torch.made]
  assert batches[2].group.tolist() == list(range(32))
  assert batches[3].group.tolist() == [i // 4 for i in range(32)]
  mine = found[4].ours()
  assert mine.shape == batches[3].tokens.shape
  with pytest.raises(ValueError, match="apart"):
    found[4].same(mine, found[4].theirs())
  broken = np.where(batches[3].policy_mask > 0, np.nan, mine)
  with pytest.raises(ValueError, match="apart"):
    found[4].same(mine, broken)
  found[4].same(mine, mine)


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_torch_computes_the_steps_of_ours(estimator):
  pytest.importorskip("torch")
  found = update._step_duel(
    sizes.MODEL, peers.policy(sizes.MODEL), replays(4), estimator, ""
  )
  mine, theirs = found.ours(), found.theirs()
  found.same(mine, theirs)
  np.testing.assert_allclose(mine, theirs, atol=1e-4)
