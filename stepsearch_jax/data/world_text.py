"""Names, sentences and questions of the embedded world."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types

# Entities of each kind; with the distractors some 1,700 passages.
COUNTS = {
  "person": 440,
  "city": 150,
  "company": 180,
  "film": 220,
  "book": 200,
  "university": 80,
  "region": 30,
}

HOP_SHARES = (0.5, 0.3, 0.2)  # Of 2-, 3- and 4-hop questions.

# relation: (subject kind, object kind, share of subjects that have it).
RELATIONS = {
  "director": ("film", "person", 1.0),
  "author": ("book", "person", 1.0),
  "founder": ("company", "person", 1.0),
  "headquarters": ("company", "city", 0.6),
  "birthplace": ("person", "city", 0.8),
  "spouse": ("person", "person", 0.5),
  "employer": ("person", "company", 0.5),
  "university": ("person", "university", 0.4),
  "campus": ("university", "city", 1.0),
  "region": ("city", "region", 1.0),
}

# Sentences of a passage: {s} has the fact, {o} is the answer.
_SENTENCES = {
  "director": ("{s} was directed by {o}.", "The director was {o}.",
               "{o} directed {s}."),
  "author": ("{s} was written by {o}.", "The author is {o}.",
             "{o} wrote {s}."),
  "founder": ("{s} was founded by {o}.", "The founder was {o}.",
              "{o} founded {s}."),
  "headquarters": ("Its headquarters are in {o}.", "It is based in {o}.",
                   "The main office is in {o}."),
  "birthplace": ("{s} was born in {o}.", "The birthplace was {o}.",
                 "Born in {o}."),
  "spouse": ("{s} was married to {o}.", "The spouse was {o}.",
             "{s} married {o}."),
  "employer": ("{s} worked for {o}.", "The employer was {o}.",
               "{s} joined {o}."),
  "university": ("{s} studied at {o}.", "The alma mater was {o}.",
                 "{s} went to {o}."),
  "campus": ("{s} lies in {o}.", "The campus is in {o}.",
             "Students meet in {o}."),
  "region": ("{s} belongs to {o}.", "The region is {o}.",
             "{s} is part of {o}."),
}

# Noun phrases that point from {x} to the object of a relation.
_PHRASES = {
  "director": ("the director of {x}", "the person who directed {x}"),
  "author": ("the author of {x}", "the person who wrote {x}"),
  "founder": ("the founder of {x}", "the person who founded {x}"),
  "headquarters": ("the headquarters of {x}", "the city where {x} is based"),
  "birthplace": ("the birthplace of {x}", "the city where {x} was born"),
  "spouse": ("the spouse of {x}", "the person married to {x}"),
  "employer": ("the employer of {x}", "the company that {x} worked for"),
  "university": ("the university of {x}", "the university where {x} studied"),
  "campus": ("the campus city of {x}", "the city where {x} lies"),
  "region": ("the region of {x}", "the region that {x} belongs to"),
}

_QUESTIONS = {
  "director": ("Who is the director of {x}?", "Who directed {x}?",
               "{x} was directed by whom?"),
  "author": ("Who is the author of {x}?", "Who wrote {x}?",
             "{x} was written by whom?"),
  "founder": ("Who is the founder of {x}?", "Who founded {x}?",
              "{x} was founded by whom?"),
  "headquarters": ("Where are the headquarters of {x}?",
                   "In which city is {x} based?"),
  "birthplace": ("What is the birthplace of {x}?", "Where was {x} born?",
                 "In which city was {x} born?"),
  "spouse": ("Who is the spouse of {x}?", "Who was married to {x}?",
             "Whom did {x} marry?"),
  "employer": ("What is the employer of {x}?",
               "Which company did {x} work for?"),
  "university": ("What is the university of {x}?", "Where did {x} study?"),
  "campus": ("What is the campus city of {x}?", "In which city does {x} lie?"),
  "region": ("What is the region of {x}?",
             "Which region does {x} belong to?"),
}

_INTRODUCTIONS = {
  "person": ("{s} is a {w}.", "{s} became known as a {w}."),
  "city": ("{s} is a town with a {w}.", "{s} is known for its {w}."),
  "company": ("{s} is a company that makes {w}s.",
              "{s} is a maker of {w}s."),
  "film": ("{s} is a film about a {w}.", "{s} is a film with a {w}."),
  "book": ("{s} is a novel about a {w}.", "{s} is a book on a {w}."),
  "university": ("{s} is a university with a {w}.",
                 "{s} is a school known for a {w}."),
  "region": ("{s} is a region with a {w}.", "{s} is a land of {w}s."),
}

_WORDS = {
  "person": "painter singer sailor doctor pilot baker lawyer poet".split(),
  "thing": ("harp bridge tower lamp clock garden mill boat kite wheel forest "
            "castle market violin").split(),
}

_FIRST = (
  "Ada Boris Clara Dorian Edith Felix Greta Hugo Ines Jonas Karin Lorenz "
  "Marta Nils Olga Pavel Rosa Stefan Tessa Ulrich Vera Walter Xenia Yara "
  "Zoltan Agnes Bruno Celia Dmitri Elsa Fabian Gerda Henrik Irma Jakob Klara "
  "Leopold Mira Nadia Oskar Petra Quentin Renata Samuel Thea Urban Viola "
  "Wanda Yusuf Zelda"
).split()
_LAST = (
  "Aldane Brandt Corvin Delmas Ekholm Farrow Gessner Halvard Ibsen Jarrow "
  "Keller Lindqvist Marlow Nordin Oswin Pellar Quist Rookwood Sandoval Tarkin "
  "Ulmer Vantree Westin Yarrow Zander Ashdown Birken Castell Dunmore Elsner "
  "Fenwick Garrick Holloway Ingram Jessop Kirkby Lorimer Mercer Norvell Orwin"
).split()
_CITY = (
  "Dor Lin Mar Hol Ves Kar Tol Ban Fel Gran Sil Wen Bri Cor Nor",
  "wick ton haven mere ford dale bury gate holm stead",
)
_REGION = ("Al Bel Cor Dra Est Fal", "moria venia landia dania rovia")
_TITLE = (
  "Silent Golden Broken Hidden Frozen Distant Crimson Hollow Ancient Restless "
  "Burning Gentle Secret Wandering Lonely Bitter Shining Forgotten",
  "Harbor River Orchard Mirror Winter Garden Empire Shadow Voyage Letter "
  "Island Mountain Promise Window Lantern Summer Journey Kingdom Feather "
  "Thunder Meadow Compass Desert Anchor Carnival",
)
_COMPANY = (
  "Apex Boreal Cobalt Delta Ember Falcon Granite Helix Indigo Juniper Kestrel "
  "Lumen Magnet Nimbus Onyx Pioneer Quartz Radius Summit Tundra",
  "Works Labs Motors Foods Tools Paper Glass Optics Textiles Shipping",
)
_UNIVERSITY = (
  "Saint Royal Upper Lower Old New Grand Free",
  "Alban Benet Conrad Dunstan Egmont Florian Gervase Hubert Isidor Julian",
)
_NICKNAMES = 3  # Letters that a short first name keeps.


def _pairs(left: str, right: str, joint: str) -> list[str]:
  return [
    f"{a}{joint}{b}" for a, b in itertools.product(left.split(), right.split())
  ]


def names(
  kind: str, count: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
  """`count` distinct (name, alias) of a kind."""
  if kind == "person":
    pool = [f"{a} {b}" for a, b in itertools.product(_FIRST, _LAST)]
  elif kind == "city":
    pool = _pairs(*_CITY, "")
  elif kind == "region":
    pool = _pairs(*_REGION, "")
  elif kind == "company":
    pool = _pairs(*_COMPANY, " ")
  elif kind == "university":
    pool = [f"{name} College" for name in _pairs(*_UNIVERSITY, " ")]
  else:
    # Films take the even titles, books the odd ones.
    titles = _pairs(*_TITLE, " ")
    pool = titles[0::2] if kind == "film" else titles[1::2]
  if count > len(pool):
    raise types.UserError(f"only {len(pool)} names of kind {kind}, not {count}")
  chosen = [pool[i] for i in rng.permutation(len(pool))[:count]]
  return [(name, _alias(kind, name, rng)) for name in chosen]


def _alias(kind: str, name: str, rng: np.random.Generator) -> str:
  if kind == "person" and rng.random() < 0.3:
    first, last = name.split()
    return f"{first[:_NICKNAMES]} {last}"
  if kind == "region" and rng.random() < 0.5:
    return f"Land of {name}"
  return ""


def _choose(options: Sequence[str], rng: np.random.Generator) -> str:
  return options[rng.integers(len(options))]


def introduction(
  kind: str, name: str, alias: str, rng: np.random.Generator
) -> str:
  """First sentence of a passage; states the alias if there is one."""
  word = _choose(_WORDS.get(kind, _WORDS["thing"]), rng)
  line = _choose(_INTRODUCTIONS[kind], rng).format(s=name, w=word)
  return line if not alias else f"{line[:-1]}, also called {alias}."


def sentence(
  relation: str, subject: str, target: str, rng: np.random.Generator
) -> str:
  """A passage sentence that states a fact."""
  return _choose(_SENTENCES[relation], rng).format(s=subject, o=target)


def mention(kind: str, name: str) -> str:
  """How a question names its first entity."""
  return f"the {kind} {name}" if kind in ("film", "book", "company") else name


def noun_phrase(relation: str, inner: str, rng: np.random.Generator) -> str:
  """The object of `relation` of `inner`, as a noun phrase."""
  return _choose(_PHRASES[relation], rng).format(x=inner)


def question(relation: str, inner: str, rng: np.random.Generator) -> str:
  """A question for the object of `relation` of `inner`."""
  asked = _choose(_QUESTIONS[relation], rng).format(x=inner)
  return asked[0].upper() + asked[1:]


def search_keys(relation: str, name: str) -> list[str]:
  """Good search phrases for one hop; the first one is the scripts' own."""
  return [f"{name} {relation}"] + [
    phrase.format(x=name).removeprefix("the ") for phrase in _PHRASES[relation]
  ]


def distractors(entities, rng: np.random.Generator) -> list[dict]:
  """Passages that share a title, or mention an entity without its facts."""
  titled = [e for e in entities if e.kind in ("film", "book", "company")]
  passages = []
  for i in rng.permutation(len(titled))[:220]:
    name = titled[i].name
    word = _choose(_WORDS["thing"], rng)
    passages.append({
      "title": name,
      "text": f"{name} is also the name of a painting of a {word}.",
    })
  for i in rng.permutation(len(entities))[:220]:
    name = entities[i].name
    word = _choose(_WORDS["thing"], rng)
    passages.append({
      "title": f"The {word} of {name}",
      "text": f"Visitors like the {word}, which was named after {name}.",
    })
  return passages
