"""Embeds a corpus and writes an index folder for training and evaluation.

  stepsearch index --corpus=wiki-18.jsonl.gz \\
    --encoder=intfloat/e5-base-v2 --output=wiki18_index

The same command goes on after a signal or a kill. With --multihost (or
--coordinator ...) several processes split the embedding. --vectors= takes
embeddings that exist already: a .npy file, a bare .memmap of float32 or a FAISS
flat index.
"""

from __future__ import annotations

import json

import jax
from absl import flags
from etils import epath

from stepsearch_jax import buckets, cli, types
from stepsearch_jax.parallel import distributed, sharding
from stepsearch_jax.retrieval.index import build as index_build
from stepsearch_jax.retrieval.index import corpus, encoder, encoding, vectors
from stepsearch_jax.run.interrupts import Interrupts

_CORPUS = flags.DEFINE_string(
  "corpus", None,
  "Passages (.jsonl, .json, .parquet, or .gz, or tfds:FOLDER:SPLIT): {id, "
  "contents} or {id, title, text}; question files with paragraphs work too.",
)
_ENCODER = flags.DEFINE_string(
  "encoder", "hashed_tfidf",
  "hashed_tfidf, or a BERT-family folder, hub id or package:<name>.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Index folder; must not exist.")
_VECTORS = flags.DEFINE_string(
  "vectors", None, "Embeddings of the passages by the same encoder (.npy, "
  ".memmap or FAISS flat index), instead of embedding them here.",
)
_NORMALIZE = flags.DEFINE_bool(
  "normalize", False, "Make unit vectors of --vectors whose norms differ from "
  "1; the search then ranks by cosine, not by their inner product.",
)
_POOLING = flags.DEFINE_enum(
  "pooling", None, ["mean", "cls"], "Of a BERT encoder; default its own."
)
_QUERY_PREFIX = flags.DEFINE_string(
  "query_prefix", None, "Text before queries; default the encoder's own."
)
_PASSAGE_PREFIX = flags.DEFINE_string(
  "passage_prefix", None, "Text before passages; default the encoder's own."
)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length", None, "Tokens kept of a text; default the encoder's own.", 1
)
_RECALL = flags.DEFINE_float(
  "recall", 0.98, "Share of the exact neighbors that the search must find.",
  0.0, 1.0,
)
_K = flags.DEFINE_integer("k", 3, "Neighbors that recall counts.", 1)
_SOAR = flags.DEFINE_bool(
  "soar", False, "Let tree partitions spill: more memory, better recall."
)


def main() -> None:
  """Entry; see the module docstring."""
  Interrupts().install()
  spec = index_build.IndexSpec(
    recall=_RECALL.value, k=_K.value, topk=max(10, _K.value), soar=_SOAR.value
  )
  folder = epath.Path(_OUTPUT.value)
  if buckets.is_bucket(folder) and jax.process_count() > 1:
    raise types.UserError(
      f"--output={folder}: {jax.process_count()} processes need a folder that "
      "all of them can write to; build there and copy the index to the bucket"
    )
  if folder.exists():
    raise types.UserError(f"--output={folder} exists already")
  built = buckets.new_scratch(folder)
  mesh = sharding.make_mesh(devices=jax.local_devices())
  spoken = encoding.EncodingSpec(
    pooling=_POOLING.value, query_prefix=_QUERY_PREFIX.value,
    passage_prefix=_PASSAGE_PREFIX.value, max_length=_MAX_LENGTH.value,
  )
  embed = encoder.load_encoder(_ENCODER.value, spoken, mesh)
  ready = None
  if _VECTORS.value:
    table = vectors.open_vectors(_VECTORS.value, embed.dim)
    ready = vectors.ReadyVectors(_VECTORS.value, table, _NORMALIZE.value)
  index_build.build_index(
    built,
    corpus.stream_corpus(_CORPUS.value),
    embed,
    spec,
    vectors=ready,
    together=True,
  )
  if not distributed.is_primary():
    return
  if built != folder:
    buckets.publish(built, folder, last="manifest.json")
  about = json.loads((built / "manifest.json").read_text())
  for row in about["tuning"]:
    setting = row["setting"]
    print(f"{setting['kind']:8} leaves {setting['leaves']:6d}  reorder "
          f"{setting['reorder']:4d}  recall@{_K.value} {row['recall']:.3f}  "
          f"{row['queries_per_second']:9.0f} queries/s  "
          f"{row['bytes'] / 1e6:9.1f} MB")
  print(f"{about['count']} passages, corpus {about['corpus']}, search "
        f"{about['search']['kind']}, {about['bytes'] / 1e6:.1f} MB: "
        f"{_OUTPUT.value}")


if __name__ == "__main__":
  cli.run(main, required=["corpus", "output"])
