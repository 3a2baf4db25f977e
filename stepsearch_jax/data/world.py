"""The embedded world: a deterministic multi-hop benchmark in MuSiQue's schema.

Reading is easy in it and searching is hard. A passage is one sentence and ends
with what it says; a name is two words. What decides is which query to ask and
when to stop:

- Each relation has several wordings. Questions use any, passages one or two of
  them, and a query in another wording finds something else about that name.
- Entities of different kinds share names, so that a name alone finds nothing.
- Some passages name an entity by an alias; its facts stand under its name.
- Some words of a question stand for two relations in a row.
- Every entity has a passage without facts, some names are mentioned elsewhere.

Training, validation and held-out questions are about different entities: they
share no fact, hence no part of a chain in either direction. The files look
like real data and go through the same loaders, index and rewards.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.data import world_text as text

SPLITS = ("train", "validation", "heldout")
_SHARES = (0.75, 0.1, 0.15)  # Of the entities.
_HOP_SHARES = {2: 0.5, 3: 0.3, 4: 0.2}
_NAMES = 0.5  # Per entity: two share one, each of another kind.
_MEMORIALS = 0.25  # Of the entities are mentioned somewhere else.
_ALIASED = 0.5  # Of the mentions of an entity with an alias use it.
_TRIES = 200  # Walks per wanted question before a world counts as too small.


@dataclasses.dataclass(frozen=True)
class WorldSpec:
  """Size and shape of a world.

  Attributes:
    seed: same spec, same world.
    train, validation, heldout: questions of each split.
    entities: of all splits together.
    alias_share: entities that have a second name.
    rare_wording: passages that use a relation's second wording.
  """

  seed: int
  train: int
  validation: int
  heldout: int
  entities: int
  alias_share: float
  rare_wording: float

  def __post_init__(self):
    for name in SPLITS:
      if getattr(self, name) < 0:
        raise types.UserError(
          f"data.world.{name} must be >= 0, got {getattr(self, name)}"
        )
    if not 200 <= self.entities <= 15000:
      raise types.UserError(
        "data.world.entities must be between 200 and 15000 (there are "
        f"14,400 names), got {self.entities}"
      )
    if not 0 <= self.alias_share <= 0.25:
      raise types.UserError(
        "data.world.alias_share must be in [0, 0.25], got "
        f"{self.alias_share}"
      )
    if not 0 <= self.rare_wording <= 0.5:
      raise types.UserError(
        "data.world.rare_wording must be in [0, 0.5], got "
        f"{self.rare_wording}"
      )


@dataclasses.dataclass(frozen=True)
class Entity:
  """A node: `kind` is its type, `alias` another name or ""."""

  number: int
  split: str
  kind: str
  name: str
  alias: str


@dataclasses.dataclass(frozen=True)
class Fact:
  """An edge. `called` is the object's name or alias, as its passage says."""

  subject: int
  relation: str
  object: int
  called: str
  word: str
  passage: int


@dataclasses.dataclass(frozen=True)
class Chain:
  """A question's facts: start entity and the relations to follow."""

  start: int
  relations: tuple[str, ...]


@dataclasses.dataclass
class World:
  """Everything that is written out; rows are JSON-able."""

  train: list[dict]
  validation: list[dict]
  heldout: list[dict]
  passages: list[dict]


class Graph:
  """Entities, facts by subject and relation, and the passages about them."""

  def __init__(self, spec: WorldSpec, rng: np.random.Generator):
    """Draws a world without questions."""
    self.wordings = text.Wordings(spec.rare_wording, rng)
    self.entities = _entities(spec, rng)
    self.passages: list[dict] = []
    self.facts: dict[tuple[int, str], Fact] = {}
    self.alias_passages: dict[int, int] = {}
    members: dict[tuple[str, str], list[Entity]] = {}
    for entity in self.entities:
      members.setdefault((entity.split, entity.kind), []).append(entity)
    for entity in self.entities:
      self._describe(entity, members, rng)

  def _add(self, title: str, content: str) -> int:
    number = len(self.passages)
    self.passages.append({"id": str(number), "title": title, "text": content})
    return number

  def _describe(self, entity, members, rng) -> None:
    """Writes the passages of one entity."""
    name = entity.name
    self._add(name, text.introduction(entity.kind, name))
    if rng.random() < _MEMORIALS:
      self._add(*text.memorial(name, rng))
    if entity.alias:
      self.alias_passages[entity.number] = self._add(
        entity.alias, text.also_called(entity.alias, name)
      )
    for relation, (kind, target, _) in text.RELATIONS.items():
      if kind != entity.kind:
        continue
      others = [
        e for e in members[entity.split, target]
        if e.number != entity.number and e.name != name
      ]
      other = others[rng.integers(len(others))]
      called = other.name
      if other.alias and rng.random() < _ALIASED:
        called = other.alias
      word = self.wordings.of_passage(relation, rng)
      number = self._add(name, text.fact(word, name, called, rng))
      self.facts[entity.number, relation] = Fact(
        entity.number, relation, other.number, called, word, number
      )

  def follow(self, chain: Chain) -> list[Fact]:
    """The facts of a chain in order."""
    found, node = [], chain.start
    for relation in chain.relations:
      found.append(self.facts[node, relation])
      node = found[-1].object
    return found

  def hops(self, facts: list[Fact]) -> int:
    """Searches that a chain needs: its facts, and aliases on the way."""
    return len(facts) + sum(
      fact.called != self.entities[fact.object].name for fact in facts[:-1]
    )

  def walk(
    self, starts: list[Entity], length: int, rng: np.random.Generator
  ) -> Chain | None:
    """A random chain of `length` relations that meets no name twice."""
    start = starts[rng.integers(len(starts))]
    node, seen, relations = start, {start.name}, []
    for _ in range(length):
      options = [
        relation for relation, (kind, _, _) in text.RELATIONS.items()
        if kind == node.kind
      ]
      relation = options[rng.integers(len(options))]
      node = self.entities[self.facts[node.number, relation].object]
      if node.name in seen:
        return None
      seen.add(node.name)
      relations.append(relation)
    return Chain(start.number, tuple(relations))


