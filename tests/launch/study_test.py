"""A study's plan: who waits for whom, what is refused, what is equal."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import pytest
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.run import study_plan
from stepsearch_jax.run.study_book import Book
from tests import fakes

ROOT = pathlib.Path(__file__).parents[2]
HEAD = """
from configs import quickstart
BASELINES, TUNING_SEED = ("ppo",), 99
def get_config(arg=None):
  return quickstart.get_config(arg)
def study(add, config):
  add("start", seeds=2, total_steps=0)
"""


@pytest.fixture(scope="module")
def launcher():
  spec = importlib.util.spec_from_file_location(
    "study_launcher", ROOT / "launch/study.py"
  )
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # Dataclasses look themselves up.
  spec.loader.exec_module(module)
  return module


def write(tmp_path, body):
  path = tmp_path / "plan.py"
  path.write_text(HEAD + body)
  return f"{path}:runlocal"


def finish(folder, em=0.5):
  folder.mkdir(parents=True)
  (folder / "summary.json").write_text(json.dumps({"em_after": em}))


def ready(launcher, plan, workdir, record=None):
  return launcher.ready(plan, workdir, plan.arms, Book(workdir, record))


def flag(command, name):
  return [a.split("=", 1)[1] for a in command if a.startswith(f"--{name}=")]


@pytest.mark.parametrize("argument", ["", ":runlocal"])
def test_the_shipped_study_is_a_fair_one(launcher, argument):
  plan = study_plan.load(str(ROOT / "configs/credit_study.py") + argument)
  names = [arm.name for arm in plan.arms]
  assert names[0] == "start" and set(plan.baselines) < set(names)
  seeds = {arm.name: len(arm.seeds) for arm in plan.arms}
  for name in ("ppo", "grpo", "steppo", "ppo + bonus per search"):
    assert seeds[name] >= 10
  assert min(seeds.values()) >= 5
  rates = {arm.rates for arm in plan.arms if "method" in arm.overrides}
  assert len(rates) == 1 and len(next(iter(rates))) == 3


@pytest.mark.parametrize("config", [
  "weak_start_study.py", "weak_start_study.py:runlocal",
  "musique_smollm2.py:gpu", "musique_smollm2.py:hours",
  "musique_smollm2.py:gpu,runlocal",
])
def test_every_other_shipped_study_has_a_plan(config):
  plan = study_plan.load(str(ROOT / "configs" / config))
  assert plan.arms[0].name == "start"
  assert {"ppo", "steppo"} < {arm.name for arm in plan.arms}


def test_arms_wait_for_their_start_and_their_rate(launcher, tmp_path):
  config = write(tmp_path, "  add('ppo', seeds=2, rates=(1e-4, 1e-3), "
                 "method='ppo')\n")
  plan, workdir = study_plan.load(config), epath.Path(tmp_path) / "w"
  first = ready(launcher, plan, workdir)
  assert [flag(c, "config.seed") for c in first] == [["99"], ["0"], ["1"]]
  assert all(flag(c, "config.total_steps") == ["0"] for c in first)
  for seed in (0, 1, 99):
    finish(workdir / "start" / f"seed_{seed}")
  tuning = ready(launcher, plan, workdir)
  assert [flag(c, "config.ppo.policy_lr") for c in tuning] == [
    ["0.0001"], ["0.001"]
  ]
  assert all(flag(c, "config.data.split") == ["validation"] for c in tuning)
  finish(workdir / "rates/ppo/0.0001", 0.1)
  finish(workdir / "rates/ppo/0.001", 0.2)
  runs = ready(launcher, plan, workdir)
  assert [flag(c, "config.ppo.policy_lr") for c in runs] == [["0.001"]] * 2
  assert flag(runs[1], "config.warm_start.policy") == [
    str(workdir / "start/seed_1")
  ]
  finish(workdir / "ppo/seed_0")
  assert len(ready(launcher, plan, workdir)) == 1


def test_an_arm_that_only_evaluates_its_start_is_checked_with_it(
  launcher, tmp_path
):
  config = write(tmp_path, "  add('gold', seeds=1, total_steps=0, "
                 "rollout=dict(documents='gold'))\nBASELINES = ()\n")
  study_plan.load(config)
  config = write(tmp_path, "  add('x', seeds=1, total_steps=0, "
                 "from_start=False, warm_start=dict(steps=0))\n")
  with pytest.raises(types.UserError, match="warm_start has neither steps nor"):
    study_plan.load(config)


def test_one_seed_comes_after_the_other_whatever_the_arm(launcher, tmp_path):
  config = write(tmp_path, "".join(
    f"  add('{name}', seeds=2, method='ppo')\n" for name in ("ppo", "other")
  ))
  plan, workdir = study_plan.load(config), epath.Path(tmp_path) / "w"
  for seed in (0, 1, 99):
    finish(workdir / "start" / f"seed_{seed}")
  runs = ready(launcher, plan, workdir)
  assert [flag(c, "workdir")[0].removeprefix(f"{workdir}/") for c in runs] == [
    "ppo/seed_0", "other/seed_0", "ppo/seed_1", "other/seed_1"
  ]


# Ends only when another run is under way; fails where it is told to.
RUN = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1].partition("=")[2])
folder.mkdir(parents=True, exist_ok=True)
(folder / "begun").touch()
print("hello from", folder.name, folder.parent.name)
if "fails" in str(folder):
  sys.exit(3)
end = time.time() + 30
while len(list(folder.parents[1].glob("*/*/begun"))) < 2:
  assert time.time() < end
  time.sleep(0.02)
(folder / "summary.json").write_text("{}")
"""


