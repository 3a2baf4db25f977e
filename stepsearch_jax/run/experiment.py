"""From a ConfigDict to the parts of a run, for the entries.

The last place that sees `config`: everything built here takes explicit
arguments. Both entries (`train.py`, `evaluate.py`) build their parts through
this module, so an evaluation plays exactly what training played.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.data import questions as questions_lib
from stepsearch_jax.data import world
from stepsearch_jax.env import prompts, search_env
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.models.weights import hf as hf_weights
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import batching, variants
from stepsearch_jax.retrieval import factory, remote
from stepsearch_jax.retrieval.index import corpus as corpus_lib
from stepsearch_jax.retrieval.index import encoding as encoding_lib
from stepsearch_jax.rollout import automaton, engine, records
from stepsearch_jax.rollout import programs as sampler
from stepsearch_jax.run import checkpoints, settings
from stepsearch_jax.sft import imitation, scripted

STOP_TAGS = ("</search>", "</answer>")

@dataclasses.dataclass
class Data:
  """Questions of a run and the passages that it may retrieve.

  `corpus_path` is the file of the corpus where that was not read, because a
  ready index holds the passages: `corpus` then reads them from there.
  """

  train: list[types.Question]
  heldout: list[types.Question]
  corpus: Sequence[types.Passage]
  corpus_path: str = ""


def load_data(config, workdir: epath.Path) -> Data:
  """Reads (or generates) questions and corpus.

  Raises:
    UserError: a file is missing or malformed (names file and line), or a
      training question has no supporting paragraphs.
  """
  data = config.data
  if data.train == "world":
    folder = workdir / "world"
    if not (folder / "corpus.jsonl").exists():
      world.write_world(folder, seed=0)
    train_path, heldout_path, corpus_path = (
      str(folder / name)
      for name in ("train.jsonl", "heldout.jsonl", "corpus.jsonl")
    )
  else:
    train_path, heldout_path, corpus_path = data.train, data.eval, data.corpus
  train = questions_lib.load_questions(
    train_path, limit=data.limit or None, require_support=True
  )
  if heldout_path:
    heldout = questions_lib.load_questions(heldout_path)
  else:
    order = np.random.default_rng(0).permutation(len(train))
    count = max(int(len(train) * data.holdout), 1)
    heldout = [train[i] for i in sorted(order[:count])]
    train = [train[i] for i in sorted(order[count:])]
  if data.eval_limit:
    heldout = heldout[: data.eval_limit]
  if not train or not heldout:
    raise types.UserError(
      f"data.train = {train_path!r} leaves {len(train)} training and "
      f"{len(heldout)} evaluation questions; both must be positive"
    )
  spec = retrieval_spec(config)
  if corpus_path and spec.uses_index and spec.index:
    # 21 million passages do not belong in memory.
    passages = factory.open_passages(spec)
    return Data(train, heldout, passages, corpus_path)
  if corpus_path:
    passages = corpus_lib.load_corpus(corpus_path)
  else:
    files = [path for path in (train_path, heldout_path) if path]
    passages = corpus_lib.corpus_from_questions(files)
  return Data(train, heldout, passages)


def load_tokenizer(config, workdir: epath.Path, data: Data):
  """The model's tokenizer, or a BPE trained on the corpus for a new model."""
  reference = config.model.tokenizer or config.model.reference
  if reference:
    return tokenizer_lib.load(reference)
  folder = workdir / "tokenizer"
  if not folder.exists():
    trained = tokenizer_lib.train_bpe(
      _protocol_texts(config, data), config.model.size.vocab
    )
    partial = workdir / "tokenizer.partial"
    if partial.exists():
      partial.rmtree()
    trained.save(partial)
    partial.rename(folder)  # Whole or not at all.
  return tokenizer_lib.load(str(folder))


def _protocol_texts(config, data: Data) -> list[str]:
  """Texts as the policy will read and write them."""
  env = build_env(config)
  texts = [
    env.observation(data.corpus[i : i + 3], 0).text
    for i in range(0, len(data.corpus), 3)
  ]
  for question in data.train:
    texts.append(env.prompt(question))
    texts += [
      f"<search> {group[0]} </search>" for group in question.search_keys
    ]
    texts.append(f"<answer> {question.answers[0]} </answer>")
  return texts


def decoder_config(config, tokenizer) -> decoder.DecoderConfig:
  """Shape of the policy: the reference's own, or `model.size`."""
  if config.model.reference:
    path = hf_weights.resolve(config.model.reference)
    return dataclasses.replace(
      hf_weights.load_config(path),
      dtype=jnp.dtype(config.model.dtype),
      remat=config.model.remat,
    )
  return settings.sized_decoder(config, tokenizer.vocab_size)


def initial_policy(config, model: decoder.DecoderConfig):
  """Policy parameters before any training."""
  if config.model.reference:
    path = hf_weights.resolve(config.model.reference)
    return hf_weights.load_policy(path, model)
  return heads.init_policy(model, jax.random.key(config.seed))


