"""Imitation that is stopped and goes on learns what one run learns."""

import jax
import numpy as np
import pytest
from ppo import learner_test

from stepsearch_jax.parallel import sharding
from stepsearch_jax.run import live, warm_start
from stepsearch_jax.run.interrupts import Interrupts, PreemptedError
from stepsearch_jax.sft import imitation


@pytest.fixture(autouse=True)
def optax_promotes():
  """Optax raises floats to integer powers, which strict promotion forbids."""
  with jax.numpy_dtype_promotion("standard"):
    yield


ABOUT = {"steps": 7, "habits": (1, 2)}


class StopsAfter(warm_start.Keeper):
  """A keeper whose run is asked to stop after some step."""

  def __init__(self, folder, step=None, about=ABOUT):
    self.asked, self.seen = Interrupts(), []
    super().__init__(folder, about, self.asked)
    self._step = step

  def after_step(self, progress):
    self.seen.append(progress.step)
    self.asked.requested = progress.step == self._step
    super().after_step(progress)


def imitate(keeper=None):
  return imitation.imitate(
    learner_test.models()[0], learner_test.make_batch(0), learner_test.MODEL,
    sharding.make_mesh(), imitation.ImitationSpec(7, 2, 48, 1e-2, 0), keeper,
  )


def stopped(folder, step):
  keeper = StopsAfter(folder, step)
  with pytest.raises(PreemptedError, match=f"after step {step} of the warm"):
    imitate(keeper)
  keeper._manager.close()
  return keeper


def test_a_stopped_warm_start_goes_on_bit_for_bit(tmp_path):
  whole, losses = imitate()
  assert stopped(tmp_path, 2).seen == [1, 2]
  assert stopped(tmp_path, 5).seen == [3, 4, 5]
  last = StopsAfter(tmp_path)
  params, rest = imitate(last)
  last.close()
  assert last.seen == [6, 7] and rest == losses[5:]
  jax.tree.map(np.testing.assert_array_equal, params, whole)
  warm_start.forget(tmp_path)
  assert not (tmp_path / "warm_start").exists()


def test_progress_of_other_settings_or_a_damaged_one_does_not_count(
  tmp_path, caplog
):
  stopped(tmp_path, 2)
  other = StopsAfter(tmp_path, about=ABOUT | {"steps": 8})
  imitate(other)
  other.close()
  assert other.seen[0] == 1 and "other settings" in caplog.text
  stopped(tmp_path, 3)
  for file in (tmp_path / "warm_start/3").rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:20])
  again = StopsAfter(tmp_path)
  imitate(again)
  again.close()
  assert again.seen[0] == 1


def test_progress_is_kept_from_time_to_time(tmp_path, monkeypatch):
  monkeypatch.setattr(warm_start, "_KEEP_SECONDS", -1.0)
  keeper = StopsAfter(tmp_path)
  imitate(keeper)
  keeper.close()
  assert [p.name for p in (tmp_path / "warm_start").iterdir()] == ["7"]


def test_the_warm_start_shows_itself(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(warm_start, "_SHOWN_EVERY", 3)
  keeper = StopsAfter(tmp_path)
  _, losses = imitate(keeper)
  keeper.close()
  # The loss of the step before, which has come back already.
  shown = [
    line.partition(" left")[0] for line in capsys.readouterr().err.splitlines()
    if line.startswith("warm start ")
  ]
  assert shown == [
    f"warm start {step}/7 loss {live.short(losses[step - 2])}"
    for step in (3, 6, 7)
  ]


def test_the_loss_is_the_mean_over_policy_tokens_only():
  batch = learner_test.make_batch(0, lengths=[30, 41])
  params = learner_test.models()[0]
  _, losses = imitation.imitate(
    params, batch, learner_test.MODEL, sharding.make_mesh(),
    imitation.ImitationSpec(1, 2, 48, 1e-2, 0),
  )
  on = batch.policy_mask > 0
  logp, _ = learner_test.logps(params, batch)
  assert losses[0] == pytest.approx(-np.asarray(logp)[on].mean(), rel=1e-4)
  assert 0 < on.sum() < batch.lengths.sum()


def test_the_seed_fixes_the_order_of_the_rows():
  def order(seed):
    micros = imitation._micros(learner_test.make_batch(0), 4, 1, 48, seed)
    return np.stack([micro.tokens for micro in micros])

  np.testing.assert_array_equal(order(1), order(1))
  assert (order(1) != order(2)).any()
