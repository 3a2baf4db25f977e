"""Checkpoints that something has damaged, and disks that take none."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.ppo import records
from stepsearch_jax.run import checkpoints
from stepsearch_jax.run.state import RunState


def state(step):
  params = {"trunk": {"w": jax.random.normal(jax.random.key(step), (64, 64))}}
  learner = records.LearnerState(
    step=jnp.int32(step), kl_coef=jnp.float32(0.1),
    policy=records.Trained(params, {"mu": jnp.full(4096, float(step))}),
    value=None, reference={"w": jnp.zeros(3)},
  )
  return RunState(step, learner, seconds=float(step))


@pytest.fixture
def run(tmp_path):
  """A run with checkpoints 1 and 2."""
  saver = checkpoints.Checkpointer(tmp_path, 2)
  for step in (1, 2):
    saver.save(state(step))
  saver.close()
  return epath.Path(tmp_path)


def cut(folder):
  """Cuts every file of a folder to half of its length."""
  for file in pathlib.Path(folder).rglob("*"):
    if file.is_file():
      data = file.read_bytes()
      file.write_bytes(data[: len(data) // 2])


DAMAGES = {
  "policy cut": lambda f: cut(f / "policy"),
  "rest cut": lambda f: cut(f / "rest"),
  "progress cut": lambda f: cut(f / "progress"),
  "all cut": cut,
  "policy gone": lambda f: shutil.rmtree(f / "policy"),
  "rest gone": lambda f: shutil.rmtree(f / "rest"),
  "progress gone": lambda f: shutil.rmtree(f / "progress"),
  "empty": lambda f: [shutil.rmtree(p) for p in f.iterdir() if p.is_dir()],
  "policy without its manifest": lambda f: (
    f / "policy/manifest.ocdbt").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside_and_written_again(
  run, damage, caplog
):
  DAMAGES[damage](run / "checkpoints/2")
  saver = checkpoints.Checkpointer(run, 2)
  found = saver.restore(state(0))
  assert (found.step, found.seconds) == (1, 1.0)
  assert "checkpoints/2 cannot be read" in caplog.text
  assert (run / "unreadable_checkpoint_2").exists()
  jax.tree.map(
    np.testing.assert_array_equal, found.learner.policy,
    state(1).learner.policy,
  )
  saver.save(state(2))
  saver.close()
  again = checkpoints.Checkpointer(run, 2)
  assert again.restore(state(0)).step == 2
  again.close()
  step, _ = checkpoints.load_policy(run, state(0).learner.policy.params)
  assert step == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_evaluation_and_export_say_which_checkpoint_cannot_be_read(
  run, damage
):
  DAMAGES[damage](run / "checkpoints/2")
  like = state(0).learner.policy.params
  if damage.split()[0] in ("rest", "progress"):  # Not what they read.
    assert checkpoints.load_policy(run, like)[0] == 2
  else:
    with pytest.raises(types.UserError) as error:
      checkpoints.load_policy(run, like)
    for part in ("checkpoints/2/policy", "cannot be read", "[1, 2]", "--step"):
      assert part in str(error.value)
    assert "\n" not in str(error.value)
  assert checkpoints.load_policy(run, like, step=1)[0] == 1


def test_a_run_with_nothing_readable_says_so(run):
  for step in (1, 2):
    cut(run / f"checkpoints/{step}")
  saver = checkpoints.Checkpointer(run, 2)
  with pytest.raises(types.UserError, match="none of the checkpoints"):
    saver.restore(state(0))
  saver.close()


def test_a_checkpoint_of_another_model_is_refused_and_stays(run):
  other = state(0)
  other.learner.policy.params["trunk"]["w"] = jnp.zeros((64, 32))
  saver = checkpoints.Checkpointer(run, 2)
  with pytest.raises(checkpoints.CheckpointMismatchError, match="another mod"):
    saver.restore(other)
  saver.close()
  assert (run / "checkpoints/2").exists()


FULL = ('RESOURCE_EXHAUSTED: Error writing "a/0.0" in OCDBT database at local '
        'file "/x": Failed writing: No space left on device [os_error_code=28')


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_a_full_disk_is_one_line_that_names_the_folder(
  tmp_path, monkeypatch, call
):
  saver = checkpoints.Checkpointer(tmp_path, 2)
  name = {"wait": "wait_until_finished"}.get(call, call)

  def fails(*unused, **also):
    raise ValueError(FULL)

  monkeypatch.setattr(saver._manager, name, fails)
  with pytest.raises(types.UserError) as error:
    getattr(saver, call)(*([state(3)] if call == "save" else []))
  assert str(error.value) == (
    f"{tmp_path / 'checkpoints'}: cannot be written (No space left on device); "
    "what was saved before stands"
  )
  monkeypatch.undo()
  saver.close()


def test_other_errors_of_a_save_keep_their_traceback(tmp_path, monkeypatch):
  saver = checkpoints.Checkpointer(tmp_path, 2)

  def fails(*unused, **also):
    raise ValueError("a bug")

  monkeypatch.setattr(saver._manager, "save", fails)
  with pytest.raises(ValueError, match="a bug") as error:
    saver.save(state(3))
  assert not isinstance(error.value, types.UserError)
  saver.close()
