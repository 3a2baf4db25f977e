"""Training on traces alone, and on a run's own right answers."""

import json
import types as python_types

import fakes
import jax
import pytest
from etils import epath
from sft.scripted_test import watch

from configs import quickstart
from stepsearch_jax import train, types
from stepsearch_jax.run import identity, rejection
from stepsearch_jax.run.interrupts import Interrupts
from stepsearch_jax.run.settings import Settings
from stepsearch_jax.sft import scripted, traces
from stepsearch_jax.tools import sft


def tiny(**changes):
  config = quickstart.get_config("runlocal")
  config.update(dict(total_steps=2, warm_start=dict(steps=2, rows=2)))
  config.data.eval_limit, config.data.limit = 2, 4
  config.rollout.max_turn, config.rollout.max_turns = 12, 2
  config.update(changes)
  return config


def rollout():
  (found,) = watch(
    scripted.Habits("exact", whole=0, repeat=0, give_up=0)
  ).trajectories
  return found


def test_a_run_of_imitation_trains_on_nothing_else():
  config = tiny()
  made = sft.imitation_of(config, "t.jsonl")
  assert (made.total_steps, made.total_epochs) == (0, 0.0)
  assert made.warm_start.traces == "t.jsonl" and config.total_steps == 2
  config.warm_start.steps = 0
  with pytest.raises(types.UserError, match="^warm_start.steps: expected a po"):
    Settings.from_config(sft.imitation_of(config, "t.jsonl"))


def test_right_is_a_valid_rollout_with_the_answer_and_counts_once():
  good, wrong, invalid = rollout(), rollout(), rollout()
  assert good.answer == "Toron"
  wrong.answer = "Kes"
  invalid.turns = [
    types.Turn("?", types.Action.INVALID, "", (), "", 3), *invalid.turns
  ]
  other = rollout()
  other.tokens = other.tokens.copy()
  other.tokens[-1] += 1
  unanswered = rollout()
  unanswered.answer = None
  assert rejection.right(
    [wrong, good, rollout(), invalid, other, unanswered]
  ) == [good, other]


class Engine:
  """Answers with the same rollout whatever is asked."""

  def run(self, policy, asked, episodes, temperature):
    self.asked = [q.id for q in asked], list(episodes), temperature
    return python_types.SimpleNamespace(trajectories=[rollout() for _ in asked])


def test_every_round_asks_every_question_so_often_and_samples_anew(tmp_path):
  questions = [types.Question(str(i), "?", ("x",)) for i in range(3)]
  experiment = python_types.SimpleNamespace(
    train_questions=questions, engine=Engine(),
    tokenizer=fakes.make_tokenizer(),
  )
  path = epath.Path(tmp_path) / "s.jsonl"
  for number, episodes in ((1, range(6, 12)), (2, range(12, 18))):
    rejection.sample(
      experiment, None, rejection.Sampling(2, 0.7, number), path
    )
    assert experiment.engine.asked == (
      ["0", "0", "1", "1", "2", "2"], list(episodes), 0.7
    )
  found = traces.read(
    str(path), None, fakes.make_tokenizer(), traces.Limits(400, 99)
  )
  assert [t.answer for t in found.trajectories] == ["Toron"]


def test_no_right_rollout_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setattr(rejection, "right", lambda rollouts: [])
  experiment = python_types.SimpleNamespace(
    train_questions=[types.Question("0", "?", ("x",))], engine=Engine()
  )
  with pytest.raises(types.UserError, match="none among 4 rollouts"):
    rejection.sample(experiment, None, rejection.Sampling(4, 1.0, 1), tmp_path)


@pytest.mark.parametrize("attempts, temperature, field", [
  (0, 1.0, "--rejection"), (2, 0.0, "--temperature"),
])
def test_wrong_flags_are_named(attempts, temperature, field):
  with pytest.raises(types.UserError, match=f"^{field}: expected"):
    rejection.Sampling(attempts, temperature, 1)


def test_a_folder_without_checkpoints_is_one_line(tmp_path):
  with pytest.raises(types.UserError, match="has no checkpoints to sample"):
    sft.reject(tiny(), epath.Path(tmp_path), 2, 1, 1.0)


