"""Embeds a corpus and writes an index folder for training and evaluation.

  python -m stepsearch_jax.tools.build_index --corpus=wiki-18.jsonl \\
    --encoder=intfloat/e5-base-v2 --output=wiki18_index
"""

from __future__ import annotations

from absl import flags

from stepsearch_jax import cli
from stepsearch_jax.retrieval import corpus, encoder, index

_CORPUS = flags.DEFINE_string(
  "corpus", None,
  "Passages (.jsonl, .json, .parquet, or .gz): {id, contents} or {id, title, "
  "text}; question files with paragraphs work too.",
)
_ENCODER = flags.DEFINE_string(
  "encoder", "hashed_tfidf",
  "hashed_tfidf, or a BERT-family folder, hub id or package:<name>.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Index folder; must not exist.")


def main() -> None:
  """Entry; see the module docstring."""
  passages = corpus.load_corpus(_CORPUS.value)
  index.build_index(
    _OUTPUT.value, passages, encoder.load_encoder(_ENCODER.value)
  )
  print(f"{len(passages)} passages, corpus {corpus.corpus_hash(passages)}: "
        f"{_OUTPUT.value}")


if __name__ == "__main__":
  cli.run(main, required=["corpus", "output"])
