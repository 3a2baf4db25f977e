"""Users' own functions: found by name; the documented examples work."""

import pathlib
import re
import sys

import numpy as np
import pytest
from ppo import parts
from ppo.estimators.estimators_test import make_batch, make_inputs
from rewards.step_rewards_test import two_searches

from configs import common, quickstart
from stepsearch_jax import types, user_functions
from stepsearch_jax.ppo import estimators
from stepsearch_jax.rewards import step_rewards, token_rewards
from stepsearch_jax.run.settings import Settings

README = pathlib.Path(common.__file__).parent / "README.md"
REWARD, ESTIMATOR = re.findall(
  r"```python\n(.*?)```", README.read_text(), re.DOTALL
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The folder in which a command starts, not among Python's own."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
  yield tmp_path
  for name in ("mine", "broken"):
    sys.modules.pop(name, None)


def test_a_function_is_found_where_the_command_starts(folder):
  (folder / "mine.py").write_text("def f():\n  return 7\n")
  assert user_functions.load("field", "mine:f")() == 7


@pytest.mark.parametrize("reference, what", [
  ("mine", "expected module:function, got 'mine'"),
  (":f", "expected module:function, got ':f'"),
  ("nothere:f", "got 'nothere:f' .ModuleNotFoundError: No module named"),
  ("mine:absent", "got 'mine:absent' .AttributeError: .*absent"),
  ("mine:NUMBER", "expected the name of a function, got 'mine:NUMBER'"),
  ("broken:f", "got 'broken:f' .ZeroDivisionError: division by zero"),
])
def test_what_cannot_be_imported_is_one_line(folder, reference, what):
  (folder / "mine.py").write_text("NUMBER = 7\n")
  (folder / "broken.py").write_text("1 / 0\n")
  with pytest.raises(types.UserError, match=f"^field: .*{what}") as error:
    user_functions.load("field", reference)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["reward.function", "estimator"])
def test_a_wrong_name_is_refused_before_anything_starts(folder, field):
  config = quickstart.get_config("runlocal")
  config.update_from_flattened_dict({field: "nothere:f"})
  with pytest.raises(types.UserError, match=f"^{field}: expected a function"):
    Settings.from_config(config, devices=1)


def test_the_documented_reward_works_as_it_stands(folder):
  """Only the first search shows "alpha", the answer; F1 of "x" is 1/3..."""
  (folder / "mine.py").write_text(REWARD)
  config = quickstart.get_config("runlocal")
  config.reward.function = "mine:reward"
  spec = Settings.from_config(config, devices=1).reward
  trajectory = two_searches()
  trajectory.question = types.Question("1", "?", ("alpha", "x y"))
  (reward,) = token_rewards.score_trajectories(spec, [trajectory], None)
  want = np.zeros(14)
  want[[4, 13]] = 0.1, 2 / 3  # F1 of "x" against "x y".
  np.testing.assert_allclose(reward.tokens, want, atol=1e-6)


def test_the_documented_estimator_works_as_it_stands(folder):
  (folder / "mine.py").write_text(ESTIMATOR)
  found = estimators.find("mine:estimate")
  assert found.needs_groups and not found.needs_values
  batch, values = make_batch()
  got = found(make_inputs(batch, values=values), parts.SPEC.estimator)
  totals = (batch.token_rewards * batch.policy_mask).sum(1)
  for row, mask in enumerate(batch.policy_mask):
    others = [j for j in np.flatnonzero(batch.group == batch.group[row])
              if j != row]
    score = sum(np.sign(totals[row] - totals[j]) for j in others)
    np.testing.assert_allclose(
      got.advantages[row], score / max(len(others), 1) * mask, atol=1e-6
    )


def test_the_examples_are_about_a_dozen_lines():
  for text in (REWARD, ESTIMATOR):
    assert len([line for line in text.splitlines() if line.strip()]) <= 13


def test_a_function_of_ones_own_replaces_the_preset(folder):
  (folder / "mine.py").write_text(REWARD)
  config = quickstart.get_config("runlocal")
  config.reward.function = "mine:reward"
  assert config.method == "steppo"
  # So that plain questions and answers will do.
  assert Settings.from_config(config, devices=1).reward.outcome_only
  config.reward.search_bonus = 0.1
  with pytest.raises(types.UserError, match="^reward.search_bonus: expected 0"):
    Settings.from_config(config, devices=1)
  assert step_rewards.RewardSpec.paper().function == ""
