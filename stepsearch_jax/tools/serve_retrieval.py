"""Serves an index as the /retrieve of Search-R1 and StepSearch.

  pip install -e ".[serve]"
  python -m stepsearch_jax.tools.serve_retrieval --index=wiki18_index \\
    --port=8000

Training here needs no server; this one is for other projects and for sharing
one index between runs (`--config.retrieval.remote=http://host:8000`).
/health answers when the index is loaded, /metrics is for Prometheus. SIGTERM
lets the requests that are being answered finish.
"""

from __future__ import annotations

import json

from absl import flags, logging
from etils import epath

from stepsearch_jax import cli, types
from stepsearch_jax.retrieval import local as retriever
from stepsearch_jax.retrieval.index import encoder, encoding
from stepsearch_jax.serving import listening

_INDEX = flags.DEFINE_string("index", None, "Folder from tools/build_index.")
_ENCODER = flags.DEFINE_string(
  "encoder", None, "Where the encoder of the index is now, if it has moved."
)
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to listen on; 0.0.0.0 opens it to the network."
)
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on.")
_TOPK = flags.DEFINE_integer("topk", 3, "Passages when a request names none.")
_MAX_TOPK = flags.DEFINE_integer("max_topk", 100, "Most per query.", 1)
_BATCH = flags.DEFINE_integer("batch", 256, "Queries searched together.", 1)
_QUERIES = flags.DEFINE_integer("queries", 4096, "Most in one request.", 1)
_QUERY_CHARS = flags.DEFINE_integer(
  "query_chars", 16384, "Most characters of a query.", 1
)
_BODY_BYTES = flags.DEFINE_integer(
  "body_bytes", 16 << 20, "Most bytes of a request.", 1
)
_WAITING = flags.DEFINE_integer(
  "waiting", 8192, "Queries that may wait; more get status 429.", 1
)
_TIMEOUT = flags.DEFINE_float("timeout", 60.0, "Seconds until status 503.", 0.1)


def _load_encoder(index: epath.Path) -> encoder.Encoder:
  """The encoder that the index names, with its prefixes and pooling."""
  path = index / "manifest.json"
  if not path.exists():
    raise types.UserError(f"--index: {path} does not exist")
  given = json.loads(path.read_text())["encoder"]
  if given["name"] == "hashed_tfidf":
    return encoder.load_encoder(f"hashed_tfidf:{given['dim']}")
  loaded = encoder.load_encoder(
    _ENCODER.value or given["name"], encoding.EncodingSpec(**{
      field: given[field] for field in
      ("pooling", "query_prefix", "passage_prefix", "max_length")
    }),
  )
  loaded.settings["name"] = given["name"]
  return loaded


def main() -> None:
  """Entry; see the module docstring."""
  listening.need_extra("serve")
  from stepsearch_jax.retrieval import service

  limits = service.ServiceLimits(
    body_bytes=_BODY_BYTES.value, queries=_QUERIES.value,
    query_chars=_QUERY_CHARS.value, topk=_MAX_TOPK.value,
    default_topk=_TOPK.value, waiting=_WAITING.value, batch=_BATCH.value,
    timeout_seconds=_TIMEOUT.value,
  )
  bound = listening.bind(_HOST.value, _PORT.value)
  index = epath.Path(_INDEX.value)
  opened = retriever.open_retriever(index, _load_encoder(index))
  opened.search(["warm up"], _TOPK.value)  # Compiles before the first request.
  logging.info("%d passages on http://%s:%d/retrieve",
               len(opened.index.passages), _HOST.value, _PORT.value)
  listening.serve(service.make_app(opened, limits), bound)


if __name__ == "__main__":
  cli.run(main, required=["index"])
