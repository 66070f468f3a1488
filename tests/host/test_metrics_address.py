"""Where a pager says that its metrics are, whom it warns of, and who else can be given the socket."""

import os
import re
from pathlib import Path

import pytest

from actors.pager_stand_in import PagerStandIn
from latepage.cli.status import telling
from latepage.observe.address import TcpAddress, UnixAddress
from latepage.observe.listening import listen
from latepage.observe.status_server import StatusServer


def said(address: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says of that address, its port as PORT."""
    with telling("serve", PagerStandIn().as_pager(), address):
        return re.sub(r"(?<=:|\s)\d{4,5}\b", "PORT", capsys.readouterr().err)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "127.0.0.7:0"])
def test_an_address_of_this_machine_alone_is_told_without_a_warning(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    host = address.removesuffix(":0")
    assert said(address, capsys) == f"latepage serve: metrics at http://{host}:PORT\n"


@pytest.mark.parametrize("address", [":0", "0:0", "0.0.0.0:0"])
def test_every_address_is_told_as_that_and_warned_of(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = said(address, capsys).splitlines()
    assert first == "latepage serve: metrics at every address of this machine, port PORT: http://localhost:PORT"
    assert "without a password" in second
    assert "127.0.0.1:PORT or a Unix socket" in second


def test_an_address_that_others_reach_is_warned_of() -> None:
    assert not TcpAddress("pager.example", 9464, "192.0.2.7").is_local
    assert not TcpAddress("fe80::1%eth0", 9464, "fe80::1%eth0").is_local
    assert TcpAddress("::1", 9464, "::1").is_local


def test_what_a_server_listens_at_is_known_by_its_number() -> None:
    listening = listen(TcpAddress("localhost", 0))
    try:
        assert isinstance(listening.address, TcpAddress)
        assert listening.address.bound in ("127.0.0.1", "::1")
    finally:
        listening.close()


@pytest.mark.needs_root
def test_a_folder_with_the_set_group_id_bit_gives_the_socket_to_its_group(folder: Path) -> None:
    theirs = folder / "metrics"
    theirs.mkdir()
    group = 65534
    os.chown(theirs, 0, group)
    theirs.chmod(0o2750)
    with StatusServer(PagerStandIn().as_pager(), str(theirs / "status.sock")) as server:
        assert isinstance(server.address, UnixAddress)
        there = Path(server.address.path).stat()
        assert (there.st_gid, there.st_mode & 0o777) == (group, 0o660)
