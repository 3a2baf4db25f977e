"""Numbers of a run: batch metrics, summary and evaluation-card settings."""

from __future__ import annotations

import numpy as np

from stepsearch_jax.evaluation import card as evaluation
from stepsearch_jax.retrieval import remote
from stepsearch_jax.rollout import records


def reward_metrics(trajectories, scores) -> dict[str, float]:
  """Means over a batch, under verl's names where verl has them."""
  turns = [trajectory.turns for trajectory in trajectories]
  gains = [sum(s.information_gains or ()) for s in scores]
  repeats = [sum(s.redundancy_penalty or ()) for s in scores]
  invalid = [any(t.action == "invalid" for t in ts) for ts in turns]
  columns = {
    "critic/score/mean": [s.score for s in scores],
    "critic/answer_correct/mean": [s.answer_correct for s in scores],
    "critic/search_key/mean": [s.search_key_score for s in scores],
    "critic/step_scores/mean": [sum(s.step_scores) for s in scores],
    "critic/information_gain/mean": gains,
    "critic/redundancy/mean": repeats,
    "env/searches_per_question": [sum(t.answered for t in ts) for ts in turns],
    "env/turns_per_question": [len(ts) for ts in turns],
    "env/invalid_share": invalid,
    "env/unanswered_share": [t.answer is None for t in trajectories],
    "env/truncated_documents": [t.truncated_documents for t in trajectories],
    "response_length/mean": [t.policy_mask.sum() for t in trajectories],
    "response_length/max": [max(t.policy_mask.sum() for t in trajectories)],
    "total_length/mean": [len(t.tokens) for t in trajectories],
  }
  return {name: float(np.mean(values)) for name, values in columns.items()}


def rollout_metrics(stats: records.RolloutStats) -> dict[str, float]:
  """Throughput and waiting of one rollout."""
  seconds = max(stats.seconds, 1e-9)
  tokens = stats.policy_tokens + stats.ingested_tokens
  return {
    "perf/tokens_per_second": tokens / seconds,
    "perf/policy_tokens_per_second": stats.policy_tokens / seconds,
    "env/failed_searches": stats.failed_searches,
    "perf/idle_slot_share": stats.idle_slot_steps / max(stats.slot_steps, 1),
    "timing_s/gen_decode": stats.decode_seconds,
    "timing_s/gen_extend": stats.extend_seconds,
    "timing_s/gen_retrieval_wait": stats.retrieval_wait_seconds,
  }


def summary(config, meta: dict, steps: int) -> dict:
  """What `summary.json` holds."""
  before, after = meta["before"], meta["after"]
  return {
    "em_before": before["em"],
    "em_after": after["em"],
    "f1_before": before["f1"],
    "f1_after": after["f1"],
    "searches_per_question": after["searches"],
    "train_seconds": meta["seconds"],
    "steps": steps,
    "seed": config.seed,
    "algorithm": config.algorithm,
  }


def _corpus_name(config) -> str:
  """What an evaluation searched, as far as the config tells."""
  if config.retrieval.remote:
    return f"whatever {remote.public_url(config.retrieval.remote)} searches"
  if config.retrieval.engine == "online":
    return "the web"
  if config.data.train == "world":
    return "the embedded world"
  return config.data.corpus or "paragraphs of the question files"


def card_settings(config, retriever, model_name: str) -> dict:
  """The settings half of an evaluation card."""
  return {
    "model": model_name,
    "questions": config.data.eval or config.data.train,
    "split": "evaluation file" if config.data.eval else "held out",
    "corpus": _corpus_name(config),
    **retriever.describe(),
    "k": config.retrieval.topk,
    "template": config.rollout.template,
    "max_turns": config.rollout.max_turns,
    "context": config.rollout.context,
    "max_turn": config.rollout.max_turn,
    "max_observation": config.rollout.max_observation,
    "decoding": "greedy",
    "reward_preset": config.reward.preset,
    "seed": config.seed,
    "commit": evaluation.commit(),
  }
