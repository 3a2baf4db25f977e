"""The parts of a run, built from its settings.

Every command that plays or trains goes through `Experiment`, so an evaluation
plays exactly what training played. A part is built when it is first asked for:
an export needs no index, an evaluation no training questions. Parts that the
first process builds in the shared work directory (world, tokenizer) are built
there once, then read by the others; so all processes must ask for the parts in
the same order, which they do because they run the same program.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from stepsearch_jax import buckets, types
from stepsearch_jax.data import coverage, world
from stepsearch_jax.data import questions as questions_lib
from stepsearch_jax.env import prompts, search_env
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.models.weights import hf
from stepsearch_jax.parallel import distributed, sharding
from stepsearch_jax.ppo import estimators, trainable, weighting
from stepsearch_jax.retrieval import factory
from stepsearch_jax.retrieval.index import corpus as corpus_lib
from stepsearch_jax.rollout import automaton, controls, programs, text_side
from stepsearch_jax.rollout import engine as engine_lib
from stepsearch_jax.run import checkpoints, identity, methods
from stepsearch_jax.run.settings import Settings

STOP_TAGS = ("</search>", "</answer>")
# Reading more passages only to see which gold is among them takes too long.
_LOOKED_UP = 200_000


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One run's questions, corpus, tokenizer, model, retriever and engine."""

  settings: Settings
  workdir: epath.Path

  @functools.cached_property
  def _paths(self) -> dict[str, str]:
    """Files of training questions, evaluation questions and corpus."""
    data = self.settings.data
    if data.train != "world":
      return {"train": data.train, "eval": data.eval, "corpus": data.corpus}
    folder = self.workdir / "world"

    def write():
      if (folder / "corpus.jsonl").exists():
        return
      with tempfile.TemporaryDirectory() as temporary:
        made = epath.Path(temporary) / "world"
        world.write_world(made, data.world)
        buckets.publish(made, folder, last="corpus.jsonl")

    distributed.in_turn(write)
    return {
      "train": str(folder / "train.jsonl"),
      "eval": data.eval or str(folder / f"{data.split}.jsonl"),
      "corpus": data.corpus or str(folder / "corpus.jsonl"),
    }

  @functools.cached_property
  def _questions(self) -> tuple[list[types.Question], list[types.Question]]:
    """Training and held-out questions where one file holds both."""
    data, path = self.settings.data, self._paths["train"]
    found = questions_lib.load_questions(
      path, limit=data.limit or None,
      require_support=not self.settings.reward.outcome_only,
    )
    if self._paths["eval"]:
      return found, []
    order = np.random.default_rng(0).permutation(len(found))
    count = max(int(len(found) * data.holdout), 1)
    return (
      [found[i] for i in sorted(order[count:])],
      [found[i] for i in sorted(order[:count])],
    )

  @functools.cached_property
  def train_questions(self) -> list[types.Question]:
    """Questions to train on.

    Raises:
      UserError: a file is missing or malformed (names file and line), a
        question has no supporting paragraphs, or none is left.
    """
    questions = self._questions[0]
    types.expect(bool(questions), "data.train",
                 "at least one training question besides the held-out ones",
                 self._paths["train"])
    return questions

  @functools.cached_property
  def eval_questions(self) -> list[types.Question]:
    """Held-out questions; raises like `train_questions`."""
    path = self._paths["eval"]
    questions = questions_lib.load_questions(path) if path else (
      self._questions[1]
    )
    if self.settings.data.eval_limit:
      questions = questions[: self.settings.data.eval_limit]
    types.expect(bool(questions), "data.eval",
                 "at least one evaluation question", path)
    return questions

  @functools.cached_property
  def corpus(self) -> Sequence[types.Passage]:
    """The passages that may be found; read from a ready index where it can."""
    path, retrieval = self._paths["corpus"], self.settings.retrieval
    if self._corpus_is_indexed:
      # 21 million passages do not belong in memory.
      return factory.open_passages(retrieval)
    if path:
      return corpus_lib.load_corpus(path)
    files = [self._paths[name] for name in ("train", "eval")]
    return corpus_lib.corpus_from_questions([path for path in files if path])

  @property
  def _corpus_is_indexed(self) -> bool:
    """Whether a ready index stands in for reading the corpus file."""
    retrieval = self.settings.retrieval
    return bool(
      self._paths["corpus"] and retrieval.index and retrieval.uses_index
    )

  @functools.cached_property
  def absent_gold(self) -> set[str] | None:
    """Ids of gold passages of the evaluation that the corpus lacks.

    None where that is not known.
    """
    return self.lacking(self.eval_questions)

  def lacking(self, questions: Sequence[types.Question]) -> set[str] | None:
    """Returns `absent_gold` of other questions."""
    given = self.settings.retrieval
    if given.remote or given.engine == factory.SearchEngine.ONLINE:
      return None
    if len(self.corpus) > _LOOKED_UP:
      return None
    _, missing = coverage.audit(questions, self.corpus)
    return {passage.id for passage in missing}

  @functools.cached_property
  def env(self) -> search_env.SearchEnv:
    """The search environment with the configured protocol."""
    protocol = self.settings.protocol
    return search_env.SearchEnv(
      prompts.TEMPLATES[protocol.template],
      max_turns=protocol.max_turns, topk=protocol.topk,
    )

  @functools.cached_property
  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    """The model's own, or a BPE trained on the corpus for a new model."""
    model = self.settings.model
    if model.tokenizer or model.reference:
      return tokenizer_lib.load(
        model.tokenizer or model.reference, model.chat,
        identity.started(self.workdir),
      )
    folder = self.workdir / "tokenizer"

    def train():
      if (folder / "tokenizer.json").exists():
        return
      trained = tokenizer_lib.train_bpe(
        self._protocol_texts(), model.size.vocab
      )
      with tempfile.TemporaryDirectory() as temporary:
        saved = epath.Path(temporary) / "tokenizer"
        trained.save(saved)
        buckets.publish(saved, folder, last="tokenizer.json")

    distributed.in_turn(train)
    return tokenizer_lib.load(str(folder))

  def _protocol_texts(self) -> list[str]:
    """Texts as the policy will read and write them."""
    env, corpus = self.env, self.corpus
    texts = [
      env.observation(corpus[i : i + 3], env.max_turns - 1).text
      for i in range(0, len(corpus), 3)
    ]
    for question in self.train_questions:
      texts.append(env.prompt(question))
      texts += [
        f"<search> {query} </search>"
        for group in question.phrasings or question.search_keys
        for query in group
      ]
      texts.append(f"<answer> {question.answers[0]} </answer>")
    return texts

  @functools.cached_property
  def retriever(self) -> types.Retriever:
    """The configured retriever; see `factory.load_retriever`."""
    return factory.load_retriever(
      self.settings.retrieval, self.workdir, self._searched,
      self._paths["corpus"] if self._corpus_is_indexed else "",
    )

  @property
  def _searched(self) -> Sequence[types.Passage]:
    """The corpus if this run searches it, else nothing, which is not read."""
    return self.corpus if self.settings.retrieval.searches_passages else ()

  @functools.cached_property
  def mesh(self) -> sharding.DeviceMesh:
    """All devices, split as the config says."""
    mesh = self.settings.mesh
    return sharding.make_mesh(mesh.data, mesh.fsdp, mesh.tensor, mesh.rules)

  @functools.cached_property
  def model(self) -> decoder.DecoderConfig:
    """Shape of the policy: its reference's own, or `model.size`."""
    spec = self.settings.model
    if not spec.reference:
      return self.settings.decoder(self.tokenizer.vocab_size)
    found = hf.load_config(hf.resolve(spec.reference))
    types.expect(
      self.settings.sampler.context <= found.max_positions, "rollout.context",
      f"at most the {found.max_positions} positions of {spec.reference}",
      self.settings.sampler.context,
    )
    return dataclasses.replace(
      found,
      dtype=jnp.dtype(spec.dtype), remat=decoder.Remat(spec.remat),
    )

  @functools.cached_property
  def texts(self) -> text_side.TextSide:
    """What rollouts show of questions, answers and documents."""
    env, tokenizer = self.env, self.tokenizer
    match self.settings.protocol.documents:
      case controls.Documents.RANDOM:
        return controls.RandomDocuments(env, tokenizer, self.corpus)
      case controls.Documents.GOLD:
        return controls.GoldDocuments(env, tokenizer)
    return text_side.TextSide(env, tokenizer)

  @functools.cached_property
  def engine(self) -> engine_lib.Engine:
    """The rollout engine of the configured protocol."""
    return self.make_engine(self.texts)

  def make_engine(self, texts: text_side.TextSide) -> engine_lib.Engine:
    """Returns a rollout engine over a freshly built stop automaton."""
    stops = automaton.build_automaton(
      self.tokenizer.token_bytes(), STOP_TAGS, self.tokenizer.eos_ids
    )
    table = automaton.pad_vocabulary(stops.table, self.model.vocab_size)
    compiled = programs.RolloutPrograms(
      self.model, self.settings.sampler, table, stops.first_stop, self.mesh
    )
    return engine_lib.Engine(
      compiled, texts, self.retriever, self.settings.rollout,
      self.settings.seed,
    )

  def initial_policy(self) -> types.Tree:
    """Policy parameters before any training."""
    reference = self.settings.model.reference
    if reference:
      return hf.load_policy(hf.resolve(reference), self.model)
    return heads.init_policy(self.model, jax.random.key(self.settings.seed))

  def trained_policy(self, step: int | None = None) -> tuple[int, types.Tree]:
    """(step, whole policy) of the newest or given checkpoint of the run.

    Raises:
      UserError: no such checkpoint, or one of another model.
    """
    spec = self.settings.learner(steps=1)
    policy = trainable.Trainable("policy", self.model, spec.policy.adapter)
    like = sharding.abstract(policy.shapes(), policy.shardings(self.mesh))
    step, params = checkpoints.load_policy(self.workdir, like, step)
    if spec.policy.adapter is None:
      return step, params
    reference = checkpoints.load_reference(
      self.workdir, trainable.abstract_reference(self.model, self.mesh)
    )
    return step, trainable.whole_model(policy, params, reference, jnp.float32)

  def describe(self, steps: int) -> None:
    """Logs what a run of so many steps is about to do, with sizes."""
    settings = self.settings
    mesh = " x ".join(f"{k} {v}" for k, v in self.mesh.shape.items())
    shapes = jax.eval_shape(
      functools.partial(heads.init_policy, self.model), jax.random.key(0)
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    devices = jax.devices()
    logging.info("run folder %s", self.workdir)
    logging.info("%d x %s, mesh %s, jax %s", len(devices),
                 devices[0].device_kind, mesh, jax.__version__)
    logging.info(
      "%d training questions, %d held out, %d passages to search here",
      len(self.train_questions), len(self.eval_questions), len(self._searched),
    )
    spec = settings.learner(steps)
    placed = trainable.abstract_reference(self.model, self.mesh)
    per_chip = sum(
      np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(placed)
    )
    logging.info(
      "policy of %.4gM parameters in %s, %.4g MB per chip; value model: %s",
      parameters / 1e6, settings.model.dtype, per_chip / 1e6,
      "yes" if estimators.find(spec.estimator.name).needs_values else "none",
    )
    logging.info("%s", methods.described(settings.config))
    weighting.warn_of_llds(spec, settings.batch.trajectories)
    minis = settings.batch.trajectories // spec.batch.mini_batch
    logging.info(
      "%d steps of %d trajectories, %d optimizer steps each, forward and "
      "backward passes of %d rows of %d tokens", steps,
      settings.batch.trajectories, minis * spec.batch.epochs,
      spec.batch.micro_rows, spec.batch.row_length,
    )
