"""Every field of a run, with its default and meaning.

A config file starts from `base()`, changes what it needs and returns it. All
fields can be overridden on the command line: `--config.ppo.policy_lr=1e-6`.
"""

import ml_collections
from ml_collections import config_dict


def _model():
  """The policy; the value model starts from the same trunk."""
  model = ml_collections.ConfigDict()
  # HF folder or id, *.gguf, package:<name>; empty = random weights of `size`.
  model.reference = ""
  model.tokenizer = ""  # Empty = the model's own.
  model.dtype = "bfloat16"  # Compute type; master weights are float32.
  # What training keeps of a layer for the backward pass: full = its input (the
  # layer is computed again), dots = also what its matrices gave, none = all.
  model.remat = "full"
  # Variables of the chat template; None = as the template has it.
  model.chat = ml_collections.ConfigDict(
    dict(enable_thinking=ml_collections.config_dict.placeholder(bool))
  )
  # Of a new model; tools/plan also takes it for a reference it cannot read.
  model.size = ml_collections.ConfigDict(
    dict(
      family="qwen2", hidden=128, mlp=512, layers=4, heads=4, kv_heads=2,
      vocab=2048, tied=True,
    )
  )
  return model


def _adapters(kind):
  """Whether all of a model is trained, or low-rank adapters (LoRA)."""
  trained = ml_collections.ConfigDict()
  trained.kind = kind  # Of what is trained; see above.
  trained.rank = 32  # Of the adapters.
  trained.alpha = 32.0  # Adapters count alpha / rank times.
  return trained


def _data():
  """Questions and passages."""
  data = ml_collections.ConfigDict()
  # Question file, or "world" for the embedded world.
  data.train = "world"
  data.eval = ""  # Empty = held-out part of the world, or of data.train.
  data.split = "heldout"  # Of the world: heldout | validation.
  # Size and shape of the embedded world (see data/world.py).
  data.world = ml_collections.ConfigDict(dict(
    seed=0, train=12000, validation=200, heldout=200, entities=2400,
    alias_share=0.1, rare_wording=0.25,
  ))
  data.corpus = ""  # Empty = all paragraphs of the question files.
  data.limit = 0  # Read only this many training questions; 0 = all.
  data.eval_limit = 0  # Likewise of evaluation questions.
  data.holdout = 0.1  # Share of data.train held out when data.eval is empty.
  return data


def _retrieval():
  """Encoder and index."""
  retrieval = ml_collections.ConfigDict()
  # index (encoder + ScaNN) | bm25 | online (web search, key in SERPER_API_KEY).
  retrieval.engine = "index"
  # Cross-encoder (folder, HF id, package:<name>) that reorders what is found.
  retrieval.reranker = ""
  retrieval.candidates = 20  # Passages that it scores per query.
  # hashed_tfidf, or a BERT-family encoder: folder, HF id, package:<name>.
  retrieval.encoder = "hashed_tfidf"
  # What the files of a BERT encoder leave open or should not decide: pooling
  # mean | cls, text before queries and passages, tokens kept. None = theirs.
  retrieval.encoding = ml_collections.ConfigDict(dict(
    pooling=config_dict.placeholder(str),
    query_prefix=config_dict.placeholder(str),
    passage_prefix=config_dict.placeholder(str),
    max_length=config_dict.placeholder(int),
  ))
  retrieval.index = ""  # Folder of a ready index; empty = build in workdir.
  # URL of a /retrieve server to ask instead of searching here.
  retrieval.remote = ""
  # How long to bear with a server or web search; see remote.RemoteSpec.
  retrieval.patience = ml_collections.ConfigDict(dict(
    timeout_seconds=30.0, retries=3, backoff_seconds=0.5, open_after=3,
    open_seconds=30.0,
  ))
  retrieval.record = ""  # Write every search to this JSONL file.
  retrieval.replay = ""  # Answer from such a file; needs no index.
  retrieval.replay_miss = "error"  # error | search: what is not on record.
  retrieval.topk = 3  # Passages per search.
  retrieval.cache = 65536  # Remembered queries.
  return retrieval