def test_runs_that_can_are_played_side_by_side(
  launcher, tmp_path, monkeypatch
):
  config = write(tmp_path, "  add('ppo', seeds=2, method='ppo')\n")
  plan, workdir = study_plan.load(config), epath.Path(tmp_path) / "w"

  def command(plan, workdir, arm, seed, folder, extra=()):
    return [sys.executable, "-c", RUN, f"--workdir={folder}"]

  monkeypatch.setattr(launcher, "command", command)
  launcher.play(plan, workdir, plan.arms, Book(workdir, None), parallel=2)
  assert not ready(launcher, plan, workdir)
  log = (workdir / "ppo/seed_1/log.txt").read_text()
  assert log == "hello from seed_1 ppo\n"


def test_a_run_that_fails_ends_the_study_when_the_others_are_done(
  launcher, tmp_path, monkeypatch
):
  config = write(tmp_path, "  add('fails', seeds=1, from_start=False, "
                 "method='ppo')\nBASELINES = ()\n")
  plan, workdir = study_plan.load(config), epath.Path(tmp_path) / "w"
  monkeypatch.setattr(launcher, "command", lambda *rest, **more: [
    sys.executable, "-c", RUN, f"--workdir={rest[4]}"
  ])
  with pytest.raises(types.UserError, match="ended with code 3; the same"):
    launcher.play(plan, workdir, plan.arms, Book(workdir, None), parallel=2)
  unfinished = ready(launcher, plan, workdir)
  assert {flag(c, "workdir")[0].split("/")[-2] for c in unfinished} >= {"fails"}


def test_an_arm_without_rates_waits_for_the_start_of_its_seed(
  launcher, tmp_path
):
  config = write(tmp_path, "  add('ppo', seeds=2, method='ppo')\n")
  plan, workdir = study_plan.load(config), epath.Path(tmp_path) / "w"
  finish(workdir / "start" / "seed_1")
  runs = ready(launcher, plan, workdir)
  assert [flag(c, "config.warm_start.policy") for c in runs] == [
    [], [str(workdir / "start/seed_1")]
  ]
  assert [flag(c, "config.seed") for c in runs] == [["0"], ["1"]]


def test_arms_with_other_rollouts_or_fields_are_refused(launcher, tmp_path):
  two = "  add('ppo', seeds=1, method='ppo')\n"
  more = "  add('big', seeds=1, batch=dict(questions=16))\n"
  with pytest.raises(types.UserError, match="arms differ in rollouts: expected "
                     "8 as in ppo, got '16 in big'"):
    study_plan.load(write(tmp_path, two + more))
  wrong = "  add('x', seeds=1, ppo=dict(learning_rate=1.0))\n"
  with pytest.raises(types.UserError, match="ppo.learning_rate"):
    study_plan.load(write(tmp_path, wrong))


GROUPS = "batch=dict(questions=4, rollouts=2"
PASSES = "total_steps=0, total_epochs=1.0"


@pytest.mark.parametrize("arm, field", [
  # Dynamic sampling may play three times as many rollouts ...
  (f"method='dapo', {GROUPS})", "rollouts"),
  (f"method='grpo', {GROUPS}, dynamic=True)", "rollouts"),
  # ... unless its limit says otherwise.
  (f"method='dapo', {GROUPS}, dynamic_limit=1)", None),
  (f"method='grpo', {GROUPS})", None),
  (PASSES, "length"),
  ("ppo=dict(epochs=2)", "epochs"),
  ("ppo=dict(mini_batch=4)", "mini_batch"),
])
def test_arms_with_other_effort_are_refused(launcher, tmp_path, arm, field):
  config = write(tmp_path, "  add('ppo', seeds=1, method='ppo')\n"
                 f"  add('other', seeds=1, {arm})\n")
  if field is None:
    study_plan.load(config)
    return
  with pytest.raises(types.UserError, match=f"arms differ in {field}: expect"):
    study_plan.load(config)


