"""Agents and experiments over a small world: a real policy or a script."""

import contextlib

import fakes
import pytest
from etils import epath

from configs import quickstart
from stepsearch_jax.rollout import engine
from stepsearch_jax.run import asking
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings

TURNS = ("I look. <search> founder of Larn </search>",
         "<answer> Ada Brandt </answer>")


@contextlib.contextmanager
def tag_lover(folder):
  """Yields an agent whose policy boosts tags, as in `fakes`."""
  def policy(self, step):
    made = fakes.make_policy(self.model)
    return 7, fakes.make_tag_lover(self.tokenizer, made)

  with _patched(trained_policy=policy), _agent(folder) as made:
    yield made


@contextlib.contextmanager
def scripted(folder, turns=TURNS):
  """Yields an agent whose policy writes the given turns; all else is real."""
  with scripted_device(turns), _agent(folder) as made:
    yield made


@contextlib.contextmanager
def scripted_experiment(folder, turns=TURNS):
  """Yields an experiment whose policy writes the given turns."""
  with scripted_device(turns):
    made = Experiment(Settings.from_config(config()), epath.Path(folder))
    yield made
    made.engine.close()


def config():
  """The tiny quickstart over a smaller world."""
  found = quickstart.get_config("runlocal")
  found.rollout.max_turns = 2
  found.rollout.max_turn = 24
  found.data.world.update(dict(
    train=50, validation=8, heldout=8, entities=200,
  ))
  return found


def scripted_device(turns=TURNS):
  """A context in which every policy writes the given turns."""
  def make_engine(self, texts):
    programs = fakes.ScriptedPrograms(self.tokenizer, turns, slots=1)
    return engine.Engine(programs, texts, self.retriever,
                         self.settings.rollout, self.settings.seed)

  def policy(self, step):
    return 7, {}

  return _patched(make_engine=make_engine, trained_policy=policy)


@contextlib.contextmanager
def _patched(**changes):
  with pytest.MonkeyPatch.context() as patch:
    for name, value in changes.items():
      patch.setattr(Experiment, name, value)
    yield


@contextlib.contextmanager
def _agent(folder):
  (epath.Path(folder) / "checkpoints").mkdir()
  made = asking.Agent(config(), epath.Path(folder))
  yield made
  made.close()