def _rollout():
  """The protocol and its limits, in tokens."""
  rollout = ml_collections.ConfigDict()
  # stepsearch | stepsearch_think | search_r1 | plain | compact; see
  # env/prompts.py.
  rollout.template = "stepsearch"
  # What a search shows: found | random (closed book) | gold (the supporting
  # passages in order, whatever the query). The last two are controls.
  rollout.documents = "found"
  rollout.max_turns = 5  # Searching turns; one forced answer turn follows.
  rollout.slots = 128  # Trajectories that are decoded side by side.
  rollout.context = 4096  # Longest trajectory, prompt included.
  rollout.block = 32  # Decode steps between two looks of the host.
  rollout.max_prompt = 2048  # A longer question is refused at the start.
  rollout.max_turn = 800  # Sampled tokens per turn.
  rollout.max_observation = 800  # Beyond it, documents are cut.
  rollout.answer_room = 64  # Kept free of observations for the answer.
  # Decode steps until a search is read. A slot that searches idles for so
  # long, but whatever the retriever needs beyond it is time that the whole
  # rollout waits: 32 for accelerators, whose steps take 1 to 2 ms; 8 is plenty
  # on a CPU, whose steps take tens.
  rollout.retrieval_delay = 32
  rollout.search_threads = 16  # Requests that are under way at the same time.
  # Compile every rollout program at the start, so that no step stops for one.
  rollout.compile_ahead = True
  # Prefill is compiled for each of these numbers of slots ...
  rollout.extend_rows = (1, 4, 16)
  # ... times each of these numbers of tokens.
  rollout.extend_tokens = (64, 256, 512)
  rollout.temperature = 1.0  # Of training; evaluation is greedy.
  rollout.top_k = 0  # Sample from the k likeliest tokens; 0 = all.
  rollout.top_p = 1.0  # From the likeliest of this total probability.
  return rollout


def _reward():
  """Preset and the four ablation switches of the released code."""
  reward = ml_collections.ConfigDict()
  reward.preset = "paper"  # paper | released: see stepsearch_jax/README.md.
  # Only the answer's F1 is paid: no step rewards, no search keys. None = the
  # method's.
  reward.outcome_only = config_dict.placeholder(bool)
  reward.information_gain = True  # In the step reward.
  reward.redundancy_penalty = True  # In the step reward.
  reward.search_steps_reward = True  # False: no step rewards at all.
  reward.search_key_reward = True  # In the outcome.
  reward.gamma_key = 0.618  # Weight of the search keys in the outcome.
  # Paid for every search that got a result, whatever it found; 0 = off. A
  # control: does the content of step rewards matter?
  reward.search_bonus = 0.0
  # What the presets decide, one by one; None = as the preset has it.
  reward.step_scale = config_dict.placeholder(float)  # Of step rewards.
  # Outcome of a trajectory that does not end with its answer.
  reward.malformed = config_dict.placeholder(float)
  # Of queries and search keys: best | last (the latest wins its group).
  reward.key_match = config_dict.placeholder(str)
  reward.f1_decimals = config_dict.placeholder(int)  # Kept of an F1.
  # Where nothing is left of a gold answer ("The The"): text (the same text is
  # right) | never.
  reward.empty_gold = config_dict.placeholder(str)
  # Where step rewards fall: sampled (the token that closed the search) |
  # reencoded.
  reward.step_position = config_dict.placeholder(str)
  # Where both fall on one token: add | overwrite.
  reward.outcome_on_step = config_dict.placeholder(str)
  # Documents that count: retrieved | parsed (back from the text).
  reward.document_text = config_dict.placeholder(str)
  # Text that counts: provenance (what the policy sampled) | regex (all of it).
  reward.scored_text = config_dict.placeholder(str)
  # The end token at the end of a trajectory: trained | dropped.
  reward.eos = config_dict.placeholder(str)
  # Your own "module:function", which pays instead of all of this; see above.
  reward.function = ""
  return reward


def _probe():
  """Turn rewards from how likely the gold answer is; rewards/probe_rewards."""
  probe = ml_collections.ConfigDict()
  # none | tips | igpo | ig_search, paid beside the rest; None = the method's.
  probe.reward = config_dict.placeholder(str)
  probe.aliases = 4  # Gold answers probed of a question, the shortest first.
  probe.tokens = (16, 64)  # Compiled sizes of tag and answer; longer: left out.
  probe.tips_alpha = 0.02  # tips: scale of the gain of log-probability.
  probe.tips_tau = 1.0  # tips: temperature of the maximum over answers.
  probe.igpo_gain = "probability"  # igpo: gain of probability | log.
  probe.ig_search_alpha = 0.3  # ig_search: scale.
  probe.ig_search_sets = 3  # Other questions whose documents it tries.
  return probe


