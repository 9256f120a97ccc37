"""A model on the hub is fetched once per node, however many ranks ask for it. A server here stands in for the hub."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
READ = "from safecl.storage.model_folder import read_model_files; print(*read_model_files('owner/toy').tensors)"


class Hub(BaseHTTPRequestHandler):
    """Serves the files of `owner/toy` from a folder, slowly, and counts the bodies that it sends."""

    folder: Path
    sent: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        name = self.path.partition("/owner/toy/resolve/main/")[2]
        file = self.folder / name
        found = bool(name) and file.is_file()
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        content = file.read_bytes() if found else b""
        if found:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and found:
            self.sent.append(name)
            time.sleep(1.0)  # the other ranks ask meanwhile
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "toy").mkdir()
    save_file({"lm_head.weight": torch.zeros(8, 8)}, tmp_path / "toy" / "model.safetensors", {"format": "pt"})
    (tmp_path / "toy" / "config.json").write_text("{}")
    handler = type("ToyHub", (Hub,), {"folder": tmp_path / "toy", "sent": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.sent
    server.shutdown()
    server.server_close()


def test_the_ranks_of_a_node_fetch_a_model_of_the_hub_once(hub, tmp_path):
    address, sent = hub
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    env = {name: value for name, value in env.items() if "proxy" not in name.lower() and name != "HF_HUB_OFFLINE"}
    ranks = [subprocess.Popen([sys.executable, "-c", READ], env=env, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    assert [rank.communicate(timeout=300)[0].split() for rank in ranks] == [["lm_head.weight"]] * 2
    assert sent == ["model.safetensors"]
