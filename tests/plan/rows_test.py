"""Rows that a step computes, counted by hand and beside the learner's own."""

import numpy as np
import pytest
from ppo import parts

from configs import stepsearch_qwen2_5_3b
from stepsearch_jax.parallel import sharding
from stepsearch_jax.plan import arithmetic, machines, rows
from stepsearch_jax.ppo import packer


def counted(trajectories, tokens, shards=4, **changes):
  # Micro-batches of 16 rows and, on four data shards, tails of 4.
  spec = parts.learner_spec(
    batch__mini_batch=32, batch__micro_rows=16, batch__row_length=4096,
    **changes,
  )
  found = rows.of_batch(spec, trajectories, tokens, shards)
  assert {r.length for r in found.values()} == {4096}
  return {name: (r.filled, r.computed) for name, r in found.items()}


def test_full_micro_batches_have_no_padding():
  # Two trajectories fill a row, 32 a micro-batch.
  assert counted(128, 2048) == {"scores": (64, 64), "updates": (64, 64)}
  assert rows.Rows(64, 64, 4096).padding_share == 0


def test_the_last_micro_batch_of_each_mini_batch_is_padded():
  # 57 rows are 3 x 16 and 9, for which three tails do. A mini-batch has
  # 14.06 rows: 15, as much as a whole micro-batch.
  assert counted(128, 1800) == {"scores": (56.25, 60), "updates": (56.25, 64)}
  # 4.69 rows a mini-batch: two tails.
  assert counted(128, 600) == {"scores": (18.75, 20), "updates": (18.75, 32)}
  assert rows.Rows(18.75, 32, 4096).padding_share == 0.4140625
  assert rows.Rows(18.75, 32, 4096).tokens == 131_072


def test_tails_are_as_wide_as_the_data_shards():
  # On 8 of them a tail has 8 rows.
  assert counted(128, 600, shards=8) == {
    "scores": (18.75, 24), "updates": (18.75, 32)
  }


def test_a_short_last_mini_batch_is_packed_on_its_own():
  # 32 trajectories are 4.69 rows, 8 are 1.17: two tails and one.
  assert counted(40, 600)["updates"] == (5.859375, 12)


def test_a_mean_over_micro_batches_wants_whole_ones():
  found = counted(128, 600, loss__micro_weighting="micro_mean")
  assert found == {"scores": (18.75, 32), "updates": (18.75, 64)}


@pytest.mark.parametrize("mesh, shards", [
  (dict(data=1, fsdp=8, tensor=2), 8),
  (dict(data=2, fsdp=2, tensor=4), 4),
  (dict(data=2, fsdp=4, tensor=1, rules="batch=data"), 2),
])
def test_rows_are_split_as_the_mesh_says(mesh, shards):
  assert sharding.batch_shards(sharding.abstract_mesh(**mesh)) == shards


@pytest.mark.parametrize("scope", ["policy", "attended"])
@pytest.mark.parametrize("count, micro_rows", [(10, 4), (9, 8), (16, 4)])
def test_the_learner_pads_as_planned(count, micro_rows, scope):
  # Halves of a row, so that packing is perfect.
  length, width = 32, 16
  spec = parts.learner_spec(
    batch__row_length=length, batch__micro_rows=micro_rows,
    batch__mini_batch=count, estimator__scope=scope,
  )
  mesh = sharding.make_mesh()
  # Every token the policy's: nothing to share.
  batch = parts.rollout_batch(np.ones((count, width)))
  packing = packer.Packer(spec, mesh).packing(batch, range(count))
  for found in rows.of_batch(
    spec, count, width, sharding.batch_shards(mesh)
  ).values():
    assert found.computed == len(packing.source)
    np.testing.assert_allclose(found.padding_share, packing.padding_share)


def test_scores_and_updates_compute_the_padding_too():
  config = stepsearch_qwen2_5_3b.get_config()
  machine = machines.parse_topology("v5e:4x4")
  arithmetic.resolve_mesh(config, machine.chips)
  tokens = 600
  phases = arithmetic.step_times(config, machine, tokens, 0.15)
  # Each token meets all parameters and, in 36 layers of 16 x 128, half its
  # trajectory: twice a multiplication and an addition.
  token = 2 * 3_085_938_688 + 4 * 36 * 16 * 128 * tokens / 2
  # Eight data shards: 24 and 32 rows, as above.
  np.testing.assert_allclose(phases["scores"]["flops"], 3 * 24 * 4096 * token)
  np.testing.assert_allclose(
    phases["updates"]["flops"], 2 * 4 * 32 * 4096 * token
  )
  # A rollout has no rows to fill.
  np.testing.assert_allclose(
    phases["rollout extend"]["flops"], 128 * tokens * 0.85 * token
  )
  config.ppo.epochs, config.ppo.old_logp = 2, "rollout"
  changed = arithmetic.step_times(config, machine, tokens, 0.15)
  for phase, factor in (("updates", 2), ("scores", 2 / 3)):
    np.testing.assert_allclose(
      changed[phase]["flops"], factor * phases[phase]["flops"]
    )
