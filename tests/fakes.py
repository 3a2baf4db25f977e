"""Small real parts for tests: a tokenizer, a model, a scripted retriever."""

import threading
import time

import jax
import jax.numpy as jnp

from stepsearch_jax import types
from stepsearch_jax.env import prompts, search_env
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.parallel import sharding
from stepsearch_jax.rollout import automaton, engine, records
from stepsearch_jax.rollout import device as slots_lib
from stepsearch_jax.rollout import programs as sampler

TEXTS = [
  "Question: Who directed the film Silent Harbor?\n<search> Silent Harbor "
  "director </search>\n\n<information> Doc 1<## Title: Silent Harbor ##> "
  "directed by Ada Brandt. </information>\n\n<answer> Ada Brandt </answer>",
]


def make_tokenizer():
  return tokenizer_lib.train_bpe(TEXTS * 4, 420)


def make_model(vocab_size: int, **changes):
  settings = dict(
    family="qwen2", vocab_size=vocab_size, hidden_size=32,
    intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, qkv_bias=True, dtype=jnp.float32, remat=False,
  )
  return decoder.DecoderConfig(**(settings | changes))


def make_policy(model, seed: int = 0):
  return heads.init_policy(model, jax.random.key(seed))


def make_tag_lover(tokenizer, policy):
  """The policy with boosted tag pieces, so that it searches and answers."""
  liked = sorted({
    i for text in ("<search> Ada </search>", "<answer> Ada </answer>")
    for i in tokenizer.encode(text)
  })
  embedding = policy["trunk"]["embedding"]
  embedding = embedding.at[jnp.asarray(liked)].multiply(3.0)
  return {**policy, "trunk": {**policy["trunk"], "embedding": embedding}}


def make_questions(count: int):
  return [
    types.Question(str(i), "Who directed the film " + "Silent " * (i % 4) + "?",
                   ("Ada",), support=(types.Passage("x", "x", "Ada"),))
    for i in range(count)
  ]


class FakeRetriever:
  """Echoes the query in three passages, after an optional delay."""

  def __init__(self, delay=0.0, text="found {query} here"):
    self.delay = delay
    self.text = text
    self.asked = []
    self._lock = threading.Lock()

  def search(self, queries, k):
    time.sleep(self.delay)
    with self._lock:
      self.asked.extend(queries)
    return [
      [types.Passage(f"{q}/{i}", "T", self.text.format(query=q[:20]))
       for i in range(k)]
      for q in queries
    ]


def make_engine(tokenizer, model, retriever, slots=4, block=4, context=256,
                seed=0, spec=None, tags=("</search>", "</answer>"), mesh=None,
                **env):
  stops = automaton.build_automaton(
    tokenizer.token_bytes(), tags, tokenizer.eos_ids
  )
  programs = sampler.Sampler(
    model, slots_lib.SamplerSpec(slots, context, block), stops.table,
    stops.first_stop, mesh or sharding.make_mesh(),
  )
  spec = spec or records.EngineSpec(
    max_prompt=64, max_turn=12, max_observation=48, answer_room=8,
    extend_rows=(2, 4), extend_tokens=(16, 64),
  )
  env = search_env.SearchEnv(
    prompts.TEMPLATES["plain"], **(dict(max_turns=3, topk=2) | env)
  )
  return engine.Engine(programs, env, retriever, tokenizer, spec, seed)
