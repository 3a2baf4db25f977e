"""What a run needs of its files, and what it finds out before it compiles."""

import json

import pytest
from etils import epath

from configs import quickstart
from stepsearch_jax import files, types
from stepsearch_jax.run import experiment as experiment_lib
from stepsearch_jax.run import identity
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings
from stepsearch_jax.types import UserError

PASSAGE = types.Passage.of("T", "gold")


def experiment(tmp_path, **changes):
  rows = [{"question": f"q{i}?", "answer": "A"} for i in range(20)]
  path = tmp_path / "plain.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = quickstart.get_config("runlocal")
  config.update_from_flattened_dict({"data.train": str(path), **changes})
  return Experiment(Settings.from_config(config), tmp_path)


def test_outcome_rewards_train_on_plain_questions_and_answers(tmp_path):
  assert len(experiment(tmp_path, method="ppo").train_questions) > 10


def test_step_rewards_say_which_paragraphs_they_need(tmp_path):
  with pytest.raises(files.DataError, match=r"plain.jsonl:1: .*sub_support"):
    _ = experiment(tmp_path).train_questions


def test_a_context_beyond_the_models_positions_is_refused(shared, tmp_path):
  path = shared / "golden/models/qwen2_tied"
  longest = json.loads((path / "config.json").read_text())[
    "max_position_embeddings"
  ]
  config = quickstart.get_config()
  config.model.reference = str(path)
  config.rollout.context = 2 * longest
  found = Experiment(Settings.from_config(config), epath.Path(tmp_path))
  with pytest.raises(UserError, match=f"rollout.context.*the {longest} posit"):
    _ = found.model


def test_a_run_keeps_the_day_on_which_it_began(tmp_path, monkeypatch):
  workdir = epath.Path(tmp_path)
  monkeypatch.setattr(identity, "_today", lambda: "2026-11-26")
  assert identity.started(workdir) == "2026-11-26"
  identity.claim(workdir, {"seed": 0}, "hash")
  monkeypatch.setattr(identity, "_today", lambda: "2026-11-27")
  identity.claim(workdir, {"seed": 0}, "hash")  # It resumes after midnight.
  assert identity.started(workdir) == "2026-11-26"


@pytest.mark.parametrize("changes", [
  {"retrieval.remote": "http://127.0.0.1:9"}, {"retrieval.engine": "online"},
  {"retrieval.replay": "record.jsonl"},
])
def test_a_corpus_that_nobody_searches_is_not_read(
  shared, tmp_path, monkeypatch, changes
):
  monkeypatch.setenv("SERPER_API_KEY", "k")
  (tmp_path / "record.jsonl").write_text('{"searched": {}}\n')
  if "retrieval.replay" in changes:
    changes["retrieval.replay"] = str(tmp_path / "record.jsonl")
  made = experiment(tmp_path, method="ppo", **changes, **{
    "data.corpus": "absent.jsonl",
    "model.reference": str(shared / "golden/models/qwen2_tied"),
    "rollout.context": 64, "rollout.answer_room": 8,
  })
  assert made.retriever
  made.describe(steps=1)


def test_a_run_says_at_its_start_that_llds_will_do_nothing(
  shared, tmp_path, caplog
):
  made = experiment(tmp_path, method="ppo", **{
    "ppo.llds_coef": 0.5, "ppo.mini_batch": 8,
    "retrieval.remote": "http://127.0.0.1:9",
    "model.reference": str(shared / "golden/models/qwen2_tied"),
    "rollout.context": 64, "rollout.answer_room": 8,
  })
  assert made.settings.batch.trajectories == 8
  with caplog.at_level("WARNING", logger="absl"):
    made.describe(steps=1)
  assert "ppo.llds_coef = 0.5 does nothing" in caplog.text


def test_a_corpus_that_is_searched_is_read(tmp_path):
  with pytest.raises(files.DataError, match="absent.jsonl: no such file"):
    _ = experiment(tmp_path, **{"data.corpus": "absent.jsonl"}).retriever


def test_absent_gold_is_looked_for_once_per_run(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(
    experiment_lib.coverage, "audit",
    lambda *given: asked.append(given) or ({}, [PASSAGE]),
  )
  corpus = tmp_path / "corpus.jsonl"
  corpus.write_text('{"id": "1", "title": "t", "text": "words"}\n')
  made = experiment(tmp_path, method="ppo", **{"data.corpus": str(corpus)})
  for _ in range(2):
    assert made.absent_gold == {PASSAGE.id}
  ((questions, passages),) = asked
  assert questions is made.eval_questions and passages is made.corpus
