"""Small real parts for tests: a tokenizer, a model, a scripted retriever."""

import dataclasses
import functools
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.env import prompts, search_env
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.parallel import sharding
from stepsearch_jax.rollout import (
  automaton,
  device,
  engine,
  programs,
  records,
)
from stepsearch_jax.rollout import text_side as text_side_lib

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
    head_dim=8, qkv_bias=True, dtype=jnp.float32, remat="none",
  )
  return decoder.DecoderConfig(**(settings | changes))


def make_policy(model, seed: int = 0):
  """Parameters like those of `heads.init_policy`; drawing compiles nothing."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name == "scale" or name.endswith("bias"):
      return jnp.full(leaf.shape, float(name == "scale"), leaf.dtype)
    size = 0.02 if path[0].key == "head" else model.hidden_size**-0.5
    if name in ("o_kernel", "down_kernel"):
      size /= 2
    return jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype)

  init = functools.partial(heads.init_policy, model)
  shapes = jax.eval_shape(init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def disturbed(tree, size: float = 0.1):
  """The tree with normal noise on every entry, as if it had been trained."""
  rng = np.random.default_rng(4)
  return jax.tree.map(
    lambda x: x + jnp.asarray(size * rng.standard_normal(x.shape), x.dtype),
    tree,
  )


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


def engine_spec(**changes):
  settings = dict(
    max_prompt=64, max_turn=12, max_observation=48, answer_room=8,
    retrieval_delay=8, search_threads=2, extend_rows=(2, 4),
    extend_tokens=(16, 64), probe=None,
  )
  return records.EngineSpec(**(settings | changes))


def make_env(template="plain", **changes):
  return search_env.SearchEnv(
    prompts.TEMPLATES[template], **(dict(max_turns=3, topk=2) | changes)
  )


def text_side(env, tokenizer):
  return text_side_lib.TextSide(env, tokenizer)


def make_programs(tokenizer, model, slots=4, block=4, context=256,
                  tags=("</search>", "</answer>"), mesh=None, top_k=0,
                  top_p=1.0):
  stops = automaton.build_automaton(
    tokenizer.token_bytes(), tags, tokenizer.eos_ids
  )
  return programs.RolloutPrograms(
    model, programs.ProgramSpec(slots, context, block, top_k, top_p),
    automaton.pad_vocabulary(stops.table, model.vocab_size),
    stops.first_stop, mesh or sharding.make_mesh(),
  )


def make_engine(tokenizer, model, retriever, seed=0, spec=None, env=None,
                compiled=None, **shape):
  """An engine over real programs, or over the `compiled` ones."""
  spec = spec or engine_spec()
  env = make_env(**(env or {}))
  return engine.Engine(
    compiled or make_programs(tokenizer, model, **shape),
    text_side(env, tokenizer), retriever, spec, seed,
  )


@dataclasses.dataclass
class State:
  """As much of a device state as the host looks at."""

  position: np.ndarray


class ScriptedPrograms:
  """Stands in for the device: the policy writes given turns, token by token.

  `turns` are texts, the same for every slot; the clock runs as on a device.
  """

  def __init__(self, tokenizer, turns, slots=4, block=16, context=256):
    self.spec = programs.ProgramSpec(slots, context, block, 0, 1.0)
    self._turns = [tokenizer.encode(text) for text in turns]

  def decode_params(self, params):
    return params

  def init_state(self):
    self._turn = [-1] * self.spec.slots
    self._left = [[] for _ in range(self.spec.slots)]
    return State(np.zeros(self.spec.slots))

  def extend(self, params, state, chunk, kv_length):
    for row, place in enumerate(chunk.slot):
      if chunk.length[row] and chunk.start[row] == 0:
        self._turn[place] = -1
      if chunk.begins_turn[row]:
        self._turn[place] += 1
        turn = self._turns[self._turn[place]]
        self._left[place] = turn[: chunk.budget[row]]
    return state

  def decode_block(self, params, state, key, kv_length, limit, leave):
    speaking = [p for p, left in enumerate(self._left) if left]
    tokens = np.full((self.spec.slots, self.spec.block), -1, np.int32)
    step = 0
    while step < limit and sum(not self._left[p] for p in speaking) < leave:
      for p in speaking:
        if self._left[p]:
          tokens[p, step] = self._left[p].pop(0)
      step += 1
    return state, device.BlockOutput(
      tokens, np.zeros(tokens.shape, np.float32),
      np.array([bool(left) for left in self._left]), np.int32(step),
    )


def write_study_run(folder, finals, start=0.0, ids=None):
  """A finished run of a study: EM `start` at step 0, `finals` at step 10."""
  for step, scores in ((0, [start] * len(finals)), (10, finals)):
    place = folder / "evaluations" / f"step_{step:06d}"
    place.mkdir(parents=True)
    rows = [
      {"id": ids[i] if ids else f"q{i}", "em": em, "hops": 2 + i % 2,
       "searches": 3, "retrieval_recall": 0.5}
      for i, em in enumerate(scores)
    ]
    (place / "predictions.jsonl").write_text(
      "".join(json.dumps(row) + "\n" for row in rows)
    )
    (place / "card.json").write_text(
      json.dumps({"metrics": {"em": float(np.mean(scores))},
                  "settings": {"commit": "abc", "jax": "1"}})
    )
  summary = {"train_seconds": 7.0, "em_after": float(np.mean(finals))}
  (folder / "summary.json").write_text(json.dumps(summary))
  steps = [{"step": 0}, {"step": 1, "timing_s/step": 90.0},
           {"step": 2, "timing_s/step": 2.0}, {"step": 3, "timing_s/step": 3.0}]
  (folder / "metrics.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in steps)
  )
  return epath.Path(folder)
