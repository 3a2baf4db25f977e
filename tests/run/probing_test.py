"""Who is probed by which model, and runs that train on it."""

import json
import types as python_types

import jax
import pytest
from etils import epath

from configs import quickstart
from stepsearch_jax import train, types
from stepsearch_jax.env.actions import ParsedTurn
from stepsearch_jax.rollout import records
from stepsearch_jax.rollout.probing import Answers
from stepsearch_jax.run import metrics, plots, probing
from stepsearch_jax.run.settings import Settings


def tiny(method, **changes):
  config = quickstart.get_config("runlocal")
  config.update_from_flattened_dict({
    "method": method, "total_steps": 1, "warm_start.steps": 0,
    "data.world.train": 60, "data.world.validation": 9,
    "data.world.heldout": 9, "data.world.entities": 200,
    "data.eval_limit": 3, "rollout.max_turn": 12, "rollout.max_turns": 2,
    "batch.questions": 4, "batch.rollouts": 2, **changes,
  })
  return config


class Engine:
  """Remembers what it is asked to do."""

  def __init__(self):
    self.calls, self.prompts = [], []

  def run(self, params, questions, episodes, temperature, probe):
    self.calls.append(("run", params, temperature, probe))
    return records.Rollout([], records.RolloutStats())

  def probe(self, params, rollout):
    self.calls.append(("probe", params))

  def prompt_tokens(self, question):
    self.prompts.append(question.text)


class Texts:
  """Has answers as long as their question."""

  def answers(self, question):
    return Answers([1], [[2] * len(question.text)])


@pytest.mark.parametrize("method, while_playing, behind", [
  ("grpo", False, []), ("tips", False, [("probe", "reference")]),
  ("igpo", True, []), ("ig_search", False, [("probe", "policy")]),
])
def test_each_reward_asks_its_own_model(method, while_playing, behind):
  settings = Settings.from_config(
    tiny(method, **{"rollout.temperature": 0.7}), devices=1
  )
  parts = python_types.SimpleNamespace(settings=settings, engine=Engine())
  probing.play(parts, "policy", "reference", [], [])
  assert parts.engine.calls == [
    ("run", "policy", 0.7, while_playing), *behind
  ]


def test_questions_of_which_no_answer_fits_are_refused_at_the_start():
  def check(length, method, engine):
    questions = [types.Question("1", "a" * length, ("x",)),
                 types.Question("2", "aaaaa", ("x",))]
    probing.check_questions(python_types.SimpleNamespace(
      settings=Settings.from_config(tiny(method), devices=1), texts=Texts(),
      engine=engine, train_questions=questions[:1],
      eval_questions=questions[1:],
    ))
    assert engine.prompts == ["a" * length, "aaaaa"]

  check(63, "tips", Engine())
  with pytest.raises(types.UserError, match=r"^probe.tokens: .*\(16, 64\)$"):
    check(64, "tips", None)  # Before there is an engine, and an index.
  check(64, "grpo", Engine())


@pytest.mark.parametrize("changes", [
  {"method": "steppo", "probe.reward": "tips", "estimator": "turn_rloo"},
  {"method": "tips", "estimator": "grpo"},
  {"method": "igpo", "estimator": "gae"},
  {"method": "turn_rloo", "estimator": "igpo"},
])
def test_any_probe_reward_goes_with_any_estimator(changes):
  settings = Settings.from_config(tiny(**changes), devices=1)
  assert settings.learner(1).estimator.name == changes.get("estimator")
  wanted = changes.get("probe.reward", {
    "tips": "tips", "igpo": "igpo", "turn_rloo": "none"
  }.get(changes["method"]))
  assert settings.reward.probe.reward == wanted


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tips", "igpo", "ig_search"])
def test_a_run_trains_on_what_the_probe_says(method, tmp_path, monkeypatch):
  workdir = epath.Path(tmp_path)
  # Whatever the random policy writes is a search.
  monkeypatch.setattr(
    "stepsearch_jax.env.actions.parse",
    lambda text: ParsedTurn(types.Action.SEARCH, text.strip()),
  )
  with jax.numpy_dtype_promotion("standard"):
    summary = train.train(tiny(method), workdir)
  assert summary["steps"] == 1 and summary["method"] == method
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  record = json.loads(lines[-1])
  metrics.check_finite(1, record)
  assert {"probe/start", "probe/end", "probe/gain_per_turn"} <= set(record)
  assert record["probe/start"] < 0 and 0 < record["perf/probe_share"] < 1
  assert min(s[0] for s in plots.step_seconds(workdir).values()) >= 0
  rows = (workdir / "trajectories/step_000001.jsonl").read_text().splitlines()
  turns = [turn for row in map(json.loads, rows) for turn in row["turns"]]
  paid = [turn["step"] for turn in turns if turn["documents"]]
  assert any(paid) and all(abs(step) < 50 for step in paid)