def _batch():
  """Trajectories of a step."""
  batch = ml_collections.ConfigDict()
  batch.questions = 128  # A step asks this many questions ...
  batch.rollouts = 1  # ... this many times each (GRPO wants > 1).
  # Keep only questions whose rollouts differ in reward, and ask further ones
  # until the batch is full (dynamic sampling of DAPO; needs rollouts > 1).
  batch.dynamic = config_dict.placeholder(bool)
  # Ask at most this many times batch.questions then; what is still lacking is
  # filled up with questions whose rollouts all earned the same.
  batch.dynamic_limit = 3
  return batch


def _ppo():
  """The update."""
  ppo = ml_collections.ConfigDict()
  ppo.gamma = 1.0  # Discount per policy token; turn_gae: per turn.
  ppo.lam = 1.0  # Lambda of generalized advantage estimation.
  ppo.turn_gamma = 0.95  # Discount per turn: bilevel_gae, gigpo.
  ppo.turn_weight = 1.0  # gigpo: of a turn's advantage beside the row's.
  # stratified: share within equal search counts (none is published).
  ppo.strata_blend = 0.5
  # The probability ratio counts from 1 - clip_ratio to 1 + clip_ratio_high;
  # None = the method's.
  ppo.clip_ratio = config_dict.placeholder(float)
  # 0 = clip_ratio; DAPO's clip-higher is 0.28. None = the method's.
  ppo.clip_ratio_high = config_dict.placeholder(float)
  ppo.dual_clip = 0.0  # Bound of the ratio where A < 0, usually 3; 0 = none.
  # token | sequence (GSPO) | turn: what a ratio is of; None = the method's.
  ppo.ratio = config_dict.placeholder(str)
  # token: mean over tokens | sequence: mean of the rows' means | constant: sum
  # over rows * rollout.context (Dr.GRPO); None = the method's.
  ppo.aggregation = config_dict.placeholder(str)
  # Penalty on good rows that become less likely (LLDS), usually 0.2; it does
  # something from the second optimizer step of a batch on. None = the method's.
  ppo.llds_coef = config_dict.placeholder(float)
  ppo.llds_answer_weight = 0.2  # Of the tokens of the answer in it.
  # recompute | rollout: those recorded while sampling, which saves a pass.
  ppo.old_logp = "recompute"
  ppo.importance_cap = 2.0  # With rollout: largest importance weight.
  ppo.value_clip = 0.5  # Largest counted move of a value in an update.
  ppo.entropy_coef = 0.001  # Weight of the entropy bonus.
  # The KL to the reference is part of the reward, else of the loss; None = the
  # method's.
  ppo.kl_in_reward = config_dict.placeholder(bool)
  # Its weight; None = the method's.
  ppo.kl_coef = config_dict.placeholder(float)
  ppo.kl_estimator = "kl"  # In the reward: kl | abs | mse | low_var_kl
  ppo.kl_loss_estimator = "low_var_kl"  # In the loss: low_var_kl | abs | mse
  ppo.kl_controller = "fixed"  # fixed | adaptive
  ppo.kl_target = 0.1  # adaptive: the KL per token that it aims at.
  ppo.kl_horizon = 10000  # adaptive: trajectories over which it moves.
  ppo.epochs = 1  # Times that a step trains on each trajectory.
  ppo.mini_batch = 32  # Trajectories per optimizer step.
  ppo.micro_rows = 16  # Packed rows per forward/backward pass.
  ppo.policy_lr = 5e-7  # Learning rate after the warm-up.
  ppo.value_lr = 5e-7  # Likewise.
  # Share of all optimizer steps over which the rate rises linearly.
  ppo.policy_warmup_ratio = 0.285
  ppo.value_warmup_ratio = 0.05  # Likewise.
  ppo.critic_warmup = 0  # Steps that train the value model only.
  ppo.weight_decay = 0.01  # Decoupled (AdamW), on every parameter.
  ppo.grad_clip = 1.0  # Largest global norm of a gradient.
  return ppo


def _warm_start():
  """Where the policy starts: imitation, another run, or neither."""
  warm_start = ml_collections.ConfigDict()
  # Work directory of a run whose newest policy this run starts from.
  warm_start.policy = ""
  # Imitation of scripted demonstrations before step 0, in optimizer steps.
  warm_start.steps = 0
  # File of traces to imitate instead (see stepsearch_jax/sft/README.md).
  warm_start.traces = ""
  warm_start.min_f1 = 0.0  # Leave out traces whose answer has a lower F1.
  warm_start.rows = 32  # Packed rows per step.
  warm_start.row_length = 4096  # Tokens per packed row.
  warm_start.lr = 1e-3  # Learning rate.
  warm_start.trajectories = 4000  # Demonstrations that are made.
  # What the demonstrators know about the corpus' words: any | usual | exact.
  warm_start.wording = "any"
  # Shares of the demonstrators' errors (see sft/scripted.py): searching for
  # the whole question, ...
  warm_start.whole = 0.1
  warm_start.repeat = 0.1  # ... repeating a query, ...
  warm_start.give_up = 0.1  # ... giving up.
  return warm_start


