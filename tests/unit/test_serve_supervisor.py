"""A router that runs though a model of its did not load."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import psutil
import pytest

from runtime.serve.supervisor import Launch, Supervisor
from toolchain.base.errors import CommandError

ROUTER = """
import http.server, json
class Router(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        status = {"value": "unloaded", "failed": True, "exit_code": 1}
        self.wfile.write(json.dumps({"data": [{"id": "m", "status": status}]}).encode())
http.server.HTTPServer(("127.0.0.1", 0), Router).serve_forever()
"""


def test_a_router_whose_model_did_not_load_is_ended_before_the_next(tmp_path: Path) -> None:
    launch = Launch(argv=(sys.executable, "-c", ROUTER), env={}, log=tmp_path / "log", what="serve", router=True)

    async def start_twice() -> None:
        supervisor = Supervisor(launch)
        started = []
        try:
            for _ in range(2):
                with pytest.raises(CommandError, match="could not load a model"):
                    await supervisor.start()
                assert supervisor.pid is not None
                started.append(supervisor.pid)
            assert not psutil.pid_exists(started[0])
        finally:
            await supervisor.stop(30)

    asyncio.run(start_twice())
