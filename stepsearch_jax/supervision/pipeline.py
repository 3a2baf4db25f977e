"""Step supervision for question sets: search queries that really find.

The pipeline of the paper (arXiv 2505.15107, section 3.1), of which only the
result was published: (a) a question is decomposed, by its own data or by a
language model; (b) language models write search queries for every sub-question;
(c) a query is kept when at least ceil(M/2) of M retrievers return a supporting
passage among the first k; (d) the kept queries become the search keys.

Knows text, writers and retrievers; no JAX.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import tqdm
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.data import coverage
from stepsearch_jax.rewards import text_match

_QUERY_PROMPT = (
  "Write {count} different short web search queries, one per line, that would "
  "find a passage answering this question. Write nothing else.\n"
  "Question: {question}\nQueries:\n"
)
_BATCH = 32  # Prompts of a call, which are lost if the process dies in it.
_QUERIES = 64  # Asked of a retriever at a time.
_MARKER = re.compile(r"^\s*(?:[-*•]|\(?\d+[.):])\s*")
_WEAK = frozenset(
  "a an the of in on at to for by with is are was were be been do does did has "
  "have had who whom whose what which when where why how many much and or that "
  "this it its as from".split()
)


class Writer(Protocol):
  """Something that answers prompts.

  Attributes:
    name: identifies the writer and its settings, the key of the cache.

  A writer may also say how many prompts it likes in a call (`batch`) and how
  many calls at a time (`at_once`, 1).
  """

  name: str

  def write(self, prompts: Sequence[str]) -> list[str]:
    """Returns one completion per prompt."""


class CachedWriter:
  """Remembers every completion on disk; a prompt is never written twice."""

  def __init__(self, inner: Writer, folder: epath.PathLike):
    """Opens the cache of one writer in `folder`."""
    self.name = inner.name
    self._inner = inner
    digest = hashlib.sha256(inner.name.encode()).hexdigest()[:16]
    self._log = files.RowLog(epath.Path(folder) / f"{digest}.jsonl")
    self._known = {row["prompt"]: row["text"] for row in self._log.rows()}

  def write(self, prompts: Sequence[str]) -> list[str]:
    """Returns completions as `Writer.write`; stores new ones by batches."""
    missing = [p for p in dict.fromkeys(prompts) if p not in self._known]
    bar = tqdm.tqdm(total=len(missing), desc=self.name, unit="prompt",
                    disable=not missing)
    size = getattr(self._inner, "batch", _BATCH)

    def ask(start):
      part = missing[start : start + size]
      texts = self._inner.write(part)
      for prompt, text in zip(part, texts, strict=True):
        self._log.append({"prompt": prompt, "text": text})
        self._known[prompt] = text
      bar.update(len(part))

    at_once = getattr(self._inner, "at_once", 1)
    try:
      with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        # A failure cancels what has not begun; what has is stored.
        collections.deque(pool.map(ask, range(0, len(missing), size)), 0)
    finally:
      bar.close()
      self._log.close()
    return [self._known[prompt] for prompt in prompts]


class RuleWriter:
  """Paraphrases by rule: needs no model, and knows MuSiQue's `x >> relation`.

  Reads the question out of the query prompt and answers it like a model would.
  """

  name = "rules"

  def write(self, prompts: Sequence[str]) -> list[str]:
    """Returns queries, one per line, for each prompt."""
    return ["\n".join(self._queries(prompt)) for prompt in prompts]

  def _queries(self, prompt: str) -> list[str]:
    question = prompt.rsplit("Question: ", 1)[1].split("\n", 1)[0].strip(" ?")
    if ">>" in question:
      entity, relation = (part.strip() for part in question.split(">>", 1))
      return [f"{entity} {relation}", f"{relation} of {entity}", entity]
    words = question.split()
    strong = [w for w in words if w.lower() not in _WEAK]
    names = [w for w in words[1:] if w[:1].isupper() or w[:1].isdigit()]
    return [q for q in (question, " ".join(strong), " ".join(names)) if q]


def resolved(question: types.Question) -> list[str]:
  """Returns the sub-questions with #1, #2 replaced by earlier answers."""
  return types.resolved(question.decomposition)