def _eval():
  """Evaluation during training."""
  evaluation = ml_collections.ConfigDict()
  evaluation.every = 0  # Steps between evaluations; 0 = first and last only.
  return evaluation


def _checkpoint():
  """How often to save and how many to keep."""
  checkpoint = ml_collections.ConfigDict()
  checkpoint.every = 50  # Training steps between two.
  checkpoint.keep = 2  # Newest ones that stay.
  return checkpoint


def _sentinel():
  """When a run counts as collapsed, and what happens then; early signs."""
  sentinel = ml_collections.ConfigDict()
  # What follows a collapse: off | warn | halt | rollback. Signs are only said.
  sentinel.action = "warn"
  sentinel.patience = 5  # Steps in a row that break a limit.
  sentinel.invalid_share = 0.9  # At most.
  sentinel.unanswered_share = 0.95  # At most.
  sentinel.entropy = 0.005  # At least, nats per token.
  sentinel.kl = 10.0  # At most, nats per token.
  sentinel.grad_norm = 1000.0  # At most, before clipping.
  sentinel.reward_drop = 0.4  # Below the best mean score, at most.
  # Sign: searches per question, at least, where the policy once searched.
  sentinel.searches = 0.1
  # Sign: share of rollouts that hit a length limit, at most.
  sentinel.clipped_share = 0.4
  # Sign: growth of the KL over `patience` steps, at most, nats per token.
  sentinel.kl_growth = 0.1
  # Sign: explained variance of the value model, at least ...
  sentinel.explained_variance = 0.0
  sentinel.settling = 20  # ... after so many steps.
  # Sign: share of questions whose rollouts differ in reward, at least.
  sentinel.differing_share = 0.05
  # rollback: back to the newest checkpoint before the trouble, with both
  # learning rates times this.
  sentinel.lr_factor = 0.5
  sentinel.rollbacks = 3  # A run that needs more of them halts.
  return sentinel


def _mesh():
  """Device axes; -1 = all devices that the other axes leave."""
  mesh = ml_collections.ConfigDict()
  mesh.data = -1  # Copies of the models, each with its part of the batch.
  mesh.fsdp = 1  # Parts of every weight, gathered when it is used.
  mesh.tensor = 1  # Parts of heads, MLP and vocabulary.
  # Changes to parallel/sharding.py's table of what is split over which of
  # these, for instance "vocab=fsdp,mlp=tensor+fsdp,embed=".
  mesh.rules = ""
  return mesh


def _log():
  """Where metrics go besides the work directory."""
  log = ml_collections.ConfigDict()
  log.tracker = ""  # wandb | trackio; empty = files only.
  log.project = "stepsearch"  # Of the tracker.
  # (first, last) training step of a profile in the run's profile/; () = none.
  log.profile = ()
  # Rollouts kept of a step, and of every evaluation, to be looked at; 0 = none.
  log.trajectories = 16
  # Steps between two that keep rollouts, besides the first and the last.
  log.trajectories_every = 10
  return log


def base() -> ml_collections.ConfigDict:
  """The defaults: method and optimizer as released, sizes for one host."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # Of the world, the demonstrations, sampling and batches.
  # Training steps, or 0 and total_epochs: exactly one of the two is positive.
  config.total_steps = 0
  config.total_epochs = 0.0  # Passes over data.train; may be a fraction.
  # Name of a method (see the table in README.md), which decides the fields
  # below that are None.
  config.method = "steppo"
  # From rewards to advantages: a name of ppo/estimators, or your own
  # "module:function". None = the method's.
  config.estimator = config_dict.placeholder(str)
  config.model = _model()
  config.policy = _adapters("full")  # full | lora.
  config.value = _adapters("full")  # full | adapter (on the reference).
  config.data = _data()
  config.retrieval = _retrieval()
  config.rollout = _rollout()
  config.reward = _reward()
  config.probe = _probe()
  config.batch = _batch()
  config.ppo = _ppo()
  config.warm_start = _warm_start()
  config.eval = _eval()
  config.checkpoint = _checkpoint()
  config.sentinel = _sentinel()
  config.mesh = _mesh()
  config.log = _log()
  return config
