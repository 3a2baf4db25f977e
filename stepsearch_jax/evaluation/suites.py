"""Benchmark suites: several question files, one card, the published rows.

A suite is given as `musique=FILE,hotpotqa=FILE,...`. Its table has the form of
the paper's: EM and F1 per benchmark, beside what was published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from stepsearch_jax import types
from stepsearch_jax.data import questions

# EM and F1 in StepSearch (arXiv 2505.15107): wiki-18, E5, k = 3.
_COLUMNS = ("hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
PUBLISHED = {
  "StepSearch 3B base": "329/434 339/395 181/273 328/419",
  "PPO 3B base": "223/315 225/273 090/163 176/266",
  "GRPO 3B base": "256/366 256/325 114/190 224/314",
  "StepSearch 7B base": "380/493 385/450 216/324 467/573",
  "PPO 7B base": "374/479 282/329 198/280 432/549",
  "GRPO 7B base": "351/462 266/345 202/291 400/512",
}
# EM averaged over seven benchmarks, as published until November 2026: wiki-18,
# E5, k = 3, Qwen2.5-3B unless said.
SEVEN = ("nq", "triviaqa", "popqa", *_COLUMNS)
PUBLISHED_AVERAGES = {
  "MetaRAG with DAPO": 0.457,
  "GSPO + LLDS": 0.451,
  "GiGPO + DAPO": 0.448,
  "LLDS-GRPO": 0.441,
  "SD-Search (5 seeds)": 0.428,
  "GRPO in SkyRL": 0.421,
  "StepSearch as listed again": 0.311,
  "LLDS, 7B": 0.483,
}
_ALIASES = {
  "2wiki": "2wikimultihopqa", "hotpot": "hotpotqa", "hotpot_qa": "hotpotqa",
  "trivia": "triviaqa", "trivia_qa": "triviaqa",
}


def parse_suite(text: str) -> dict[str, str]:
  """Returns question files by benchmark name.

  Raises:
    UserError: it is not NAME=FILE,NAME=FILE,... with each name once.
  """
  found: dict[str, str] = {}
  for part in text.split(","):
    name, equals, path = part.strip().partition("=")
    name = _ALIASES.get(name.strip().lower(), name.strip().lower())
    if not equals or not name or not path.strip():
      raise types.UserError(
        f"--suite: expected NAME=FILE,NAME=FILE,..., got {part!r}"
      )
    if name in found:
      raise types.UserError(f"--suite: {name} is given twice")
    found[name] = path.strip()
  return found


def load_suite(text: str) -> list[types.Question]:
  """Returns the questions of all files of a suite.

  The benchmark is the source of each question and part of its id.

  Args:
    text: see `parse_suite`.

  Raises:
    UserError: the suite is malformed, or a file is missing, malformed or
      without questions.
  """
  return [
    dataclasses.replace(question, source=name, id=f"{name}/{question.id}")
    for name, path in parse_suite(text).items()
    for question in questions.load_questions(path)
  ]


def table(model: str, sources: Mapping[str, Mapping]) -> list[str]:
  """Returns Markdown lines: this evaluation beside the published rows.

  Args:
    model: name of what was evaluated.
    sources: per benchmark n, em, f1 and their intervals (`card.by_source`).
  """
  names = [name for name in _COLUMNS if name in sources]
  names += [name for name in sources if name not in names]
  ours, counts, intervals = [], [], []
  for name in names:
    row = sources[name]
    ours.append(f"{_short(row['em'])}/{_short(row['f1'])}")
    intervals.append("/".join(
      f"{_short(row[m + '_interval'][0])}-{_short(row[m + '_interval'][1])}"
      for m in ("em", "f1")
    ))
    passed = row.get("pass_at_k")
    counts.append(str(row["n"]) if passed is None else
                  f"{row['n']}, pass@{row['attempts']} {_short(passed)}")
  lines = [
    "EM/F1. Published rows: arXiv 2505.15107, wiki-18, E5, k = 3; a figure "
    "over another corpus, retriever or part of the questions is another "
    "measurement.",
    "", _line("", names), "|---" * (len(names) + 1) + "|",
    _line(model, ours), _line("95 %", intervals), _line("n", counts),
  ]
  for title, cells in PUBLISHED.items():
    known = dict(zip(_COLUMNS, cells.split(), strict=True))
    lines.append(_line(title, [
      "." + known[name].replace("/", "/.") if name in known else "-"
      for name in names
    ]))
  return lines + _averages(model, sources)


def _averages(model: str, sources: Mapping[str, Mapping]) -> list[str]:
  mean = None
  if set(SEVEN) <= set(sources):
    mean = sum(sources[name]["em"] for name in SEVEN) / len(SEVEN)
  ours = "not run" if mean is None else _short(mean)
  return [
    "", "EM, mean of " + ", ".join(SEVEN) + ":", "", "| | EM |", "|---|---|",
    f"| {model} | {ours} |",
    *(f"| {n} | {_short(em)} |" for n, em in PUBLISHED_AVERAGES.items()),
  ]


def _line(title: str, cells: Sequence[str]) -> str:
  return "| " + " | ".join([title, *cells]) + " |"


def _short(value: float) -> str:
  """Returns a share with three digits, as the papers write it: .329."""
  return f"{value:.3f}".removeprefix("0")