def without_marker(line: str) -> str:
  """Returns a line of a list without its number or bullet."""
  return _MARKER.sub("", line).strip()


def parse_queries(text: str, count: int) -> list[str]:
  """Returns the first `count` distinct queries of a text, one per line."""
  queries = []
  for line in text.splitlines():
    query = without_marker(line).strip("\"'`")
    if query and len(query) <= 200 and query not in queries:
      queries.append(query)
  return queries[:count]


def write_queries(
  questions: Sequence[types.Question], writers: Sequence[Writer], count: int
) -> list[list[dict[str, list[str]]]]:
  """Returns {query: names of its writers} per question and hop."""
  hops = [resolved(question) for question in questions]
  prompts = [
    _QUERY_PROMPT.format(count=count, question=hop)
    for group in hops for hop in group
  ]
  texts = {writer.name: iter(writer.write(prompts)) for writer in writers}
  found = []
  for group in hops:
    found.append([])
    for _ in group:
      queries: dict[str, list[str]] = {}
      for name, completions in texts.items():
        for query in parse_queries(next(completions), count):
          queries.setdefault(query, []).append(name)
      found[-1].append(queries)
  return found


def gold_of_hop(
  question: types.Question, hop: int
) -> tuple[list[types.Passage], bool]:
  """Returns a hop's gold passages, and whether they are its alone."""
  place = question.decomposition[hop].support
  if 0 <= place < len(question.support):
    return [question.support[place]], True
  return list(question.support), False


def _finds(shown: types.Passage, gold: types.Passage) -> bool:
  """Returns whether a found passage is gold, in whatever wording."""
  return shown.id == gold.id or coverage.contains(shown, gold)


def pseudo_label(
  questions: Sequence[types.Question], retrievers: Mapping[str, object], k: int
) -> list[types.Question]:
  """Gives questions without supporting passages the best guesses.

  Args:
    questions: any; those with supporting passages stay as they are.
    retrievers: by name; each has `search(queries, k)`.
    k: passages looked at per sub-question.

  Returns:
    The questions. The guess for a hop is the first passage found for its
    sub-question whose words hold its answer, retrievers in their order; it is
    flagged in `extra["pseudo_support"]`.
  """
  lacking = [q for q in questions if not q.support and q.decomposition]
  if not lacking:
    return list(questions)
  asked = sorted({hop for q in lacking for hop in resolved(q)})
  answers = _search_all(retrievers, asked, k)
  labeled = {}
  for question in lacking:
    support, hops = [], []
    for text, hop in zip(
      resolved(question), question.decomposition, strict=True
    ):
      found = (p for shown in answers.values() for p in shown[text])
      best = next((p for p in found if _holds(p.text, hop.answer)), None)
      if best is not None:
        hop = dataclasses.replace(hop, support=len(support))
        support.append(dataclasses.replace(best, score=0.0))
      hops.append(hop)
    labeled[question.id] = dataclasses.replace(
      question, support=tuple(support), decomposition=tuple(hops),
      extra={**question.extra, "pseudo_support": True},
    )
  return [q if q.support else labeled.get(q.id, q) for q in questions]


def _holds(text: str, answer: str) -> bool:
  """Returns whether an answer's words are in a text; yes and no never are."""
  words = text_match.normalize_answer(answer)
  if words in ("", "yes", "no"):
    return False
  return f" {words} " in f" {text_match.normalize_answer(text)} "


def _search_all(
  retrievers: Mapping[str, object], queries: Sequence[str], k: int
) -> dict[str, dict[str, list[types.Passage]]]:
  """Returns {retriever: {query: passages}}; all retrievers at a time."""

  def ask(item):
    name, retriever = item
    found = {}
    starts = range(0, len(queries), _QUERIES)
    for start in tqdm.tqdm(starts, name, unit="batch"):
      part = queries[start : start + _QUERIES]
      answers = retriever.search(part, k)
      # A query that a server refuses finds nothing.
      found |= zip(part, [a or [] for a in answers], strict=True)
    return name, found

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return dict(pool.map(ask, retrievers.items()))