def test_arms_of_so_many_passes_are_compared_too(launcher, tmp_path):
  arms = f"  add('ppo', seeds=1, {PASSES}, method='ppo')\n"
  equal = f"  add('steppo', seeds=1, {PASSES})\n"
  study_plan.load(write(tmp_path, arms + equal))
  # Half the questions in a step are twice the steps.
  for other in ("total_steps=0, total_epochs=2.0",
                f"{PASSES}, method='grpo', {GROUPS})"):
    with pytest.raises(types.UserError, match="arms differ in length: expect"):
      study_plan.load(write(tmp_path, arms + f"  add('x', seeds=1, {other})\n"))


def test_a_study_of_another_commit_is_refused(launcher, tmp_path, monkeypatch):
  workdir = epath.Path(tmp_path)
  monkeypatch.setattr(launcher.card, "commit", lambda: "abc")
  launcher.claim(workdir, launcher.facts("c.py"))
  launcher.claim(workdir, launcher.facts("c.py"))
  monkeypatch.setattr(launcher.card, "commit", lambda: "def")
  with pytest.raises(types.UserError, match="commit: expected 'abc'"):
    launcher.claim(workdir, launcher.facts("c.py"))
  monkeypatch.setattr(launcher.card, "commit", lambda: "abc-dirty")
  launcher.flags.FLAGS(["study"])
  with pytest.raises(types.UserError, match="commit first"):
    launcher.claim(workdir, launcher.facts("c.py"))


ABOUT = {"config": "configs/plan.py:runlocal", "commit": "abc", "jax": "1",
         "machine": "one"}


def recorded(arm, seed, rate=None, **fields):
  about = ABOUT | {
    "em_after": 0.5, "em": "80", "count": 1, "questions": "q", "hops": {},
    "curve": {"0": 0.5}, "searches": 1.0, "recall": None, "seconds": 1.0,
    "step_seconds": None,
  }
  return about | {"arm": arm, "seed": seed, "rate": rate} | fields


@pytest.fixture
def told(launcher, tmp_path):
  """A plan, its folder and a record: ppo has its rate and seed 0."""
  config = write(tmp_path, "  add('ppo', seeds=2, rates=(1e-4, 1e-3), "
                 "method='ppo')\n")
  path = epath.Path(tmp_path) / "record.jsonl"
  rows = [recorded("start", 0), recorded("ppo", 0),
          recorded("ppo", 99, 1e-4, em_after=0.7), recorded("ppo", 99, 1e-3)]
  path.write_text(files.to_jsonl(rows))
  return study_plan.load(config), epath.Path(tmp_path) / "w", path


def test_a_study_goes_on_from_a_record_without_its_folders(launcher, told):
  plan, workdir, record = told
  (start,) = ready(launcher, plan, workdir, record)
  assert flag(start, "workdir") == [str(workdir / "start/seed_1")]
  finish(workdir / "start/seed_1")
  (run,) = ready(launcher, plan, workdir, record)
  assert flag(run, "workdir") == [str(workdir / "ppo/seed_1")]
  assert flag(run, "config.ppo.policy_lr") == ["0.0001"]
  finish(workdir / "ppo/seed_1")
  assert not ready(launcher, plan, workdir, record)


def test_a_run_that_a_record_has_is_not_played_again(launcher, told):
  plan, workdir, record = told
  for seed in (0, 1):
    finish(workdir / f"start/seed_{seed}")
  runs = ready(launcher, plan, workdir, record)
  assert [flag(c, "config.seed") for c in runs] == [["1"]]


def test_a_start_is_played_again_for_an_arm_that_a_record_lacks(
  launcher, told
):
  plan, workdir, record = told
  record.write_text("".join(
    line for line in record.read_text().splitlines(keepends=True)
    if '"arm": "start"' in line
  ))
  runs = ready(launcher, plan, workdir, record)
  assert [flag(c, "workdir")[0].split("/")[-2] for c in runs] == ["start"] * 3
  assert [flag(c, "config.seed") for c in runs] == [["99"], ["0"], ["1"]]


