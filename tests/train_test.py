"""The real training loop on a tiny config: runs, resumes, refuses."""

import json
import pathlib
import re
import shutil
import threading

import jax
import numpy as np
import pytest
from etils import epath

from configs import musique_smollm2, quickstart
from stepsearch_jax import cli, train
from stepsearch_jax.ppo import learner as learner_lib
from stepsearch_jax.retrieval.index import corpus
from stepsearch_jax.run import checkpoints, experiment, metrics, plots, settings


def tiny(**changes):
  config = quickstart.get_config("runlocal")
  config.checkpoint.every = 1
  config.warm_start.steps = 2
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
  data = experiment.load_data(config, workdir)
  tokenizer = experiment.load_tokenizer(config, workdir, data)
  model = experiment.decoder_config(config, tokenizer)
  like = jax.eval_shape(lambda: experiment.initial_policy(config, model))
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
  for name in ("curves.png", "step_time.png", "eval/card.json",
               "eval/card.md", "tensorboard",
               "predictions/step_000000.jsonl",
               "predictions/step_000002.jsonl"):
    assert (workdir / name).exists(), name
  steps = records(workdir)
  assert [r["step"] for r in steps] == [0, 1, 2]
  assert {"actor/pg_loss", "critic/vf_loss", "critic/kl", "actor/entropy",
          "critic/score/mean", "val/em"} <= set(steps[-1])
  for record in steps:
    metrics.check_finite(record["step"], record)


@pytest.mark.slow
def test_a_logged_step_says_where_its_time_went(finished):
  workdir, _ = finished
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  phases = plots.step_seconds(workdir)
  assert phases.pop("step") == [1, 2]
  for i, record in enumerate(map(json.loads, lines[1:])):
    whole = sum(record[f"timing_s/{k}"]
                for k in ("gen", "reward", "adv", "update"))
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
    train.train(tiny(), broken)
    ours, theirs = (final_policy(w, tiny())[1] for w in (broken, workdir))
  assert records(broken) == records(workdir)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_preempted_run_saves_and_goes_on_to_the_same_numbers(
  finished, tmp_path
):
  workdir, _ = finished
  stop = threading.Event()
  stop.set()
  ours = epath.Path(tmp_path) / "run"
  config = tiny()
  config.checkpoint.every = 100  # Only the preemption saves.
  with jax.numpy_dtype_promotion("standard"):
    with pytest.raises(cli.PreemptedError, match="after step 1 and saved"):
      train.train(config, ours, stop)
    train.train(config, ours)
  assert records(ours) == records(workdir)


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
def test_checkpoint_of_another_model_or_data_is_refused(finished):
  workdir, _ = finished
  other = tiny()
  other.model.size.layers = 2
  with jax.numpy_dtype_promotion("standard"):
    with pytest.raises(checkpoints.CheckpointMismatchError, match="model"):
      train.train(other, workdir)
    with pytest.raises(checkpoints.CheckpointMismatchError, match="data"):
      train.train(tiny(data=dict(limit=100)), workdir)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(algorithm="a2c"), "algorithm must be one of"),
    (dict(total_epochs=1.0), "exactly one of total_steps and total_epochs"),
    (dict(algorithm="grpo"), "batch.rollouts must be >= 2"),
    (dict(batch=dict(questions=7)), "multiple of ppo.mini_batch = 8"),
    (dict(mesh=dict(data=3)), "not divisible by the mesh's 3 data shards"),
    (dict(rollout=dict(template="x")), "rollout.template must be one of"),
  ],
)
def test_bad_settings_name_the_field(changes, message):
  with pytest.raises(ValueError, match=message):
    settings.validate(tiny(**changes))


def test_missing_training_file_is_one_clear_line(tmp_path):
  config = tiny(data=dict(train="absent.jsonl"))
  with pytest.raises(ValueError, match=r"^absent.jsonl: no such file$"):
    experiment.load_data(config, epath.Path(tmp_path))


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
  predictions = (workdir / "predictions/step_000001.jsonl").read_text()
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
