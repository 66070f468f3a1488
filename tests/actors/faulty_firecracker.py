"""A fault-injecting actor in Firecracker's place: speaks as much of its API as a restore uses, and goes wrong as it is told.

It is no VMM: it runs no guest. Where real Firecracker can be had, tests/firecracker plays with that.
"""

import argparse
import ctypes
import http.server
import json
import os
import signal
import socketserver
import sys
from pathlib import Path
from typing import Any

from actors.peer_process import Peer

STATE_MAGIC = bytes.fromhex("0000648684191007")


def write_state_file(path: Path, version: str = "11.0.0") -> Path:
    """The head of a state file, in the form that this version of the format has (src/vmm/src/snapshot/mod.rs)."""
    text = version.encode()
    if int(version.partition(".")[0]) >= 11:
        path.write_bytes(b"\0" + STATE_MAGIC + bytes([len(text)]) + text + bytes(200))
    else:
        path.write_bytes(STATE_MAGIC + len(text).to_bytes(8, "little") + text + bytes(200))
    return path


def write_program(path: Path) -> Path:
    """A program at `path` that is this actor."""
    here = Path(__file__)
    start = "import sys; sys.path.insert(0, sys.argv.pop(1)); from actors.faulty_firecracker import main; main()"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} -S -c '{start}' {here.parents[1]} \"$@\"\n")
    path.chmod(0o755)
    return path


class Actor:
    """What it was told, and what it has."""

    def __init__(self, told: argparse.Namespace) -> None:
        self.told = told
        self.peer: Peer | None = None

    def load(self, body: dict[str, Any]) -> None:
        """Behaves like a VMM that gets its memory from a pager: makes memory, shakes hands, touches a page."""
        memory = body["mem_backend"]["backend_path"]
        self.peer = Peer()
        self.peer.map(self.told.memory, "anonymous")
        self.peer.connect(memory)
        hva = ctypes.addressof(ctypes.c_char.from_buffer(self.peer.memory))
        region = {"base_host_virt_addr": hva, "size": self.told.memory, "offset": 0, "page_size": 4096, "page_size_kib": 4096}
        self.peer.say(json.dumps([region]), ["userfaultfd"])
        self.touch(0)

    def touch(self, page: int) -> int:
        """A byte of guest memory."""
        assert self.peer is not None
        return self.peer.memory[page * 4096]


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection to the API."""

    protocol_version = "HTTP/1.1"
    actor: Actor

    def log_message(self, *_: object) -> None:
        print("api:", self.command, self.path, flush=True)

    def address_string(self) -> str:
        return "unix"

    def answer(self, status: int, body: object = None) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if data:
            # After an answer without a body the other side may be gone already.
            self.wfile.write(data)

    def do_GET(self) -> None:
        told = self.actor.told
        if told.fault == "no-json":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")
            self.close_connection = True
        elif self.path == "/version" and told.fault == "no-version-call":
            self.answer(400, {"fault_message": "Invalid request method and/or path: GET version"})
        elif self.path == "/version":
            self.answer(200, {"firecracker_version": told.version})
        else:
            self.answer(200, {"id": "x", "state": "Running", "vmm_version": told.version, "app_name": "Firecracker"})

    def do_PATCH(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.actor.told.fault == "dies-in-resume":
            os.kill(os.getpid(), signal.SIGKILL)
        self.answer(204)

    def do_PUT(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        told = self.actor.told
        if self.path == "/actions":
            self.answer(204)
            os._exit(0)
        if told.fault == "dies-in-load":
            print("thread 'fc_vmm' panicked", file=sys.stderr, flush=True)
            os._exit(149)
        if told.fault == "dies-and-its-child-keeps-the-socket" and os.fork():
            os.kill(os.getpid(), signal.SIGKILL)
        if told.fault in ("hangs-in-load", "dies-and-its-child-keeps-the-socket"):
            # Until whoever started us lets go of our input.
            sys.stdin.read()
            os._exit(0)
        if told.fault == "refuses-to-load":
            self.answer(400, {"fault_message": told.says})
            print("Error: RunWithApi(BuildMicroVmError(Restore))", file=sys.stderr, flush=True)
            os._exit(1)
        self.actor.load(body)
        self.answer(204)


def main() -> None:
    told = argparse.ArgumentParser()
    told.add_argument("--api-sock", required=True)
    told.add_argument("--fault", default="")
    told.add_argument("--version", default="1.17.0-dev")
    told.add_argument("--memory", type=int, default=1 << 20)
    told.add_argument("--says", default="")
    arguments, _ = told.parse_known_args()
    if arguments.fault == "dies-at-start":
        print("Error: RunWithApi(FailedToBindSocket)", file=sys.stderr)
        sys.exit(1)
    if arguments.fault == "never-listens":
        sys.stdin.read()
        return
    Handler.actor = Actor(arguments)
    with socketserver.UnixStreamServer(arguments.api_sock, Handler) as server:
        server.serve_forever()
