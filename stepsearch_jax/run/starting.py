"""The first state of a run: its newest checkpoint, or a warm start."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from absl import logging
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import batching
from stepsearch_jax.ppo import learner as learner_lib
from stepsearch_jax.run import checkpoints, identity, wall_clock
from stepsearch_jax.run import interrupts as interrupts_lib
from stepsearch_jax.run import warm_start as progress
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.state import RunState
from stepsearch_jax.sft import imitation, scripted, traces


def start(
  experiment: Experiment,
  learner: learner_lib.Learner,
  saver: checkpoints.Checkpointer,
  interrupts: interrupts_lib.Interrupts,
  clock: wall_clock.WallClock,
) -> RunState:
  """Returns the newest checkpoint's state, or that of a fresh run.

  Raises:
    PreemptedError: the warm start was asked to stop.
  """
  # Only shapes and places: a resumed run never builds a second state, and
  # needs no weights from elsewhere.
  shapes = learner.abstract_state()
  found = saver.restore(RunState(0, shapes))
  if found is None:
    clock.lap("start")
    # Spread over the mesh: several processes can only save what they share.
    policy = sharding.put(
      first_policy(experiment, interrupts),
      jax.tree.map(lambda x: x.sharding, shapes.reference),
    )
    clock.lap("warm_start" if experiment.settings.warm_start.steps else "start")
    checkpoints.save_reference(
      experiment.workdir, policy, experiment.model.dtype
    )
    key = jax.random.key(experiment.settings.seed)
    found = RunState(0, learner.start(policy, None, key))
    del policy
  else:
    logging.info("resumed at step %d", found.step)
  reference = checkpoints.load_reference(
    experiment.workdir, shapes.reference
  )
  found.learner = dataclasses.replace(found.learner, reference=reference)
  return found


def check(experiment: Experiment) -> None:
  """Raises a UserError if a fresh run could not start, as far as is known now.

  Its traces may not be there, and the policy that it starts from may be no
  run's or another model's.
  """
  spec = experiment.settings.warm_start
  if identity.has_learned(experiment.workdir):
    return
  types.expect(not spec.traces or epath.Path(spec.traces).exists(),
               "warm_start.traces", "a file", spec.traces)
  if spec.policy:
    _expect_same_model(experiment, spec.policy)


def first_policy(
  experiment: Experiment, interrupts: interrupts_lib.Interrupts
) -> types.Tree:
  """Returns the parameters that a fresh run trains from.

  Raises:
    PreemptedError: the warm start was asked to stop.
  """
  spec = experiment.settings.warm_start
  if spec.policy:
    policy = policy_of(experiment, spec.policy)
  else:
    policy = experiment.initial_policy()
  return warm_start(experiment, policy, interrupts) if spec.steps else policy


def policy_of(experiment: Experiment, workdir: str) -> types.Tree:
  """Returns the newest policy of another run.

  Raises:
    UserError: it is no run, or one with another model or tokenizer.
  """
  _expect_same_model(experiment, workdir)
  other = dataclasses.replace(experiment, workdir=epath.Path(workdir))
  types.expect(
    other.tokenizer.hf.get_vocab() == experiment.tokenizer.hf.get_vocab(),
    "warm_start.policy", "a run with the same tokenizer",
    f"{workdir}, whose tokens differ (trained on another world or other "
    "questions?)",
  )
  step, policy = other.trained_policy()
  logging.info("starting from the policy of %s, step %d", workdir, step)
  return policy


def _expect_same_model(experiment: Experiment, workdir: str) -> None:
  """Raises a UserError unless a run's model is this one's."""
  theirs, ours = (
    identity.flat({name: config[name] for name in ("model", "policy")})
    for config in (
      identity.read(workdir)["config"], experiment.settings.config
    )
  )
  for field, value in ours.items():
    types.expect(
      identity.is_free(field) or theirs.get(field) == value,
      "warm_start.policy", f"a run with {field} = {value!r}",
      f"{workdir} with {theirs.get(field)!r}",
    )


def demonstrations(experiment: Experiment) -> list[types.Trajectory]:
  """Scripted trajectories over the training questions, or a user's traces.

  Raises:
    UserError: none fits the context.
  """
  settings, spec = experiment.settings, experiment.settings.warm_start
  if spec.traces:
    found = traces.read(
      spec.traces, experiment.env, experiment.tokenizer, traces.Limits(
        settings.sampler.context, settings.rollout.max_observation, spec.min_f1
      ),
    )
    logging.info("%s: %s", spec.traces, found.describe())
    return found.trajectories
  rng = np.random.default_rng((settings.seed, 1))
  questions = experiment.train_questions
  order = rng.integers(len(questions), size=spec.trajectories)
  recorded = scripted.demonstrate(
    [questions[i] for i in order], spec.habits, experiment.env,
    experiment.retriever, experiment.tokenizer,
    settings.rollout.max_observation, rng,
  )
  trajectories, failed = recorded.trajectories, recorded.failed
  if failed:
    logging.warning("warm start: %d of %d scripts left out, their searches "
                    "failed", failed, len(order))
  context = settings.sampler.context
  fitting = [t for t in trajectories if len(t.tokens) <= context]
  types.expect(
    bool(fitting), "rollout.context",
    f"room for at least one of {len(trajectories)} scripted trajectories "
    f"({failed} more had no search results)", context,
  )
  logging.info("warm start: %d of %d scripts fit the context", len(fitting),
               len(trajectories))
  return fitting


def warm_start(
  experiment: Experiment, policy: types.Tree,
  interrupts: interrupts_lib.Interrupts,
) -> types.Tree:
  """Returns policy parameters after imitating scripted trajectories.

  Raises:
    PreemptedError: the run was asked to stop; the next start goes on.
  """
  settings, spec = experiment.settings, experiment.settings.warm_start
  scripts = demonstrations(experiment)
  batch = batching.trajectories_to_batch(
    scripts, [np.zeros(len(t.tokens), np.float32) for t in scripts],
    settings.sampler.context, experiment.tokenizer.pad_id,
  )
  keeper = progress.Keeper(
    experiment.workdir, settings.config["warm_start"], interrupts
  )
  params, losses = imitation.imitate(
    policy, batch, experiment.model, experiment.mesh,
    imitation.ImitationSpec(
      spec.steps, spec.rows, spec.row_length, spec.lr, settings.seed
    ),
    keeper,
  )
  keeper.close()
  if losses:
    logging.info("warm start: loss %.3f -> %.3f", losses[0], losses[-1])
  return params