def test_a_record_of_another_commit_or_machine_is_refused(told):
  plan, workdir, record = told
  book, arms = Book(workdir, record), plan.arms
  book.check(ABOUT, arms)
  with pytest.raises(types.UserError, match="commit: expected 'def' as here"):
    book.check(ABOUT | {"commit": "def"}, arms)
  book.check(ABOUT | {"config": "/elsewhere/plan.py:runlocal"}, arms)
  for other in ("other.py:runlocal", "plan.py:shorter,files=a/plan.py"):
    with pytest.raises(types.UserError, match=f"config: expected '{other}'"):
      book.check(ABOUT | {"config": f"configs/{other}"}, arms)
  # Seed 0 has all its runs: only what is still to be played may not mix.
  book.check(ABOUT | {"machine": "two"}, arms)
  lines = record.read_text().splitlines(keepends=True)
  record.write_text("".join(lines[:1] + lines[2:]))
  with pytest.raises(types.UserError, match="--seeds: expected none that was "
                     "begun on one, got 0"):
    Book(workdir, record).check(ABOUT | {"machine": "two"}, arms)


def test_no_table_is_made_of_the_record_of_another_study(told):
  plan, workdir, record = told
  with pytest.raises(types.UserError, match="'other.py' as here"):
    Book(workdir, record).rows(dataclasses.replace(plan, config="a/other.py"))


def test_a_record_gives_the_table_that_the_folders_gave(
  launcher, told, tmp_path, monkeypatch
):
  plan, workdir, record = told
  record.unlink()
  for seed in (0, 99):  # The tuning seed takes part in no comparison.
    fakes.write_study_run(workdir / f"start/seed_{seed}", [0.0, 1.0, 0.0])
  for seed, em in ((0, [0.0, 1.0, 1.0]), (1, [1.0, 1.0, 1.0])):
    fakes.write_study_run(workdir / f"ppo/seed_{seed}", em)
  for rate in (1e-4, 1e-3):
    fakes.write_study_run(workdir / f"rates/ppo/{rate:g}", [rate])
  files.write_text(workdir / "study.json", json.dumps(ABOUT))
  launcher.flags.FLAGS(["study", f"--record={record}"])
  first = launcher.report(plan, workdir, Book(workdir, record))
  assert first[0] == "`configs/plan.py:runlocal`, commit abc, jax 1, one"
  assert len(first) == 6 and first[-1].startswith("| ppo | 2 | 0.833 (")
  assert first[-2].startswith("| start | 1 | 0.333 (")
  assert "| policy_lr 0.001 |" in first[-1]
  empty = epath.Path(tmp_path) / "empty"
  assert launcher.report(plan, empty, Book(empty, record)) == first
  assert len(record.read_text().splitlines()) == 6


def test_a_table_goes_between_the_markers_of_its_own_study(
  launcher, told, tmp_path
):
  plan, workdir, record = told  # Its config is plan.py.
  page = epath.Path(tmp_path) / "page.md"
  page.write_text("a\n<!-- other -->\nb\n<!-- /other -->\n"
                  "<!-- plan -->\nold\n<!-- /plan -->\nc\n")
  launcher.flags.FLAGS(["study", f"--record={record}", f"--report={page}"])
  try:
    launcher.tell(plan, workdir, Book(workdir, record))
    lines = page.read_text().splitlines()
    assert lines[:5] == ["a", "<!-- other -->", "b", "<!-- /other -->",
                         "<!-- plan -->"]
    assert lines[-2:] == ["<!-- /plan -->", "c"] and "old" not in lines
    assert lines[5:-2] == (workdir / "study.md").read_text().splitlines()
    page.write_text("<!-- other -->\n<!-- /other -->\n")
    with pytest.raises(types.UserError, match="--report.*<!-- plan -->"):
      launcher.tell(plan, workdir, Book(workdir, record))
  finally:
    launcher.flags.FLAGS(["study", "--report="])


def test_a_record_loses_nothing_and_mixes_nothing(launcher, told):
  plan, workdir, record = told
  with record.open("a") as file:
    file.write(files.to_jsonl([recorded("an arm of before", 0)]))
  rows = Book(workdir, record).rows(plan)
  assert [row["arm"] for row in rows] == ["start"] + ["ppo"] * 3 + [
    "an arm of before"
  ]
  files.write_text(workdir / "study.json", json.dumps(ABOUT | {"commit": "x"}))
  with pytest.raises(types.UserError, match="commit: expected 'x' as here"):
    Book(workdir, record).rows(plan)


def test_a_row_that_is_no_run_is_named(told):
  *_, record = told
  with record.open("a") as file:
    file.write('{"arm": "ppo", "seed": 1}\n')
  with pytest.raises(types.UserError, match="record.jsonl:5: .* got 'no .*em"):
    Book(record.parent, record)
