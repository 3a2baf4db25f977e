"""The real training loop on a tiny config: runs, resumes, refuses."""

import json
import pathlib
import re
import shutil
import sys
import types as python_types

import jax
import numpy as np
import pytest
from etils import epath

from configs import musique_smollm2, quickstart
from stepsearch_jax import train, types
from stepsearch_jax.ppo import learner as learner_lib
from stepsearch_jax.retrieval.index import corpus
from stepsearch_jax.run import checkpoints, identity, interrupts, metrics, plots
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings


def tiny(**changes):
  config = quickstart.get_config("runlocal")
  config.checkpoint.every = 1
  config.warm_start.steps = 2
  config.ppo.policy_lr = 3e-4
  config.data.eval_limit = 3
  config.rollout.max_turn = 12
  config.rollout.max_turns = 2
  config.update(changes)
  return config


def records(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  timing = ("timing_s/", "perf/")
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith(timing)}
    for line in lines
  ]


def final_policy(workdir, config):
  experiment = Experiment(Settings.from_config(config), epath.Path(workdir))
  like = jax.eval_shape(experiment.initial_policy)
  return checkpoints.load_policy(workdir, like)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A whole run of two steps."""
  workdir = epath.Path(tmp_path_factory.mktemp("run"))
  with jax.numpy_dtype_promotion("standard"):
    summary = train.train(tiny(), workdir)
  return workdir, summary


@pytest.mark.slow
def test_a_run_leaves_everything_a_user_looks_for(finished):
  workdir, summary = finished
  assert {"em_before", "em_after", "f1_before", "f1_after", "steps", "seed",
          "searches_per_question", "train_seconds"} <= set(summary)
  assert json.loads((workdir / "summary.json").read_text()) == summary
  for name in ("curves.png", "step_time.png", "tensorboard",
               "config.json", "evaluations/step_000000/card.json",
               "evaluations/step_000002/card.md",
               "evaluations/step_000002/predictions.jsonl",
               "evaluations/step_000000/trajectories.jsonl"):
    assert (workdir / name).exists(), name
  steps = records(workdir)
  assert [r["step"] for r in steps] == [0, 1, 2]
  assert {"actor/pg_loss", "critic/vf_loss", "critic/kl", "actor/entropy",
          "critic/score/mean", "val/em", "response_length/clip_ratio",
          } <= set(steps[-1])
  for record in steps:
    metrics.check_finite(record["step"], record)


@pytest.mark.slow
def test_a_logged_step_says_where_its_time_went(finished):
  workdir, _ = finished
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  spent = json.loads((workdir / "summary.json").read_text())
  rest = [x for name, x in spent.items() if name.startswith("share_")]
  assert spent["goodput"] + sum(rest) == pytest.approx(1)
  for what in ("start", "warm_start", "compile", "checkpoint", "evaluation"):
    assert spent[f"share_{what}"] > 0
  assert "share_repeated" not in spent
  phases = plots.step_seconds(workdir)
  assert phases.pop("step") == [1, 2]
  for i, record in enumerate(map(json.loads, lines[1:])):
    whole = sum(record[f"timing_s/{k}"]
                for k in ("gen", "reward", "adv", "update"))
    assert whole <= record["timing_s/step"]
    assert record["perf/throughput"] > 0
    spent = [seconds[i] for seconds in phases.values()]
    assert min(spent) >= 0 and sum(spent) == pytest.approx(whole)
    assert phases["reference"][i] > 0 and phases["value"][i] > 0
  assert json.loads(lines[1])["perf/compilations"] > 0


@pytest.mark.slow
def test_a_run_that_died_resumes_to_the_same_numbers(
  finished, tmp_path, monkeypatch
):
  workdir, _ = finished
  update = learner_lib.Learner.update
  calls = []

  def dies(self, state, experience, lr_scale=1.0):
    calls.append(1)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return update(self, state, experience, lr_scale)

  broken = epath.Path(tmp_path) / "run"
  with jax.numpy_dtype_promotion("standard"):
    with monkeypatch.context() as patch:
      patch.setattr(learner_lib.Learner, "update", dies)
      with pytest.raises(KeyboardInterrupt):
        train.train(tiny(), broken)
    with monkeypatch.context() as patch:  # A resume needs no fresh weights.
      patch.delattr(Experiment, "initial_policy")
      patch.delattr(learner_lib.Learner, "start")
      train.train(tiny(), broken)
    ours, theirs = (final_policy(w, tiny())[1] for w in (broken, workdir))
  assert records(broken) == records(workdir)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_preempted_run_saves_and_goes_on_to_the_same_numbers(
  finished, tmp_path, monkeypatch
):
  workdir, _ = finished
  stop = interrupts.Interrupts()
  defer = stop.defer

  def asked_in_the_loop():
    defer()
    stop.requested = not (ours / "warm_start").exists()

  monkeypatch.setattr(stop, "defer", asked_in_the_loop)
  ours = epath.Path(tmp_path) / "run"
  config = tiny()
  config.checkpoint.every = 100  # Only the preemption saves.
  with jax.numpy_dtype_promotion("standard"):
    with pytest.raises(
      interrupts.PreemptedError, match="after step 1 and saved"
    ):
      train.train(config, ours, stop)
    train.train(config, ours)
  assert records(ours) == records(workdir)


@pytest.mark.parametrize("eos, dropped", [("trained", ()), ("dropped", (7,))])
def test_a_step_trains_the_end_token_unless_the_reward_drops_it(
  tmp_path, monkeypatch, eos, dropped
):
  config = tiny()
  config.reward.eos = eos
  part, got = python_types.SimpleNamespace, {}
  job = part(
    experiment=part(
      settings=Settings.from_config(config),
      tokenizer=part(eos_ids=(7,), pad_id=0),
    ),
    state=part(step=0, asked=0, learner=part(reference=None)), stream=None,
    profiler=metrics.Profiler(tmp_path, ()),
  )

  class GotThereError(Exception):
    pass

  def batch(*others):
    got.update(dropped=others[-1])
    raise GotThereError

  played = part(batch=part(trajectories=[], rewards=[]))
  monkeypatch.setattr(train.filling, "play_batch", lambda *others: played)
  monkeypatch.setattr(train.batching, "trajectories_to_batch", batch)
  with pytest.raises(GotThereError):
    train.Job.step(job)
  assert got["dropped"] == dropped


def test_no_checkpoint_is_newer_than_its_metrics():
  """In a bucket rows wait: a kill in between would lose them for good."""
  part, done = python_types.SimpleNamespace, []
  job = part(
    state=part(seconds=0.0, monitor=None), began=0.0,
    sentinel=part(state={}), clock=part(lap=lambda name: None),
    writer=part(flush=lambda: done.append("metrics")),
    saver=part(save=lambda state: done.append("checkpoint")),
  )
  train.Job.save(job)
  assert done == ["metrics", "checkpoint"]


@pytest.mark.slow
def test_a_users_function_that_fails_loses_no_step(tmp_path, monkeypatch):
  calls = []

  def reward(question, turns, answer):
    calls.append(1)
    # Three rollouts of the first evaluation are looked at with their rewards.
    assert len(calls) != 14, "the second step's third rollout"
    return 1.0, [0.0] * len(turns)

  monkeypatch.setitem(sys.modules, "mine", python_types.ModuleType("mine"))
  sys.modules["mine"].reward = reward
  config = tiny(reward=dict(function="mine:reward"))
  config.checkpoint.every = 100  # Only the failure saves.
  workdir = epath.Path(tmp_path)
  with jax.numpy_dtype_promotion("standard"):
    with pytest.raises(types.UserError, match=(
      "reward.function 'mine:reward' raised AssertionError: the second step's"
    )):
      train.train(config, workdir)
    assert (workdir / "checkpoints/1").exists()
    summary = train.train(config, workdir)
  assert summary["steps"] == 2
  steps = records(workdir)
  assert [r["step"] for r in steps] == [0, 1, 2]
  assert steps[-1]["critic/score/mean"] == 1.0


@pytest.mark.slow
def test_a_run_that_chooses_its_batches_goes_on_to_the_same_numbers(tmp_path):
  config = tiny(
    method="dapo", reward=dict(outcome_only=False), checkpoint=dict(every=9),
    batch=dict(questions=4, rollouts=2, dynamic_limit=2),
  )
  whole, stopped = (epath.Path(tmp_path) / name for name in ("a", "b"))
  stop = interrupts.Interrupts()
  stop.requested = True
  with jax.numpy_dtype_promotion("standard"):
    train.train(config, whole)
    with pytest.raises(interrupts.PreemptedError, match="after step 1"):
      train.train(config, stopped, stop)
    train.train(config, stopped)
    ours, theirs = (final_policy(w, config)[1] for w in (stopped, whole))
  assert records(stopped) == records(whole)
  for record in records(whole)[1:]:
    assert 4 <= record["batch/questions_asked"] <= 8
  assert records(whole)[1]["batch/questions_asked"] > 4  # A cursor matters.
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
  finished, tmp_path, caplog
):
  workdir, _ = finished
  ours = pathlib.Path(tmp_path) / "run"
  shutil.copytree(workdir, ours)
  for file in (ours / "checkpoints/2/rest").rglob("*"):
    if file.is_file() and file.stat().st_size > 1000:
      file.write_bytes(file.read_bytes()[:100])
  with jax.numpy_dtype_promotion("standard"):
    train.train(tiny(), epath.Path(ours))
  assert "checkpoints/2 cannot be read" in caplog.text
  assert records(ours) == records(workdir)


@pytest.mark.slow
def test_a_run_knows_its_settings_and_data(finished, tmp_path):
  workdir = epath.Path(tmp_path) / "run"
  shutil.copytree(finished[0], workdir)
  other = tiny(seed=7, method="ppo", ppo=dict(policy_lr=1.0))
  with jax.numpy_dtype_promotion("standard"):
    with pytest.raises(identity.ChangedSettingsError) as error:
      train.train(other, workdir)
    for line in ("method: the run has 'steppo', this start 'ppo'",
                 "seed: the run has 0, this start 7",
                 "ppo.policy_lr: the run has 0.0003, this start 1.0"):
      assert line in str(error.value)
    with pytest.raises(identity.ChangedSettingsError, match="data"):
      train.train(tiny(data=dict(limit=100)), workdir,
                  allow_changes=["data.limit"])
    free = tiny(model=dict(remat="none"), checkpoint=dict(keep=3))
    assert train.train(free, workdir)["steps"] == 2
    longer = train.train(
      tiny(total_steps=3), workdir, allow_changes=["total_steps"]
    )
  assert longer["steps"] == 3
  changes = json.loads((workdir / "config.json").read_text())["changes"]
  assert changes == [{"field": "total_steps", "from": 2, "to": 3}]


def test_missing_training_file_is_one_clear_line(tmp_path):
  config = tiny(data=dict(train="absent.jsonl"))
  experiment = Experiment(Settings.from_config(config), epath.Path(tmp_path))
  with pytest.raises(types.UserError, match=r"^absent.jsonl: no such file$"):
    _ = experiment.train_questions


def test_nan_names_step_and_metric():
  with pytest.raises(metrics.NonFiniteError, match="step 7: metric actor/pg"):
    metrics.check_finite(7, {"a": 1.0, "actor/pg_loss": float("nan")})


@pytest.mark.slow
@pytest.mark.main_job
def test_one_update_of_smollm2_on_real_musique(shared, tmp_path):
  config = musique_smollm2.get_config("runlocal")
  path = shared / "data/musique/musique_ans_train_100.jsonl"
  config.data.train = str(path)
  workdir = epath.Path(tmp_path)
  with jax.numpy_dtype_promotion("standard"):
    summary = train.train(config, workdir)
  assert summary["steps"] == 1
  for record in records(workdir):
    metrics.check_finite(record["step"], record)
  passages = {
    passage.id: passage
    for passage in corpus.corpus_from_questions([str(path)])
  }
  folder = workdir / "evaluations/step_000001"
  predictions = (folder / "predictions.jsonl").read_text()
  shown = 0
  for row in map(json.loads, predictions.splitlines()):
    blocks = re.findall(
      "<information>(.*?)</information>", row["response"], re.DOTALL
    )
    searched = [turn for turn in row["turns"] if turn["documents"]]
    assert len(blocks) == len(searched)
    for block, turn in zip(blocks, searched, strict=True):
      for name in turn["documents"]:
        assert passages[name].title in block
        assert passages[name].text[:40] in block
        shown += 1
  assert shown, "the policy never searched"
