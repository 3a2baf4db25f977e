"""A user's own estimator: found by name, checked, named in what goes wrong."""

import pathlib
import re
import sys
import types as python_types

import jax
import numpy as np
import pytest
from ppo import parts
from ppo.estimators.estimators_test import make_batch, make_inputs

from configs import quickstart
from stepsearch_jax import ppo, types
from stepsearch_jax.ppo import estimators
from stepsearch_jax.run.settings import Settings


@pytest.fixture
def install(monkeypatch):
  """Makes a function importable as mine:estimate."""

  def put(function):
    module = python_types.ModuleType("mine")
    module.estimate = function
    monkeypatch.setitem(sys.modules, "mine", module)
    return estimators.find("mine:estimate")

  return put


def run(found):
  batch, values = make_batch()
  return found(make_inputs(batch, values=values), parts.SPEC.estimator)


def test_a_plain_function_is_an_estimator(install):
  def estimate(inputs, spec):
    found = spec.gamma * inputs.rewards * 2
    return estimators.Estimates(found, found)

  found = install(estimate)
  assert not found.needs_values and not found.needs_groups
  batch, _ = make_batch()
  np.testing.assert_allclose(run(found).advantages, 2 * batch.token_rewards)
  # Unless it says otherwise, values are trained wherever they exist.
  np.testing.assert_array_equal(run(found).value_weights, batch.policy_mask)


def test_a_marked_function_says_what_it_needs(install):
  @estimators.estimator(needs_values=True, needs_groups=True)
  def estimate(inputs, spec):
    return estimators.Estimates(inputs.values, inputs.values)

  found = install(estimate)
  assert found.needs_values and found.needs_groups
  assert found.name == "mine:estimate"


def raises(inputs, spec):
  raise KeyError("no such thing")


@pytest.mark.parametrize("function, message", [
  (lambda i, s: i.rewards, "'mine:estimate' must return Estimates"),
  (lambda i, s: estimators.Estimates(i.rewards[:, 0], i.rewards),
   r"'mine:estimate': advantages must have shape \(6, 24\) .* got \(6,\)"),
  (lambda i, s: estimators.Estimates(i.rewards, 3.0),
   "returns must have shape .* got float"),
  (lambda i, s: estimators.Estimates(i.rewards, i.rewards, i.rewards[:1]),
   r"value_weights must have shape .* got \(1, 24\)"),
  (raises, "'mine:estimate' raised KeyError: 'no such thing'"),
])
def test_what_a_user_gets_wrong_is_one_line(install, function, message):
  with pytest.raises(types.UserError, match=message) as caught:
    run(install(function))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function, message", [
  (lambda i, s: i.rewards, "'mine:estimate' must return Estimates"),
  (lambda i, s: estimators.Estimates(i.rewards[:, 0], i.rewards),
   r"advantages must have shape \(8, \d+\) .* got \(8,\)"),
  (lambda i, s: 1 / 0 if i.rewards.sum() > 0 else None,
   "'mine:estimate' raised TracerBoolConversionError"),
])
def test_a_users_mistake_ends_a_run_before_it_begins(
  install, function, message
):
  install(function)
  config = quickstart.get_config("runlocal")
  config.estimator = "mine:estimate"
  assert config.batch.questions * config.batch.rollouts == 8
  with pytest.raises(types.UserError, match=message):
    Settings.from_config(config, devices=1)


def test_what_is_no_number_is_named_with_its_trajectory(install):
  def estimate(inputs, spec):  # A z-score of its own: 0 / 0 in equal groups.
    total = inputs.rewards.sum(-1)
    same = inputs.group[:, None] == inputs.group[None]
    mean = (same * total).sum(-1) / same.sum(-1)
    std = ((same * (total - mean[:, None]) ** 2).sum(-1) / same.sum(-1)) ** 0.5
    score = (total - mean) / std
    return estimators.Estimates(score[:, None] * inputs.masks.policy,
                                inputs.values)

  found = install(estimate)
  batch, values = make_batch()
  inputs = make_inputs(batch, values=values)
  group = np.asarray(inputs.group)
  rewards = np.array(inputs.rewards)
  rewards[group == group[2]] = 0.0
  first = int(np.flatnonzero(group == group[2])[0])
  inputs = inputs.replace(rewards=rewards)
  with np.errstate(invalid="ignore"):
    estimates = jax.device_get(found(inputs, parts.SPEC.estimator))
  with pytest.raises(types.UserError, match=(
    f"^estimator 'mine:estimate': advantages of trajectory {first} of the "
    f"step, token 0, is nan, .* its group is {group[2]}, its rewards sum up "
    "to 0$"
  )):
    found.check_finite(inputs, estimates)
  # Not its fault, and none of ours.
  broken = inputs.replace(values=np.full_like(rewards, np.nan))
  found.check_finite(broken, estimates)
  estimators.find("grpo").check_finite(inputs, estimates)


def test_the_example_of_the_readme_works_as_it_stands(monkeypatch):
  text = (pathlib.Path(ppo.__path__[0]) / "README.md").read_text()
  module = python_types.ModuleType("mine")
  exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], vars(module))
  monkeypatch.setitem(sys.modules, "mine", module)
  found = estimators.find("mine:estimate")
  assert found.needs_groups
  batch, _ = make_batch()
  totals = batch.token_rewards.sum(1)
  advantages = run(found).advantages
  for row in np.nonzero(batch.policy_mask.any(1))[0]:
    best = totals[row] == totals[batch.group == batch.group[row]].max()
    np.testing.assert_array_equal(
      advantages[row], (1 if best else -1) * batch.policy_mask[row]
    )


def test_the_readme_lists_every_estimator_and_what_it_needs():
  text = (pathlib.Path(ppo.__path__[0]) / "README.md").read_text()
  rows = re.findall(r"^\| `(\w+)` \| .* \| (\w*) ?\|$", text, re.MULTILINE)
  assert dict(rows) == {
    name: "values" if found.needs_values else "groups" * found.needs_groups
    for name, found in estimators.REGISTRY.items()
  }


@pytest.mark.parametrize("name, message", [
  ("gea", "estimator: expected one of bilevel_gae, gae, .*, got 'gea'"),
  ("nowhere:estimate", "No module named 'nowhere'"),
  ("math:no_such_name", "no attribute 'no_such_name'"),
])
def test_unknown_names_are_refused(name, message):
  with pytest.raises(types.UserError, match=message):
    estimators.find(name)


def test_every_estimator_of_ours_says_what_it_needs():
  values = {n for n, e in estimators.REGISTRY.items() if e.needs_values}
  groups = {n for n, e in estimators.REGISTRY.items() if e.needs_groups}
  assert values == {"gae", "turn_gae", "bilevel_gae"}
  assert groups == {"grpo", "rloo", "grpo_no_std", "maxrl", "gigpo",
                    "turn_rloo", "stratified", "igpo", "ig_search"}
