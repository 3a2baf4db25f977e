"""Plays a training batch and has its gold answers probed as rewards need it."""

from __future__ import annotations

from collections.abc import Sequence

from stepsearch_jax import types
from stepsearch_jax.rewards.probe_rewards import Kind
from stepsearch_jax.rollout import records
from stepsearch_jax.run.experiment import Experiment

# Ask the policy itself about what it has seen: its warm cache will do.
_WHILE_PLAYING = (Kind.IGPO,)


def play(
  experiment: Experiment, policy: types.Tree, reference: types.Tree,
  questions: Sequence[types.Question], episodes: Sequence[int],
) -> records.Rollout:
  """Returns rollouts, probed by the model that the probe reward asks.

  Args:
    experiment: the run's parts.
    policy: whole policy parameters.
    reference: those of the frozen one.
    questions: what to ask.
    episodes: rollout numbers, one per question.
  """
  settings, engine = experiment.settings, experiment.engine
  kind = settings.reward.probe.reward
  rollout = engine.run(
    policy, questions, episodes, settings.config["rollout"]["temperature"],
    probe=kind in _WHILE_PLAYING,
  )
  if kind == Kind.TIPS:
    engine.probe(reference, rollout)
  elif kind == Kind.IG_SEARCH:
    engine.probe(policy, rollout)
  return rollout


def check_questions(experiment: Experiment) -> None:
  """Raises a UserError for questions that a run could not play or reward.

  Every prompt has to fit; of what is trained on some answer has to fit a probe
  where one is asked for.
  """
  questions = experiment.train_questions
  spec, texts = experiment.settings.rollout.probe, experiment.texts
  types.expect(
    spec is None or any(
      texts.answers(question).chosen(spec).aliases for question in questions
    ),
    "probe.tokens", "room for a gold answer of at least one question",
    spec and spec.tokens,
  )
  engine = experiment.engine  # Which builds the index, perhaps for long.
  for question in questions + experiment.eval_questions:
    engine.prompt_tokens(question)
