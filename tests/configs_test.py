"""Every config loads, shrinks to runlocal and expands its sweep."""

import importlib
import pathlib

import pytest

from configs import arguments
from stepsearch_jax.run.settings import Settings

NAMES = [
  path.stem
  for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
  if path.stem not in ("__init__", "arguments", "common")
]


@pytest.mark.parametrize("name", NAMES)
def test_config_loads_and_sweeps(name):
  module = importlib.import_module(f"configs.{name}")
  Settings.from_config(module.get_config("runlocal"))
  base = module.get_config()
  assert (base.total_steps > 0) != (base.total_epochs > 0)
  assert "Hardware:" in module.__doc__ and "--workdir" in module.__doc__
  points = []
  module.sweep(lambda arg=None, **changes: points.append((arg, changes)))
  assert points
  for arg, changes in points:
    config = module.get_config(arg)
    config.update(changes)  # An unknown field would raise.
    Settings.from_config(config, devices=1)


def test_paper_hyperparameters_differ_where_the_paper_does():
  module = importlib.import_module("configs.stepsearch_qwen2_5_3b")
  paper, released = module.get_config("paper"), module.get_config()
  assert (released.batch.questions, paper.batch.questions) == (128, 256)
  assert (released.ppo.value_lr, paper.ppo.value_lr) == (5e-7, 7e-6)


def test_arguments_are_typed_and_unknown_ones_rejected():
  parsed = arguments.parse_arg("n=3,flag", n=1, flag=False)
  assert (parsed.n, parsed.flag) == (3, True)
  with pytest.raises(ValueError, match="unknown config argument 'x'"):
    arguments.parse_arg("x=1", n=1)
  with pytest.raises(ValueError, match="n is of type int, got 'a'"):
    arguments.parse_arg("n=a", n=1)