def test_every_round_starts_from_the_one_before(tmp_path, monkeypatch):
  workdir = epath.Path(tmp_path) / "run"
  (workdir / "checkpoints").mkdir(parents=True)
  sampled, trained, stopping = [], [], Interrupts()

  class Experiment:
    """Knows where it reads the policy from."""

    def __init__(self, settings, folder):
      self.folder, self.settings = folder, settings
      self.train_questions = [types.Question("0", "?", ("x",))]
      self.engine = python_types.SimpleNamespace(close=lambda: None)

    def trained_policy(self):
      return 0, f"policy of {self.folder}"

  def sample(experiment, policy, sampling, path):
    sampled.append((policy, sampling, path))
    path.write_text("")

  def fake_train(config, folder, interrupts, allow_changes):
    assert interrupts is stopping
    trained.append((config.warm_start.policy, config.warm_start.traces,
                    config.total_steps, folder))
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"round": len(trained)}))
    return {"round": len(trained)}

  monkeypatch.setattr(sft, "Experiment", Experiment)
  monkeypatch.setattr(rejection, "sample", sample)
  monkeypatch.setattr(train, "train", fake_train)

  def reject(attempts, rounds, temperature, config=None, allowed=()):
    return sft.reject(config or tiny(), workdir, attempts, rounds, temperature,
                      stopping, allowed)

  assert reject(4, 2, 0.5) == {"round": 2}
  folder = workdir / "rejection"
  files = [folder / f"samples_{n}.jsonl" for n in (1, 2)]
  assert sampled == [
    (f"policy of {workdir}", rejection.Sampling(4, 0.5, 1), files[0]),
    (f"policy of {folder / 'round_1'}", rejection.Sampling(4, 0.5, 2),
     files[1]),
  ]
  assert trained == [
    (str(workdir), str(files[0]), 0, folder / "round_1"),
    (str(folder / "round_1"), str(files[1]), 0, folder / "round_2"),
  ]
  # Once more: nothing is played or trained again; a third round goes on.
  assert reject(4, 3, 0.5) == {"round": 3}
  assert len(sampled) == len(trained) == 3
  # With other settings it is refused, also where nothing is left to do.
  longer = tiny(warm_start=dict(steps=5, rows=2))
  for arguments, message in (
    ((8, 3, 0.5), r"rejection: they have 4, this start 8; --allow_changes=rej"),
    ((4, 3, 0.9), r"temperature: they have 0.5, this start 0.9; --allow"),
    ((4, 3, 0.5, longer), r"warm_start.steps: they have 2, this start 5; --al"),
  ):
    with pytest.raises(types.UserError, match=message) as caught:
      reject(*arguments)
    assert "\n" not in str(caught.value)
  assert reject(8, 4, 0.5, allowed=["rejection"]) == {"round": 4}
  assert [s.attempts for _, s, _ in sampled] == [4, 4, 4, 8]
  assert reject(8, 4, 0.5) == {"round": 4}
  # What cannot change a result is free.
  assert reject(8, 4, 0.5, tiny(checkpoint=dict(keep=1))) == {"round": 4}


@pytest.mark.slow
def test_traces_then_rejection(tmp_path, monkeypatch):
  path = tmp_path / "traces.jsonl"
  path.write_text(json.dumps({
    "question": "Who?", "golden_answers": ["Ada"], "response": "<search> a "
    "</search><information>b</information><answer> Ada </answer>",
  }) + "\n")
  workdir = epath.Path(tmp_path) / "run"
  # A policy of two steps is never right.
  monkeypatch.setattr(rejection, "right", lambda rollouts: rollouts)
  with jax.numpy_dtype_promotion("standard"):
    summary = train.train(sft.imitation_of(tiny(), str(path)), workdir)
    assert summary["steps"] == 0
    assert (workdir / "evaluations/step_000000/card.json").exists()
    assert sft.reject(tiny(), workdir, 1, 1, 1.0)["steps"] == 0
  folder = workdir / "rejection"
  assert len((folder / "samples_1.jsonl").read_text().splitlines()) == 4
  kept = identity.read(folder / "round_1")["config"]["warm_start"]
  assert kept["policy"] == str(workdir)
