"""Arms of a study that could not be compared are refused before a run."""

import json

import pytest
from etils import epath
from launch.study_test import ABOUT, write

from stepsearch_jax import types
from stepsearch_jax.run import study_plan
from stepsearch_jax.run.study_book import Book
from tests import fakes

PPO = "  add('ppo', seeds=1, method='ppo')\n"


@pytest.mark.parametrize("body, message", [
  (PPO + PPO, "a name for every arm, got \"'ppo' twice\""),
  (PPO + "  add('start', seeds=1, total_steps=0)\n", "'start' twice"),
  ("  add('steppo', seeds=1)\n",
   r"BASELINES: expected names among .*\['ppo'\]"),
  ("  add('ppo', seeds=1, rates=(1e-4, 1e-3), method='ppo')\n"
   "  add('steppo', seeds=1, rates=(1e-4, 1e-2))\n",
   "rates: expected the same values for every arm"),
  ("  add('ppo', seeds=1, rates=(1e-4, 1e-4), method='ppo')\n",
   "arm ppo: expected every rate once"),
  ("  add('ppo', seeds=100, method='ppo')\n",
   "seeds without TUNING_SEED, got 99"),
  *((f"{PPO}  add('steppo', seeds=1, {change})\n",
     f"arm steppo: expected the seeds, .* got .*{field}")
    for change, field in (
      ("seed=7", "seed"), ("eval=dict(every=1)", "eval.every"),
      ("data=dict(eval_limit=1)", "data.eval_limit"),
      ("data=dict(split='validation')", "data.split"),
      ("data=dict(world=dict(heldout=5))", "data.world.heldout"),
    )),
  (f"{PPO}  add('steppo', seeds=1, ppo=dict(critic_warmup=1))\n",
   "arms differ in critic_warmup: expected 0 as in ppo, got '1 in steppo'"),
  (f"{PPO}  add('steppo', seeds=1, warm_start=dict(steps=9))\n",
   "arms differ in imitation: expected 0 as in ppo"),
])
def test_arms_that_cannot_be_compared_are_refused(tmp_path, body, message):
  with pytest.raises(types.UserError, match=message) as caught:
    study_plan.load(write(tmp_path, body))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["BASELINES", "TUNING_SEED", "study"])
def test_a_file_that_is_no_study_is_refused_by_what_it_lacks(tmp_path, name):
  config = write(tmp_path, PPO)
  path = epath.Path(config.partition(":")[0])
  path.write_text(path.read_text().replace(name, f"other_{name}"))
  with pytest.raises(types.UserError, match=f"a file of a study, with {name}"):
    study_plan.load(config)


def test_arms_with_other_models_or_starts_may_be_compared(tmp_path):
  study_plan.load(write(tmp_path, PPO + (
    "  add('x', seeds=1, total_steps=0, warm_start=dict(steps=9))\n"
    "  add('y', seeds=1, total_steps=0, rollout=dict(documents='random'))\n"
  )))


@pytest.mark.parametrize("field", ["commit", "jax"])
def test_a_run_of_other_code_takes_no_part(tmp_path, field):
  """Its own card says what it was played by."""
  plan = study_plan.load(write(tmp_path, PPO))
  workdir = epath.Path(tmp_path) / "w"
  for arm in ("start", "ppo"):
    fakes.write_study_run(workdir / arm / "seed_0", [1.0])
  (workdir / "study.json").write_text(json.dumps(ABOUT))
  assert len(Book(workdir, None).rows(plan)) == 2
  (card,) = workdir.glob("ppo/seed_0/evaluations/step_000010/card.json")
  said = json.loads(card.read_text())
  said["settings"][field] = "other"
  card.write_text(json.dumps(said))
  with pytest.raises(types.UserError, match=f"ppo/seed_0: {field}: .*'other'"):
    Book(workdir, None).rows(plan)