def filter_queries(
  questions: Sequence[types.Question],
  written: Sequence[Sequence[Mapping[str, list[str]]]],
  retrievers: Mapping[str, object],
  k: int,
) -> tuple[list[types.Question], dict]:
  """Keeps what at least ceil(M/2) of M retrievers answer well.

  Args:
    questions: with decomposition and supporting passages.
    written: from `write_queries`.
    retrievers: by name; each has `search(queries, k)`.
    k: passages looked at.

  Returns:
    (questions whose search keys are the kept queries, report). The report
    counts queries by hop, writer and retriever, and apart those judged by
    pseudo-labels.
  """
  everything = sorted({q for group in written for hop in group for q in hop})
  answers = _search_all(retrievers, everything, k)
  needed = math.ceil(len(retrievers) / 2)
  counts = collections.defaultdict(collections.Counter)
  out = []
  for question, hops in zip(questions, written, strict=True):
    keys = []
    for hop, queries in enumerate(hops):
      gold, _ = gold_of_hop(question, hop)
      kept = []
      for query, writers in queries.items():
        hits = [
          name for name in retrievers
          if any(_finds(p, g) for p in answers[name][query] for g in gold)
        ]
        good = len(hits) >= needed
        kept += [query] if good else []
        groups = [f"hop {hop + 1}", "all", *(f"by {w}" for w in writers)]
        if question.extra.get("pseudo_support"):
          groups.append("pseudo-labeled")
        for group in groups:
          counts[group]["written"] += 1
          counts[group]["kept"] += good
          for name in hits:
            counts[group][name] += 1
      counts[f"hop {hop + 1}"]["hops"] += 1
      counts[f"hop {hop + 1}"]["hops with a query"] += bool(kept)
      keys.append(tuple(kept))
    out.append(dataclasses.replace(question, search_keys=tuple(keys)))
  return out, {name: dict(group) for name, group in sorted(counts.items())}


def released_row(question: types.Question) -> dict:
  """Returns a question in the schema of StepSearch's released files.

  Three fields more are this project's: `decomposition` with the `phrasings` of
  each hop, by which demonstrations are scripted, and `pseudo_support`, true if
  the supporting passages are guesses, passages in which the sub-answers stand.
  """
  hops = zip(resolved(question), question.search_keys, strict=True)
  return {
    "id": question.id,
    "data_source": question.source,
    "question": question.text,
    "final_answer": question.answers[0],
    "answer_aliases": list(question.answers[1:]),
    # A hop without a query would be a key that nobody can ever match.
    "sub_searchs": [list(group) for group in question.search_keys if group],
    "sub_support_docs": [
      {"title": p.title, "paragraph_text": p.text} for p in question.support
    ],
    "decomposition": [dataclasses.asdict(h) for h in question.decomposition],
    "phrasings": [list(queries) or [text] for text, queries in hops],
    "pseudo_support": bool(question.extra.get("pseudo_support")),
  }


def render_report(report: Mapping[str, Mapping[str, int]],
                  retrievers: Sequence[str]) -> str:
  """Returns the report as a Markdown table of shares."""
  lines = ["| queries | written | kept | " + " | ".join(retrievers) + " |",
           "|---" * (3 + len(retrievers)) + "|"]
  for name, group in report.items():
    total = max(group.get("written", 0), 1)
    cells = [f"{group.get(c, 0) / total:.2f}" for c in ("kept", *retrievers)]
    lines.append(f"| {name} | {group.get('written', 0)} | "
                 + " | ".join(cells) + " |")
  return "\n".join(lines)


def write_rows(path: epath.Path, rows: Sequence[dict]) -> None:
  """Writes .jsonl or .parquet, whole or not at all.

  Raises:
    files.DataError: another file type.
  """
  if path.name.endswith(".parquet"):
    import pyarrow
    from pyarrow import parquet

    with files.writing(path) as file:
      parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
  elif path.name.endswith(".jsonl"):
    files.write_text(path, files.to_jsonl(rows))
  else:
    raise files.DataError(f"{path}: expected .jsonl or .parquet")
