"""Collapse alarms, NaN location, and what a run does about them."""

import types as builtin

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_test
from etils import epath

from stepsearch_jax import cli, train
from stepsearch_jax.ppo import learner as learner_lib
from stepsearch_jax.run import checkpoints, metrics, signs
from stepsearch_jax.run import monitor as sentinel
from stepsearch_jax.run.settings import Settings

LIMITS = signs.Limits(
  invalid_share=0.9, unanswered_share=0.9, entropy=0.01, kl=1.0, grad_norm=10.0,
  reward_drop=0.3, searches=0.1, clipped_share=0.4, kl_growth=9.0,
  explained_variance=0.0, settling=20, differing_share=0.05, patience=2,
)
HEALTHY = {
  "env/invalid_share": 0.1, "env/unanswered_share": 0.1, "actor/entropy": 0.5,
  "critic/kl": 0.01, "actor/grad_norm": 1.0, "critic/score/mean": 0.6,
}


@pytest.mark.parametrize("name, value", [
  ("env/invalid_share", 0.95), ("env/unanswered_share", 1.0),
  ("actor/entropy", 0.001), ("critic/kl", 2.0), ("actor/grad_norm", 11.0),
  ("critic/score/mean", 0.2),
])
def test_a_limit_broken_for_patience_steps_is_an_alarm(name, value):
  guard = sentinel.Sentinel(LIMITS)
  assert guard.observe(1, HEALTHY) == []
  assert guard.observe(2, HEALTHY | {name: value}) == []
  (alarm,) = guard.observe(3, HEALTHY | {name: value})
  assert name in alarm.message and alarm.since == 2
  assert guard.observe(4, HEALTHY) == []
  assert guard.observe(5, HEALTHY | {name: value}) == []  # A new streak.


def test_an_interrupted_sentinel_counts_on():
  guard = sentinel.Sentinel(LIMITS)
  guard.observe(1, HEALTHY)
  guard.observe(2, HEALTHY | {"critic/kl": 2.0})
  resumed = sentinel.Sentinel(LIMITS, guard.state)
  assert resumed.observe(3, HEALTHY | {"critic/kl": 2.0})[0].since == 2


def test_first_nonfinite_names_the_first_tensor_in_flow_order():
  tree = {"a": jnp.ones(3), "b": {"c": jnp.array([1.0, np.nan])}}
  found = sentinel.first_nonfinite(
    rewards=jnp.zeros(2), policy=tree, value={"d": jnp.array([np.inf])}
  )
  assert found == "policy/b/c"
  assert sentinel.first_nonfinite(rewards=jnp.zeros(2), value=None) == ""


# What an untrained policy does is no collapse here; gradient norms are.
LOOSE = dict(
  patience=1, invalid_share=1.0, unanswered_share=1.0, entropy=0.0, kl=1e9,
  reward_drop=1e9,
)


def spike_at(calls, when, seen):
  """An update whose reported gradient norm explodes at some calls."""
  update = learner_lib.Learner.update

  def patched(self, state, experience, lr_scale=1.0):
    calls.append(lr_scale)
    state, metrics = update(self, state, experience, lr_scale)
    seen.append(float(metrics["actor/lr"]))
    if len(calls) in when:
      metrics["actor/grad_norm"] = 1e6
    return state, metrics

  return patched


@pytest.mark.slow
def test_rollback_goes_back_and_on_with_a_lower_rate(tmp_path, monkeypatch):
  config = train_test.tiny()
  config.sentinel.update(action="rollback", **LOOSE)
  calls, rates = [], []
  monkeypatch.setattr(
    learner_lib.Learner, "update", spike_at(calls, {2}, rates)
  )
  workdir = epath.Path(tmp_path)
  with jax.numpy_dtype_promotion("standard"):
    train.train(config, workdir)
  # Step 2 exploded, the run went back to step 1 and did step 2 again.
  assert calls == [1.0, 1.0, 0.5]
  np.testing.assert_allclose(rates[2], 0.5 * rates[1], rtol=1e-6)
  assert [r["step"] for r in train_test.records(workdir)] == [0, 1, 2]
  assert len(sentinel.Rollbacks(workdir / "rollbacks.json")) == 1


def test_a_rollback_counts_from_when_it_is_noted(tmp_path):
  path = epath.Path(tmp_path) / "rollbacks.json"
  ours = sentinel.Rollbacks(path)
  assert (len(ours), ours.pending) == (0, None)
  ours.begin(7)
  killed = sentinel.Rollbacks(path)  # Before the checkpoint was read.
  assert (len(killed), killed.pending) == (1, 7)
  killed.finish()
  after = sentinel.Rollbacks(path)
  assert (len(after), after.pending) == (1, None)
  after.begin(9, write=False)  # A process that is not the first.
  assert len(sentinel.Rollbacks(path)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["noted", "rewound", "metrics cut"])