def trained_policy(
  config, workdir: epath.Path, model: decoder.DecoderConfig, mesh,
  step: int | None = None,
):
  """(step, whole policy) of a run's newest or given checkpoint.

  Raises:
    UserError: no such checkpoint, or one of another model.
  """
  adapter = settings.adapter("policy", config.policy)
  variant = variants.Variant("policy", model, adapter)
  shapes = variant.shapes()
  like = sharding.abstract(
    shapes, sharding.tree_shardings(mesh, variant.axes(), shapes)
  )
  step, params = checkpoints.load_policy(workdir, like, step)
  if adapter is None:
    return step, params
  reference = checkpoints.load_reference(
    workdir, variants.abstract_reference(model, mesh)
  )
  return step, variants.whole_model(variant, params, reference)


def retrieval_spec(config) -> factory.RetrievalSpec:
  """Checked `config.retrieval`."""
  given = config.retrieval.to_dict()
  patience = remote.RemoteSpec(**given.pop("patience"))
  encoding = encoding_lib.EncodingSpec(**given.pop("encoding"))
  return factory.RetrievalSpec(**given, patience=patience, encoding=encoding)


def load_retriever(config, workdir: epath.Path, data: Data):
  """The configured retriever; see `factory.load_retriever`."""
  return factory.load_retriever(
    retrieval_spec(config), workdir, data.corpus, data.corpus_path
  )


def build_env(config) -> search_env.SearchEnv:
  """The search environment with the configured protocol."""
  return search_env.SearchEnv(
    prompts.TEMPLATES[config.rollout.template],
    max_turns=config.rollout.max_turns,
    topk=config.retrieval.topk,
  )


def build_engine(
  config, model, env, retriever, tokenizer, mesh
) -> engine.Engine:
  """The rollout engine over a freshly compiled stop automaton."""
  rollout = config.rollout
  stops = automaton.build_automaton(
    tokenizer.token_bytes(), STOP_TAGS, tokenizer.eos_ids
  )
  table = automaton.pad_vocabulary(stops.table, model.vocab_size)
  programs = sampler.Sampler(
    model,
    settings.sampler_spec(config),
    table,
    stops.first_stop,
    mesh,
  )
  spec = records.EngineSpec(
    max_prompt=rollout.max_prompt,
    max_turn=rollout.max_turn,
    max_observation=rollout.max_observation,
    answer_room=rollout.answer_room,
    retrieval_delay=rollout.retrieval_delay,
    extend_rows=tuple(rollout.extend_rows),
    extend_tokens=tuple(rollout.extend_tokens),
  )
  return engine.Engine(
    programs, env, retriever, tokenizer, spec, config.seed,
  )


def warm_start(config, data, tokenizer, env, retriever, mesh, model, policy):
  """Policy parameters after imitating scripted trajectories."""
  given = config.warm_start
  mixture = scripted.ScriptMixture(given.impatient, given.repeat, given.whole)
  rng = np.random.default_rng((config.seed, 1))
  order = rng.integers(len(data.train), size=given.trajectories)
  trajectories, failed = [], 0
  for i in order:
    try:
      trajectories.append(scripted.scripted_trajectory(
        data.train[i], env, retriever, tokenizer, mixture, rng,
        config.rollout.max_observation,
      ))
    except types.SearchError as error:
      failed += 1  # Nobody should imitate a search without a result.
      logging.log_first_n(logging.WARNING, "warm start: %s", 3, error)
  if failed:
    logging.warning("warm start: %d of %d scripts left out, their searches "
                    "failed", failed, len(order))
  fitting = [t for t in trajectories if len(t.tokens) <= config.rollout.context]
  if not fitting:
    raise types.UserError(
      f"none of {len(trajectories)} scripted trajectories fits "
      f"rollout.context = {config.rollout.context}; {failed} had no search "
      "results"
    )
  logging.info("warm start: %d of %d scripts fit the context",
               len(fitting), len(trajectories))
  batch = batching.trajectories_to_batch(
    fitting,
    [np.zeros(len(t.tokens), np.float32) for t in fitting],
    config.rollout.context,
    tokenizer.pad_id,
  )
  params, losses = imitation.imitate(
    policy,
    batch,
    model,
    mesh,
    steps=given.steps,
    rows=given.rows,
    row_length=given.row_length,
    learning_rate=given.lr,
    seed=config.seed,
  )
  logging.info("warm start: loss %.3f -> %.3f", losses[0], losses[-1])
  return params


def identity(config, model: decoder.DecoderConfig, data: Data) -> dict:
  """Fingerprint by which a checkpoint knows its model and data."""
  return checkpoints.fingerprint(
    model=[
      model, config.model.reference, config.policy.to_dict(),
      config.value.to_dict(),
    ],
    data=[question.id for question in data.train],
  )
