"""StepSearch on Qwen2.5-7B with the hyperparameters of the released train.sh.

  python -m stepsearch_jax.train --workdir=gs://bucket/run \
    --config=configs/stepsearch_qwen2_5_7b.py \
    --config.data.train=musi_answerable_train.jsonl \
    --config.data.eval=musi_answerable_dev.jsonl \
    --config.data.corpus=wiki-18.jsonl --config.retrieval.index=wiki18_index

With the paper's appendix B: --config=configs/stepsearch_qwen2_5_7b.py:paper

Hardware: meant for v5p-32 or 16 x 80 GB GPUs. Time: not run. Score: not run
(published for the PyTorch code: MuSiQue EM .216, F1 .324).
"""

import ml_collections

from configs import arguments, stepsearch_qwen2_5_3b

sweep = stepsearch_qwen2_5_3b.sweep


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Config with arguments `paper`, `instruct` and `runlocal`."""
  config = stepsearch_qwen2_5_3b.get_config(arg)
  options = arguments.parse_arg(
    arg, paper=False, instruct=False, runlocal=False
  )
  if not options.runlocal:
    suffix = "-Instruct" if options.instruct else ""
    config.model.reference = f"Qwen/Qwen2.5-7B{suffix}"
    config.model.size = dict(
      family="qwen2", hidden=3584, mlp=18944, layers=28, heads=28, kv_heads=4,
      vocab=152064, tied=False,
    )
  return config
