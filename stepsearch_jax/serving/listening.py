"""Binds a port and runs an HTTP application on it until told to stop."""

from __future__ import annotations

import importlib
import socket
from typing import Any

from stepsearch_jax import types


def need_extra(command: str) -> None:
  """Raises a UserError where the packages of the extra are missing."""
  try:
    for name in ("uvicorn", "starlette", "prometheus_client"):
      importlib.import_module(name)
  except ImportError as error:
    raise types.UserError(
      f'{command} needs the extra: pip install -e ".[serve]"'
    ) from error


def bind(host: str, port: int) -> socket.socket:
  """Returns a socket on the address, so that one in use is known at once.

  Raises:
    UserError: it is in use, or none of this machine's.
  """
  try:
    family, kind, _, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM
    )[0]
    bound = socket.socket(family, kind)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
  except OSError as error:
    raise types.UserError(
      f"--host={host} --port={port}: cannot listen there: {error.strerror}"
    ) from error
  return bound


def serve(app: Any, bound: socket.socket) -> None:
  """Serves an ASGI application until SIGTERM; what is asked is answered."""
  import uvicorn

  uvicorn.Server(uvicorn.Config(
    app, log_level="warning", timeout_graceful_shutdown=10,
  )).run(sockets=[bound])
