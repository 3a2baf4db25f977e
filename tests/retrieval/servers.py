"""An HTTP server in a thread of the test."""

import contextlib
import socket
import threading
import time

import uvicorn


@contextlib.contextmanager
def serving(app):
  """Runs an ASGI app on a free port of this machine."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  server = uvicorn.Server(
    uvicorn.Config(app, "127.0.0.1", port, log_level="error")
  )
  thread = threading.Thread(target=server.run)
  thread.start()
  while not server.started:
    time.sleep(0.01)
  try:
    yield f"http://127.0.0.1:{port}"
  finally:
    server.should_exit = True
    thread.join()
