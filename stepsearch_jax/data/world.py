"""The embedded world: a deterministic multi-hop benchmark in MuSiQue's schema.

Entities of seven types are linked by ten relations; every entity has a short
passage that states its facts in varied sentences. Questions are walks of two
to four relations, phrased as nested noun phrases. Some passages share a title
with an entity of another kind, some mention an entity without the fact.
Training and held-out questions share no chain. The files look like real data
and go through the same loaders, index and rewards.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from etils import epath

from stepsearch_jax.data import world_text as text


@dataclasses.dataclass(frozen=True)
class Entity:
  """A node: `kind` is its type, `alias` another accepted name or ""."""

  number: int
  kind: str
  name: str
  alias: str = ""


@dataclasses.dataclass(frozen=True)
class Chain:
  """A question's facts: start entity and the relations to follow."""

  start: int
  relations: tuple[str, ...]


@dataclasses.dataclass
class World:
  """Everything that is written out; rows are JSON-able."""

  train: list[dict]
  heldout: list[dict]
  passages: list[dict]


class _Graph:
  """Entities, facts {(entity, relation): entity} and their passages."""

  def __init__(self, rng: np.random.Generator):
    self.entities: list[Entity] = []
    self.facts: dict[tuple[int, str], int] = {}
    self.by_kind: dict[str, list[int]] = {kind: [] for kind in text.COUNTS}
    for kind, count in text.COUNTS.items():
      for name, alias in text.names(kind, count, rng):
        entity = Entity(len(self.entities), kind, name, alias)
        self.entities.append(entity)
        self.by_kind[kind].append(entity.number)
    for relation, (kind, target, share) in text.RELATIONS.items():
      for number in self.by_kind[kind]:
        if rng.random() < share:
          choices = self.by_kind[target]
          other = int(choices[rng.integers(len(choices))])
          if other != number:
            self.facts[number, relation] = other

  def outgoing(self, number: int) -> list[str]:
    kind = self.entities[number].kind
    return [
      relation
      for relation, (source, _, _) in text.RELATIONS.items()
      if source == kind and (number, relation) in self.facts
    ]

  def passage(self, number: int, rng: np.random.Generator) -> dict:
    entity = self.entities[number]
    lines = [text.introduction(entity.kind, entity.name, entity.alias, rng)]
    for relation in self.outgoing(number):
      target = self.entities[self.facts[number, relation]].name
      lines.append(text.sentence(relation, entity.name, target, rng))
    return {"title": entity.name, "text": " ".join(lines)}

  def walk(self, hops: int, rng: np.random.Generator) -> Chain | None:
    start = node = int(rng.integers(len(self.entities)))
    seen, relations = {start}, []
    for _ in range(hops):
      options = self.outgoing(node)
      if not options:
        return None
      relation = options[rng.integers(len(options))]
      node = self.facts[node, relation]
      if node in seen:
        return None
      seen.add(node)
      relations.append(relation)
    return Chain(start, tuple(relations))


def make_world(
  seed: int, train: int = 3000, heldout: int = 200
) -> World:
  """Builds the world of a seed.

  Args:
    seed: same seed, same world.
    train: training questions.
    heldout: held-out questions, as many as possible equally split over hops.

  Returns:
    The world; 2-, 3- and 4-hop questions in both parts.
  """
  rng = np.random.default_rng(seed)
  graph = _Graph(rng)
  passages = [graph.passage(e.number, rng) for e in graph.entities]
  passages += text.distractors(graph.entities, rng)
  for number, passage in enumerate(passages):
    passage["id"] = str(number)
  chains: dict[Chain, None] = {}
  for hops, share in zip((2, 3, 4), text.HOP_SHARES, strict=True):
    wanted = len(chains) + int(round((train + heldout) * share))
    while len(chains) < wanted:
      chain = graph.walk(hops, rng)
      if chain is not None:
        chains.setdefault(chain)
  ordered = [list(chains)[i] for i in rng.permutation(len(chains))]
  rows = [
    _question(graph, passages, chain, number, rng)
    for number, chain in enumerate(ordered)
  ]
  return World(rows[heldout:], rows[:heldout], passages)


def _question(graph, passages, chain: Chain, number: int, rng) -> dict:
  """One row in MuSiQue's schema, with search keys per hop."""
  nodes = [chain.start]
  for relation in chain.relations:
    nodes.append(graph.facts[nodes[-1], relation])
  names = [graph.entities[node].name for node in nodes]
  start = graph.entities[chain.start]
  phrase = text.mention(start.kind, start.name)
  for relation in chain.relations[:-1]:
    phrase = text.noun_phrase(relation, phrase, rng)
  asked = text.question(chain.relations[-1], phrase, rng)
  # Supporting passages among distractors, as MuSiQue gives twenty.
  support = nodes[:-1]
  others = [int(i) for i in rng.integers(len(passages), size=12)]
  listed = list(dict.fromkeys([*support, *others]))
  order = [listed[i] for i in rng.permutation(len(listed))]
  hops = []
  for i, relation in enumerate(chain.relations):
    subject = names[i] if i == 0 else f"#{i}"
    hops.append({
      "id": number * 10 + i,
      "question": text.question(relation, subject, rng),
      "answer": names[i + 1],
      "paragraph_support_idx": order.index(support[i]),
    })
  answer = graph.entities[nodes[-1]]
  return {
    "id": f"{len(hops)}hop__world_{number}",
    "data_source": "world",
    "paragraphs": [
      {
        "idx": i,
        "title": passages[p]["title"],
        "paragraph_text": passages[p]["text"],
        "is_supporting": p in support,
      }
      for i, p in enumerate(order)
    ],
    "question": asked,
    "question_decomposition": hops,
    "answer": answer.name,
    "answer_aliases": [answer.alias] if answer.alias else [],
    "answerable": True,
    "search_keys": [
      text.search_keys(relation, names[i])
      for i, relation in enumerate(chain.relations)
    ],
  }


def write_world(folder: epath.PathLike, seed: int) -> None:
  """Writes train.jsonl, heldout.jsonl and corpus.jsonl, all or nothing."""
  folder = epath.Path(folder)
  world = make_world(seed)
  temporary = folder.with_name(folder.name + ".partial")
  if temporary.exists():
    temporary.rmtree()
  temporary.mkdir(parents=True)
  for name, rows in (("train", world.train), ("heldout", world.heldout),
                     ("corpus", world.passages)):
    lines = (json.dumps(row) + "\n" for row in rows)
    (temporary / f"{name}.jsonl").write_text("".join(lines))
  temporary.rename(folder)
