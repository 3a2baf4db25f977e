"""Numbers of a run: batch metrics, summary and evaluation-card settings."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.data import coverage
from stepsearch_jax.evaluation import card as evaluation
from stepsearch_jax.evaluation import playing
from stepsearch_jax.ppo import estimators
from stepsearch_jax.retrieval import remote
from stepsearch_jax.rewards import probe_rewards, step_rewards
from stepsearch_jax.rollout import records
from stepsearch_jax.run import filling, metrics
from stepsearch_jax.run import trajectories as trajectories_lib
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings
from stepsearch_jax.run.state import RunState


def reward_metrics(
  trajectories: Sequence[types.Trajectory],
  scores: Sequence[step_rewards.RewardParts],
) -> dict[str, float]:
  """Means over a batch, under verl's names where verl has them.

  All parts of a reward are among them, paid or not, so that methods can be
  compared. `env/retrieval_recall` is the share of the gold passages that were
  found, over the questions that have some.
  """
  recalls = [
    coverage.retrieval_recall(
      t.question.support, [p for turn in t.turns for p in turn.documents]
    ) for t in trajectories
  ]
  turns = [trajectory.turns for trajectory in trajectories]
  gains = [sum(s.information_gains or ()) for s in scores]
  repeats = [sum(s.redundancy_penalty or ()) for s in scores]
  invalid = [any(t.action == types.Action.INVALID for t in ts) for ts in turns]
  columns: dict[str, Sequence[float]] = {
    "critic/score/mean": [s.score for s in scores],
    "critic/answer_correct/mean": [s.answer_correct for s in scores],
    "critic/search_key/mean": [s.search_key_score for s in scores],
    "critic/step_scores/mean": [sum(s.step_scores) for s in scores],
    "critic/information_gain/mean": gains,
    "critic/redundancy/mean": repeats,
    "env/searches_per_question": [sum(t.retrieved for t in ts) for ts in turns],
    "env/turns_per_question": [len(ts) for ts in turns],
    "env/invalid_share": invalid,
    "env/unanswered_share": [t.answer is None for t in trajectories],
    "env/truncated_documents": [t.truncated_documents for t in trajectories],
    "response_length/mean": [t.policy_mask.sum() for t in trajectories],
    "response_length/max": [max(t.policy_mask.sum() for t in trajectories)],
    "total_length/mean": [len(t.tokens) for t in trajectories],
    "env/retrieval_recall": [x for x in recalls if x is not None],
  }
  means = {
    name: float(np.mean(values)) for name, values in columns.items()
    if len(values)
  }
  probes = [t.probe for t in trajectories if t.probe is not None]
  return means | probe_rewards.metrics(probes)


def clip_ratio(
  trajectories: Sequence[types.Trajectory], context: int, max_turn: int
) -> float:
  """Share of rollouts that a length limit cut, verl's clip_ratio.

  Args:
    trajectories: the rollouts.
    context: tokens of a whole trajectory, at most.
    max_turn: tokens that the policy may write in a turn.
  """
  def is_cut(trajectory):
    written = trajectory.turn_index[trajectory.policy_mask]
    longest = np.bincount(written).max() if len(written) else 0
    return (
      trajectory.stop_reason == types.StopReason.CONTEXT
      or len(trajectory.tokens) >= context or longest >= max_turn
    )

  return float(np.mean([is_cut(t) for t in trajectories]))


def throughput(tokens: int, seconds: float) -> dict[str, float]:
  """Tokens of a step and how fast it went, under verl's names.

  Args:
    tokens: of the batch that was trained on, prompts included.
    seconds: of the whole step.
  """
  return {
    "perf/total_num_tokens": tokens,
    "perf/throughput": tokens / max(seconds, 1e-9) / jax.device_count(),
  }


def step_metrics(
  settings: Settings, filled: filling.Filled, batch: types.RolloutBatch,
  watch: metrics.Stopwatch,
) -> dict[str, float]:
  """Metrics of a step besides the learner's.

  Args:
    settings: of the run.
    filled: what was played.
    batch: what was trained on.
    watch: of the step.
  """
  played, timing = filled.played.trajectories, watch.metrics()
  return {
    **reward_metrics(
      played, [reward.parts for reward in filled.played.rewards]
    ),
    "response_length/clip_ratio": clip_ratio(
      played, settings.sampler.context, settings.rollout.max_turn
    ),
    **filled.metrics(),
    **rollout_metrics(filled.stats, timing["timing_s/step"]),
    **timing,
    **throughput(int(batch.lengths.sum()), timing["timing_s/step"]),
  }


def rollout_metrics(
  stats: records.RolloutStats, step_seconds: float
) -> dict[str, float]:
  """Throughput and waiting of the rollouts of a step of so many seconds."""
  seconds = max(stats.seconds, 1e-9)
  tokens = stats.policy_tokens + stats.ingested_tokens
  return {
    "perf/tokens_per_second": tokens / seconds,
    "perf/policy_tokens_per_second": stats.policy_tokens / seconds,
    "env/failed_searches": stats.failed_searches,
    "perf/idle_slot_share": stats.idle_slot_steps / max(stats.slot_steps, 1),
    "timing_s/gen_decode": stats.decode_seconds,
    "timing_s/gen_extend": stats.extend_seconds,
    "perf/retrieval_wait_share": stats.retrieval_wait_share,
    "timing_s/gen_retrieval_wait": stats.retrieval_wait_seconds,
    "timing_s/gen_probe": stats.probe_seconds,
    "perf/probe_share": stats.probe_seconds / max(step_seconds, 1e-9),
  }


def summary(settings: Settings, state: RunState) -> dict:
  """What `summary.json` holds, from a run's last state.

  `train_seconds` is the time that led to this state: of every start, from the
  building of its models to its last checkpoint. `wall_clock.summary` adds
  `wall_seconds`, all time of all starts, and what it went to.
  """
  before, after = state.baseline, state.latest
  return {
    "em_before": before["em"],
    "em_after": after["em"],
    **{name: after[name] for name in after if name.endswith("_hops")},
    "f1_before": before["f1"],
    "f1_after": after["f1"],
    "searches_per_question": after["searches"],
    "train_seconds": state.seconds,
    "steps": state.step,
    "seed": settings.seed,
    "method": settings.method,
  }


def evaluate(
  experiment: Experiment, policy: types.Tree, name: str, folder: epath.Path,
  **changes: Any,
) -> dict:
  """Plays the evaluation questions; returns the card.

  Args:
    experiment: the run's parts.
    policy: whole policy parameters.
    name: of the policy, for the card.
    folder: receives card.md, card.json, predictions.jsonl and
      trajectories.jsonl.
    **changes: other fields of `playing.Evaluation`, for instance questions,
      attempts and temperature; `about` changes what the card says.
  """
  settings = experiment.settings
  questions = changes.pop("questions", None)
  if questions is None:
    questions, absent = experiment.eval_questions, experiment.absent_gold
  else:
    absent = experiment.lacking(questions)
  about = card_settings(settings, experiment.retriever, name)
  about["decoding"] = _decoding(
    settings, changes.get("temperature", 0.0), changes.get("attempts", 1)
  )
  about |= changes.pop("about", {})
  job = playing.Evaluation(
    questions, about, folder, absent=absent,
    chunk=max(256, 8 * settings.sampler.slots),
    circumstances=_circumstances(), described=settings.log.trajectories,
    describe=functools.partial(
      trajectories_lib.describe_evaluated, settings.reward,
      experiment.tokenizer,
    ), **changes,
  )
  return playing.evaluate(experiment.engine, policy, experiment.tokenizer, job)


def training_settings(settings: Settings, step: int) -> dict[str, Any]:
  """What decided a policy that a run trained, for its cards.

  Args:
    settings: of the run; the card has their seed already.
    step: of the policy.
  """
  config = settings.config
  steps = config["total_steps"] or f"{config['total_epochs']:g} epochs"
  found = {
    "method": settings.method,
    "trained_on": settings.data.train,
    "trained_steps": f"{step} of {steps}",
    "batch": f"{settings.batch.questions} questions x "
             f"{settings.batch.rollouts} rollouts",
    "policy_lr": config["ppo"]["policy_lr"],
  }
  if estimators.find(settings.learner(1).estimator.name).needs_values:
    found["value_lr"] = config["ppo"]["value_lr"]
  begin = settings.warm_start
  if begin.policy or begin.steps:
    found["warm_start"] = begin.policy or f"{begin.steps} steps of imitation"
  return found


def _circumstances() -> dict[str, str]:
  """When, where and with what an evaluation is played."""
  return {
    "date": datetime.date.today().isoformat(),
    "machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "jax": jax.__version__,
  }


def _decoding(settings: Settings, temperature: float, attempts: int) -> str:
  """How tokens are chosen, for the card."""
  if not temperature:
    return "greedy"
  kept = settings.sampler
  limits = f"top_k {kept.top_k}, " if kept.top_k else ""
  limits += f"top_p {kept.top_p:g}, " if kept.top_p < 1 else ""
  return (f"sampled at temperature {temperature:g}, {limits}{attempts} "
          "attempts (EM and F1 are avg@k)")


def _corpus_name(settings: Settings) -> str:
  """What an evaluation searched, as far as the settings tell."""
  if settings.retrieval.remote:
    return f"whatever {remote.public_url(settings.retrieval.remote)} searches"
  if settings.retrieval.engine == "online":
    return "the web"
  if settings.data.corpus:
    return settings.data.corpus
  if settings.data.train == "world":
    return "the embedded world"
  return "paragraphs of the question files"


def card_settings(
  settings: Settings, retriever: types.Retriever, model_name: str
) -> dict:
  """The settings half of an evaluation card."""
  world = settings.data.train == "world"
  return {
    "model": model_name,
    "questions": settings.data.eval or settings.data.train,
    "split": "evaluation file" if settings.data.eval else (
      "validation" if world and settings.data.split == "validation"
      else "held out"
    ),
    "corpus": _corpus_name(settings),
    **retriever.describe(),
    "k": settings.protocol.topk,
    "documents": settings.protocol.documents,
    "template": settings.protocol.template,
    "max_turns": settings.protocol.max_turns,
    "context": settings.sampler.context,
    "max_turn": settings.rollout.max_turn,
    "max_observation": settings.rollout.max_observation,
    "reward_preset": settings.config["reward"]["preset"],
    "seed": settings.seed,
    "commit": evaluation.commit(),
  }
