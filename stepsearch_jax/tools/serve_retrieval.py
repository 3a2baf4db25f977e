"""Serves an index as the /retrieve of Search-R1 and StepSearch.

  pip install "stepsearch_jax[serve]"
  python -m stepsearch_jax.tools.serve_retrieval --index=wiki18_index \\
    --encoder=intfloat/e5-base-v2 --port=8000

Training here needs no server; this one is for other projects and for sharing
one index between runs (`--config.retrieval.remote=http://host:8000`).
/health answers when the index is loaded, /metrics is for Prometheus. SIGTERM
lets the requests that are being answered finish.
"""

from __future__ import annotations

from absl import flags, logging

from stepsearch_jax import cli
from stepsearch_jax.retrieval import local as retriever
from stepsearch_jax.retrieval.index import encoder

_INDEX = flags.DEFINE_string("index", None, "Folder from tools/build_index.")
_ENCODER = flags.DEFINE_string(
  "encoder", "hashed_tfidf", "The encoder that the index was built with."
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


def main() -> None:
  """Entry; see the module docstring."""
  import uvicorn

  from stepsearch_jax.retrieval import service

  limits = service.ServiceLimits(
    body_bytes=_BODY_BYTES.value, queries=_QUERIES.value,
    query_chars=_QUERY_CHARS.value, topk=_MAX_TOPK.value,
    default_topk=_TOPK.value, waiting=_WAITING.value, batch=_BATCH.value,
    timeout_seconds=_TIMEOUT.value,
  )
  opened = retriever.open_retriever(
    _INDEX.value, encoder.load_encoder(_ENCODER.value)
  )
  opened.search(["warm up"], _TOPK.value)  # Compiles before the first request.
  logging.info("%d passages on http://%s:%d/retrieve",
               len(opened.index.passages), _HOST.value, _PORT.value)
  uvicorn.run(
    service.make_app(opened, limits), host=_HOST.value, port=_PORT.value,
    log_level="warning", timeout_graceful_shutdown=10,
  )


if __name__ == "__main__":
  cli.run(main, required=["index"])
