"""Names, wordings and sentences of the embedded world.

What a relation is called is drawn here once per world: each has three wordings,
of which the passages use two. It must not know about splits or questions'
files, which are `world`'s matter.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

# Share of each kind among a split's entities.
KINDS = {"person": 0.25, "city": 0.25, "company": 0.25, "film": 0.25}

# relation: (kind of its subject, kind of its object, what it may be called).
RELATIONS = {
  "director": ("film", "person", "director filmmaker auteur"),
  "studio": ("film", "company", "studio producer backer"),
  "founder": ("company", "person", "founder originator builder"),
  "headquarters": ("company", "city", "headquarters base seat"),
  "birthplace": ("person", "city", "birthplace hometown cradle"),
  "spouse": ("person", "person", "spouse partner consort"),
  "employer": ("person", "company", "employer firm workplace"),
  "mayor": ("city", "person", "mayor warden provost"),
  "twin": ("city", "city", "twin sister double"),
}

# One word in a question for two relations in a row.
COMPOSITES: dict[tuple[str, ...], str] = {
  ("employer", "founder"): "patron",
  ("birthplace", "mayor"): "guardian",
}

_FACTS = (
  "The {word} of {subject} is {object}.",
  "As {word} {subject} has {object}.",
)
_QUESTIONS = ("Who or what is {phrase}?", "Name {phrase}.", "Find {phrase}.")
_THINGS = (
  "harp bridge tower lamp clock garden mill boat kite wheel forest castle "
  "market violin"
).split()
_ONSETS = (
  "Bal Bren Cal Cor Dal Dor Eld Fal Fen Gal Gor Hal Hol Ill Jor Kal Kes Lor "
  "Mal Mir Nal Nor Oss Pal Pel Quor Ral Ros Sal Sol Tal Tor Ul Val Ves Wen "
  "Yar Zal Zor Bru"
)
_ENDINGS = (
  "a an ara eda el en eth ia ian id il im in io is ita o on or os u un ur us "
  "yn"
)


_PARTS = 120  # First words of names; as many others are second ones.


def name_pool(rng: np.random.Generator) -> list[str]:
  """All names there are, in random order; each is two words."""
  pairs = itertools.product(_ONSETS.split(), _ENDINGS.split())
  words = [onset + ending for onset, ending in pairs]
  words = [words[i] for i in rng.permutation(len(words))[: 2 * _PARTS]]
  pool = [
    f"{first} {second}" for first, second in
    itertools.product(words[:_PARTS], words[_PARTS:])
  ]
  return [pool[i] for i in rng.permutation(len(pool))]


class Wordings:
  """What the passages of one world call each relation.

  Attributes:
    ordered: per relation all its wordings: the usual one of this corpus, the
      rare one, then those that it never uses.
    rare: share of passages with the rare one.
  """

  def __init__(self, rare: float, rng: np.random.Generator):
    """Draws the order of every relation's wordings."""
    self.rare = rare
    self.ordered = {
      relation: tuple(rng.permutation(words.split()).tolist())
      for relation, (_, _, words) in RELATIONS.items()
    }

  def of_passage(self, relation: str, rng: np.random.Generator) -> str:
    """The wording of a new passage."""
    return self.ordered[relation][int(rng.random() < self.rare)]

  def of_question(self, relation: str, rng: np.random.Generator) -> str:
    """Any wording: who asks does not know the corpus."""
    return str(rng.choice(self.ordered[relation]))

  def queries(self, relation: str, name: str) -> list[str]:
    """Every way to ask for a relation of `name`, in this corpus' order."""
    return [f"{name} {word}" for word in self.ordered[relation]]


def fact(
  word: str, subject: str, target: str, rng: np.random.Generator
) -> str:
  """A passage that states a fact."""
  form = _FACTS[rng.integers(len(_FACTS))]
  return form.format(word=word, subject=subject, object=target)


def introduction(kind: str, name: str) -> str:
  """A passage that says what `name` is and no more."""
  return f"Little is known of the {kind} {name}."


def also_called(alias: str, name: str) -> str:
  """The passage under an alias."""
  return f"The other name of {alias} is {name}."


class Passage(NamedTuple):
  """Title and text."""

  title: str
  text: str


def memorial(name: str, rng: np.random.Generator) -> Passage:
  """A passage that mentions `name` and tells nothing about it."""
  thing = rng.choice(_THINGS)
  return Passage(
    f"The {thing} of {name}",
    f"Visitors like the {thing}, which is named after {name}.",
  )


def mention(kind: str, name: str) -> str:
  """How a question names its first entity."""
  return f"the {kind} {name}"


def question(
  relations: tuple[str, ...], start: str, wordings: Wordings,
  rng: np.random.Generator,
) -> str:
  """A question for the end of a walk.

  Args:
    relations: from the start on.
    start: mention of the first entity.
    wordings: of this world.
    rng: chooses words; half of the pairs in `COMPOSITES` become one.
  """
  phrase, place = start, 0
  while place < len(relations):
    word = COMPOSITES.get(relations[place : place + 2])
    if word is None or rng.random() < 0.5:
      word = wordings.of_question(relations[place], rng)
      place += 1
    else:
      place += 2
    phrase = f"the {word} of {phrase}"
  form = _QUESTIONS[rng.integers(len(_QUESTIONS))]
  return form.format(phrase=phrase)
