"""Agents over a small embedded world: a real policy, or a scripted device."""

import contextlib

import fakes
import pytest
from etils import epath

from configs import quickstart
from stepsearch_jax.rollout import engine
from stepsearch_jax.run import asking
from stepsearch_jax.run.experiment import Experiment

TURNS = ("I look. <search> founder of Larn </search>",
         "<answer> Ada Brandt </answer>")


@contextlib.contextmanager
def tag_lover(folder):
  """Yields an agent whose policy boosts tags, as in `fakes`."""

  def policy(self, step):
    made = fakes.make_policy(self.model)
    return 7, fakes.make_tag_lover(self.tokenizer, made)

  with _agent(folder, trained_policy=policy) as made:
    yield made


@contextlib.contextmanager
def scripted(folder, turns=TURNS):
  """Yields an agent whose policy writes the given turns; all else is real."""

  def make_engine(self, texts):
    programs = fakes.ScriptedPrograms(self.tokenizer, turns, slots=1)
    return engine.Engine(programs, texts, self.retriever,
                         self.settings.rollout, self.settings.seed)

  def policy(self, step):
    return 7, {}

  with _agent(
    folder, make_engine=make_engine, trained_policy=policy
  ) as made:
    yield made


@contextlib.contextmanager
def _agent(folder, **changes):
  config = quickstart.get_config("runlocal")
  config.rollout.max_turns = 2
  config.rollout.max_turn = 24
  config.data.world.update(dict(
    train=50, validation=8, heldout=8, entities=200,
  ))
  workdir = epath.Path(folder)
  (workdir / "checkpoints").mkdir()
  with pytest.MonkeyPatch.context() as patch:
    for name, value in changes.items():
      patch.setattr(Experiment, name, value)
    made = asking.Agent(config, workdir)
    yield made
    made.close()
