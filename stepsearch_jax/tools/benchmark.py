"""Measures this project beside its peers, in one run, on the same work.

  pip install -e ".[bench]"
  python -m stepsearch_jax.tools.benchmark --suite=rewards --json=rewards.json

Ours and the peer alternate; medians and ratios of at least three repeats are
printed with the workload and the versions, after the results were found equal.
Speeds are ratios on this machine, not promises.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
from absl import flags
from etils import epath

from stepsearch_jax import cli, evaluation
from stepsearch_jax.data import files, questions, world
from stepsearch_jax.rewards import (
  step_rewards,
  text_match,
  tfidf,
  transcripts,
)

_SUITE = flags.DEFINE_enum("suite", None, ["rewards"], "What to measure.")
_INPUT = flags.DEFINE_string(
  "input", None,
  "rewards: JSONL of trajectories as tools/score takes them; default are "
  "made-up ones on the embedded world.",
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Alternating repeats.", 3)
_JSON = flags.DEFINE_string("json", None, "Also write the figures here.")


@dataclasses.dataclass
class Duel:
  """One comparison.

  Attributes:
    what: what is done.
    work: size of the workload in words.
    peer: name of the other way.
    ours, theirs: do the whole work and return its result.
    same: raises when the two results are not the same work.
  """

  what: str
  work: str
  peer: str
  ours: Callable
  theirs: Callable
  same: Callable


def measure(duel: Duel, repeats: int) -> dict:
  """Medians of alternating repeats after one checked warm-up of each."""
  duel.same(duel.ours(), duel.theirs())
  seconds = {"ours": [], "theirs": []}
  for _ in range(repeats):
    for side in seconds:
      began = time.perf_counter()
      getattr(duel, side)()
      seconds[side].append(time.perf_counter() - began)
  ours, theirs = map(statistics.median, seconds.values())
  return {
    "what": duel.what, "work": duel.work, "peer": duel.peer,
    "ours_seconds": ours, "peer_seconds": theirs, "ratio": theirs / ours,
    "repeats": seconds,
  }


def _world_trajectories(count: int = 64) -> list[tuple[list, list]]:
  """(documents per turn, gold paragraphs) in the shape of real rollouts."""
  rng = np.random.default_rng(0)
  made = world.make_world(seed=0, train=count, heldout=0)
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
      out.append((seen.documents, golds))
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


def rewards() -> list[Duel]:
  """Information gain of a batch of trajectories, fitted from nothing."""
  cases = (_read_trajectories(_INPUT.value) if _INPUT.value
           else _world_trajectories())
  documents = sum(len(turn) for turns, _ in cases for turn in turns)

  def cold(gains):
    """Nothing may be remembered from the repeat before."""
    tfidf.forget()
    text_match.normalize_answer.cache_clear()
    return [gains(*case) for case in cases]

  def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-9)

  return [Duel(
    "information gain", f"{len(cases)} trajectories, {documents} documents",
    "scikit-learn, one fit per document",
    lambda: cold(step_rewards.information_gains),
    lambda: cold(_sklearn_gains), same,
  )]


_SUITES = {"rewards": rewards}


def _versions() -> dict[str, str]:
  found = {"python": platform.python_version(), "cores": str(os.cpu_count()),
           "commit": evaluation.commit()}
  for name in ("jax", "numpy", "scikit-learn", "torch"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def main() -> None:
  """Entry; see the module docstring."""
  report = {"suite": _SUITE.value, "versions": _versions(), "results": []}
  print("  ".join(f"{k} {v}" for k, v in report["versions"].items()))
  for duel in _SUITES[_SUITE.value]():
    result = measure(duel, _REPEATS.value)
    report["results"].append(result)
    print(f"{result['what']} ({result['work']}) beside {result['peer']}: "
          f"{result['ours_seconds']:.4f} s, {result['peer_seconds']:.4f} s, "
          f"ratio {result['ratio']:.2f}")
  if _JSON.value:
    epath.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main, required=["suite"])
