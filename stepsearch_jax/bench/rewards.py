"""Step rewards beside one scikit-learn fit per document, as released."""

from __future__ import annotations

import numpy as np

from stepsearch_jax import files
from stepsearch_jax.bench import duel
from stepsearch_jax.data import questions, world
from stepsearch_jax.rewards import (
  step_rewards,
  text_match,
  tfidf,
  transcripts,
)


def _world_trajectories(count: int = 64) -> list[tuple[list, list]]:
  """(documents per turn, gold paragraphs) in the shape of real rollouts."""
  rng = np.random.default_rng(0)
  made = world.make_world(world.WorldSpec(
    seed=0, train=count, validation=0, heldout=0, entities=2400,
    alias_share=0.1, rare_wording=0.25,
  ))
  out = []
  for number, row in enumerate(made.train):
    question = questions.parse_question(f"world:{number}", row)
    golds = [passage.text for passage in question.support]
    others = [row["text"] for row in made.passages]
    turns = [
      [golds[rng.integers(len(golds))],
       *(others[i] for i in rng.integers(len(others), size=2))]
      for _ in range(rng.integers(2, 6))
    ]
    out.append((turns, golds))
  return out


def _read_trajectories(path: str) -> list[tuple[list, list]]:
  out = []
  for _, row in files.read_rows(path):
    golds = [d["paragraph_text"] for d in row.get("support_docs") or ()
             if "paragraph_text" in d]
    seen = transcripts.evidence(row["response"])
    if golds and any(seen.documents):
      out.append((list(seen.documents), golds))
  return out


def _sklearn_gains(turns: list[list[str]], golds: list[str]) -> list[float]:
  """The released way: one fit and one cosine per retrieved document."""
  from sklearn.feature_extraction.text import TfidfVectorizer
  from sklearn.metrics.pairwise import cosine_similarity

  clean = [text_match.normalize_answer(gold) for gold in golds]
  memory, gains = np.zeros(len(golds)), []
  for turn in turns:
    best = np.zeros(len(golds))
    for document in turn:
      document = text_match.normalize_answer(document)
      matrix = TfidfVectorizer().fit_transform([document, *clean])
      best = np.maximum(best, cosine_similarity(matrix[:1], matrix[1:])[0])
    gains.append(float(np.maximum(best - memory, 0).sum() / len(golds)))
    memory = np.maximum(memory, best)
  return gains


def duels(path: str | None) -> list[duel.Duel]:
  """Information gain of a batch of trajectories, fitted from nothing.

  Args:
    path: JSONL as tools/score takes it; None for made-up trajectories.
  """
  cases = _read_trajectories(path) if path else _world_trajectories()
  documents = sum(len(turn) for turns, _ in cases for turn in turns)

  def cold(gains):
    """Nothing may be remembered from the repeat before."""
    tfidf.forget()
    text_match.normalize_answer.cache_clear()
    return [gains(*case) for case in cases]

  def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-9)

  return [duel.Duel(
    "information gain", f"{len(cases)} trajectories, {documents} documents",
    "scikit-learn, one fit per document",
    lambda: cold(step_rewards.information_gains),
    lambda: cold(_sklearn_gains), same,
  )]
