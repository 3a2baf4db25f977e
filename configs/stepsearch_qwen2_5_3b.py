"""StepSearch on Qwen2.5-3B with the hyperparameters of the released train.sh.

  python -m stepsearch_jax.train --workdir=gs://bucket/run \
    --config=configs/stepsearch_qwen2_5_3b.py \
    --config.data.train=musi_answerable_train.jsonl \
    --config.data.eval=musi_answerable_dev.jsonl \
    --config.data.corpus=wiki-18.jsonl --config.retrieval.index=wiki18_index

With the paper's appendix B: --config=configs/stepsearch_qwen2_5_3b.py:paper

Hardware: meant for v5e-16 or 8 x 80 GB GPUs. Time: not run. Score: not run
(published for the PyTorch code: MuSiQue EM .181, F1 .273).
"""

from collections.abc import Callable

import ml_collections

from configs import arguments, common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Config with arguments `paper`, `instruct` and `runlocal`."""
  arg = arguments.parse_arg(arg, paper=False, instruct=False, runlocal=False)
  config = common.base()
  suffix = "-Instruct" if arg.instruct else ""
  config.model.reference = f"Qwen/Qwen2.5-3B{suffix}"
  config.model.size = dict(
    family="qwen2", hidden=2048, mlp=11008, layers=36, heads=16, kv_heads=2,
    vocab=151936, tied=True,
  )
  released_training(config)
  if arg.paper:
    paper_training(config)
  if arg.runlocal:
    runlocal(config)
  return config


def released_training(config: ml_collections.ConfigDict) -> None:
  """Batch, schedule and data of the released train.sh."""
  config.total_steps = 1120
  config.data.train = "musi_answerable_train.jsonl"
  config.data.eval = "musi_answerable_dev.jsonl"
  config.data.corpus = "wiki-18.jsonl"
  config.retrieval.encoder = "intfloat/e5-base-v2"
  config.retrieval.encoding.max_length = 256  # As the released server.
  config.retrieval.index = "wiki18_index"
  config.batch.questions = 128
  config.ppo.mini_batch = 32
  config.ppo.micro_rows = 16
  config.ppo.policy_lr = 5e-7
  config.ppo.value_lr = 5e-7
  config.ppo.policy_warmup_ratio = 0.285
  config.ppo.value_warmup_ratio = 0.05
  config.mesh.data = 1
  config.mesh.fsdp = -1
  # Halves the weights that every decoded token reads; one GPU needs 1.
  config.mesh.tensor = 2
  config.eval.every = 50


def paper_training(config: ml_collections.ConfigDict) -> None:
  """Appendix B of the paper where it differs."""
  config.total_steps = 500
  config.batch.questions = 256
  config.ppo.mini_batch = 64
  config.ppo.micro_rows = 32
  config.ppo.policy_lr = 7e-7
  config.ppo.value_lr = 7e-6


def runlocal(config: ml_collections.ConfigDict) -> None:
  """The same path with a tiny random model on the embedded world."""
  config.total_steps = 1
  config.model.reference = ""
  config.model.size = common.base().model.size
  config.model.dtype = "float32"
  config.data.train = "world"
  config.data.eval = config.data.corpus = config.retrieval.index = ""
  config.data.eval_limit = 4
  config.retrieval.encoder = "hashed_tfidf"
  config.rollout.slots = 8
  config.rollout.context = 1024
  config.rollout.max_turn = 16
  config.batch.questions = 8
  config.ppo.mini_batch = 8
  config.ppo.micro_rows = 2
  config.mesh.data = -1
  config.mesh.fsdp = config.mesh.tensor = 1


def sweep(add: Callable[..., None]) -> None:
  """The paper's ablation of rewards; every arm plays as many rollouts."""
  add()
  add(reward=dict(search_key_reward=False))
  add(reward=dict(search_steps_reward=False))
  add(reward=dict(redundancy_penalty=False, search_key_reward=False))
  add(reward=dict(information_gain=False, search_key_reward=False))
  add(method="ppo")
  add(method="grpo", batch=dict(questions=32, rollouts=4))