def test_a_kill_inside_a_rollback_changes_nothing(
  tmp_path, monkeypatch, moment
):
  """Three writes make a rollback; the run dies behind each of them."""
  config = train_test.tiny()
  config.sentinel.update(action="rollback", **LOOSE)
  ours = epath.Path(tmp_path)
  calls = []
  whole = {
    "noted": (checkpoints.Checkpointer, "rewind"),
    "rewound": (sentinel.Rollbacks, "finish"),
    "metrics cut": (metrics.MetricsWriter, "rewind"),
  }[moment]
  with jax.numpy_dtype_promotion("standard"):
    with monkeypatch.context() as patch:
      patch.setattr(
        learner_lib.Learner, "update", spike_at(calls, {2}, [])
      )
      original = getattr(*whole)

      def dies(self, *args):
        if len(calls) == 2:
          if moment == "metrics cut":
            original(self, *args)
          raise KeyboardInterrupt
        return original(self, *args)

      patch.setattr(*whole, dies)
      with pytest.raises(KeyboardInterrupt):
        train.train(config, ours)
    monkeypatch.setattr(
      learner_lib.Learner, "update", spike_at(calls, set(), [])
    )
    train.train(config, ours)
  # Step 2 exploded and is done again at half the rate, however it died.
  assert calls == [1.0, 1.0, 0.5]
  assert [r["step"] for r in train_test.records(ours)] == [0, 1, 2]
  assert len(sentinel.Rollbacks(ours / "rollbacks.json")) == 1


@pytest.mark.slow
def test_halt_stops_with_the_reason_and_the_step_that_shows_it(
  tmp_path, monkeypatch
):
  config = train_test.tiny()
  config.sentinel.update(action="halt", **LOOSE)
  monkeypatch.setattr(learner_lib.Learner, "update", spike_at([], {1}, []))
  with jax.numpy_dtype_promotion("standard"):
    with pytest.raises(
      sentinel.CollapseError, match=r"norm 1e\+06 .* \(actor/grad_norm\)"
    ):
      train.train(config, epath.Path(tmp_path))
  assert sentinel.CollapseError in cli._USER_ERRORS
  last = train_test.records(epath.Path(tmp_path))[-1]
  assert (last["step"], last["actor/grad_norm"]) == (1, 1e6)


def test_a_halted_job_writes_its_step_and_closes_its_files(monkeypatch):
  config = train_test.tiny()
  config.sentinel.update(action="halt", **LOOSE)
  happened = []

  class Part:
    def write(self, step, values):
      happened.append((step, values))

    def close(self):
      happened.append("closed")

  part = Part()
  settings = Settings.from_config(config)
  job = train.Job.__new__(train.Job)
  job.__dict__.update(
    experiment=builtin.SimpleNamespace(settings=settings, engine=part),
    profiler=part, writer=part, saver=part, view=part, clock=part, rollbacks=(),
    sentinel=sentinel.Sentinel(settings.monitor.limits),
    state=builtin.SimpleNamespace(step=7),
  )
  with pytest.raises(sentinel.CollapseError):
    job.has_collapsed(HEALTHY | {"actor/grad_norm": 1e6})
  assert happened[0] == (7, HEALTHY | {"actor/grad_norm": 1e6})
  assert happened[1:] == ["closed"] * 6


@pytest.mark.slow
def test_nan_is_located_and_nothing_of_it_saved(tmp_path, monkeypatch):
  update = learner_lib.Learner.update

  def poisoned(self, state, experience, lr_scale=1.0):
    state, metrics = update(self, state, experience, lr_scale)
    policy = jax.tree.map(lambda x: x, state.policy)
    norm = policy.params["trunk"]["final_norm"]
    norm["scale"] = norm["scale"].at[0].set(jnp.nan)
    return state.replace(policy=policy), metrics | {"actor/param_norm": np.nan}

  monkeypatch.setattr(learner_lib.Learner, "update", poisoned)
  workdir = epath.Path(tmp_path)
  with jax.numpy_dtype_promotion("standard"):
    with pytest.raises(
      RuntimeError,
      match="step 1: metric actor/param_norm is nan, first in tensor "
            "policy/trunk/final_norm/scale",
    ):
      train.train(train_test.tiny(), workdir)
  steps = [p.name for p in (workdir / "checkpoints").iterdir()]
  assert steps == ["0"]