def _entities(spec: WorldSpec, rng: np.random.Generator) -> list[Entity]:
  """All entities; one name belongs to one entity of each kind at most.

  No name is of two splits, but the words that names consist of are the same
  everywhere: a policy that starts from nothing has seen every word.
  """
  pool = text.name_pool(rng)
  made: list[Entity] = []
  for split, share in zip(SPLITS, _SHARES, strict=True):
    count = round(spec.entities * share)
    names = [pool.pop() for _ in range(round(count * _NAMES))]
    for kind, part in text.KINDS.items():
      wanted = max(round(count * part), 3)
      for i in rng.permutation(len(names))[:wanted]:
        aliased = rng.random() < spec.alias_share
        alias = pool.pop() if aliased else ""
        made.append(Entity(len(made), split, kind, names[i], alias))
  return made


def make_world(spec: WorldSpec) -> World:
  """Builds the world of a spec.

  Returns:
    The world; half of each split's questions need two searches, three tenths
    three, a fifth four.

  Raises:
    UserError: the world is too small for so many questions.
  """
  rng = np.random.default_rng(spec.seed)
  graph = Graph(spec, rng)
  rows = {}
  for split in SPLITS:
    chains = _chains(graph, split, getattr(spec, split), rng)
    rows[split] = [
      _question(graph, chain, f"{split}_{number}", rng)
      for number, chain in enumerate(chains)
    ]
  return World(passages=graph.passages, **rows)


def _chains(graph: Graph, split: str, count: int, rng) -> list[Chain]:
  """Distinct chains of a split in random order."""
  starts = [entity for entity in graph.entities if entity.split == split]
  chains: dict[Chain, None] = {}
  share = 0.0
  for hops, part in _HOP_SHARES.items():
    share += part
    wanted = round(count * share)
    for _ in range(_TRIES * max(wanted - len(chains), 0)):
      if len(chains) == wanted:
        break
      chain = graph.walk(starts, int(rng.integers(2, hops + 1)), rng)
      if chain is not None and graph.hops(graph.follow(chain)) == hops:
        chains.setdefault(chain)
    if len(chains) < wanted:
      raise types.UserError(
        f"data.world.{split} = {count} is more than this world holds: found "
        f"{len(chains)} questions; give it more data.world.entities"
      )
  ordered = list(chains)
  return [ordered[i] for i in rng.permutation(len(ordered))]


def _steps(graph: Graph, facts: list[Fact]) -> list[dict]:
  """What has to be searched for: facts, and names behind aliases.

  Returns:
    Per search: question, answer, passage, the wording that finds it and all
    that a person might try.
  """
  steps = []
  for place, fact in enumerate(facts):
    subject = graph.entities[fact.subject]
    before = facts[place - 1].called if place else subject.name
    if before != subject.name:
      queries = graph.wordings.queries(fact.relation, before)
      steps.append({
        "question": f"Who is {before}?",
        "answer": subject.name,
        "passage": graph.alias_passages[subject.number],
        "keys": queries,
        "phrasings": queries,
      })
    name = f"#{len(steps)}" if steps else subject.name
    steps.append({
      "question": f"What is the {fact.word} of {name}?",
      "answer": fact.called,
      "passage": fact.passage,
      "keys": [f"{subject.name} {fact.word}"],
      "phrasings": graph.wordings.queries(fact.relation, subject.name),
    })
  return steps


def _question(graph: Graph, chain: Chain, name: str, rng) -> dict:
  """One row in MuSiQue's schema, with search keys per hop."""
  facts = graph.follow(chain)
  steps = _steps(graph, facts)
  start = graph.entities[chain.start]
  asked = text.question(
    chain.relations, text.mention(start.kind, start.name), graph.wordings, rng
  )
  # Supporting passages among distractors, as in MuSiQue.
  support = [step["passage"] for step in steps]
  others = rng.integers(len(graph.passages), size=6).tolist()
  listed = list(dict.fromkeys([*support, *others]))
  order = [listed[i] for i in rng.permutation(len(listed))]
  end = graph.entities[facts[-1].object]
  names = {facts[-1].called, end.name, end.alias} - {""}
  return {
    "id": f"{len(steps)}hop__world_{name}",
    "data_source": "world",
    "paragraphs": [
      {
        "idx": i,
        "title": graph.passages[p]["title"],
        "paragraph_text": graph.passages[p]["text"],
        "is_supporting": p in support,
      }
      for i, p in enumerate(order)
    ],
    "question": asked,
    "question_decomposition": [
      {
        "id": i,
        "question": step["question"],
        "answer": step["answer"],
        "paragraph_support_idx": order.index(step["passage"]),
      }
      for i, step in enumerate(steps)
    ],
    "answer": facts[-1].called,
    "answer_aliases": sorted(names - {facts[-1].called}),
    "answerable": True,
    "search_keys": [step["keys"] for step in steps],
    "phrasings": [step["phrasings"] for step in steps],
  }


def write_world(folder: epath.PathLike, spec: WorldSpec) -> None:
  """Writes a file per split, and corpus.jsonl last."""
  folder, world = epath.Path(folder), make_world(spec)
  for name in SPLITS:
    rows = files.to_jsonl(getattr(world, name))
    files.write_text(folder / f"{name}.jsonl", rows)
  files.write_text(folder / "corpus.jsonl", files.to_jsonl(world.passages))
