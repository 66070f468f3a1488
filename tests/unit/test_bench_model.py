"""The model of many threads that fault: cases whose answer is known, and what it is fed with."""

import itertools
from dataclasses import replace
from math import factorial
from pathlib import Path

import pytest

from latepage.bench.model import (
    DELIVERIES,
    MANY,
    QUICK_LOCK,
    SOME,
    WITHIN,
    Measured,
    against,
    costs_of,
    forecasts,
    hosts,
    network,
)
from latepage.bench.model_report import draw_forecasts, forecast_table
from latepage.bench.published import SERIES, Series
from latepage.bench.queueing import Costs, Network, foretell, repairman, scaled_to

UFFD = Costs(own=5.0, served=6.0, waiter=0.08, idle=50.0, shared=0.46)
EXIT = Costs(own=6.0, shared=0.46)


def test_one_thread_meets_nobody() -> None:
    costs = Costs(own=5.0, served=6.0, waiter=3.0, idle=50.0, shared=1.0)
    for cores in (1, 2, 256):
        assert foretell(costs, Network(1, cores)) == pytest.approx(1e6 / (5 + 6 + 50 + 1))
    assert foretell(costs, Network(1, 2, think=38.0)) == pytest.approx(1e6 / 100)


@pytest.mark.parametrize("threads", [1, 2, 5, 20])
def test_one_server_is_the_machine_repairman(threads: int) -> None:
    away, service = 7.0, 2.0
    # p(n) = N! / (N - n)! r^n p(0), and the rate is what the server does while it is not idle.
    weights = [factorial(threads) / factorial(threads - n) * (service / away) ** n for n in range(threads + 1)]
    rate = (1 - 1 / sum(weights)) / service
    assert repairman(threads, away, lambda _: service) == pytest.approx(rate)
    assert foretell(Costs(own=away, served=service), Network(threads)) == pytest.approx(1e6 * rate)


def test_with_cores_for_all_and_many_threads_the_server_is_the_limit() -> None:
    assert foretell(Costs(own=5.0, served=10.0), Network(1000)) == pytest.approx(1e5)
    assert foretell(Costs(own=5.0, served=10.0), Network(1000, servers=4, queues=4)) == pytest.approx(4e5)


def test_where_each_thread_serves_itself_cores_are_the_limit() -> None:
    for cores in (1, 2, 16):
        rate = foretell(Costs(own=5.0), Network(1024, cores))
        assert 0.9 * cores * 2e5 < rate <= cores * 2e5
    assert foretell(Costs(own=5.0), Network(64)) == pytest.approx(64 * 2e5)


def test_a_lock_that_all_share_is_a_limit_whatever_the_cores() -> None:
    assert foretell(Costs(own=5.0, shared=0.5), Network(512, 256)) == pytest.approx(2e6, rel=0.01)


def test_those_who_wait_in_one_queue_slow_it_down_and_several_queues_help() -> None:
    one = [foretell(UFFD, Network(threads, 64)) for threads in (16, 64, 256, 1024)]
    assert one == sorted(one, reverse=True)
    # At the end all wait, and each fault looks at all of them.
    assert one[-1] == pytest.approx(1e6 / (6 + 0.08 * 1023), rel=0.05)
    assert foretell(UFFD, Network(1024, 64, servers=4, queues=64)) > 10 * one[-1]
    channel = replace(UFFD, waiter=0.0)
    assert foretell(channel, Network(1024, 64)) == pytest.approx(1e6 / 6, rel=0.01)


@pytest.mark.parametrize("costs", [UFFD, EXIT])
def test_more_cores_never_harm(costs: Costs) -> None:
    for threads in (1, 8, 512):
        rates = [foretell(costs, Network(threads, cores)) for cores in (1, 2, 4, 64, 256)]
        assert all(more >= 0.999 * fewer for fewer, more in itertools.pairwise(rates))


def test_a_thread_that_thinks_long_leaves_the_server_idle() -> None:
    rate = foretell(UFFD, Network(8, 64, think=10_000.0))
    assert rate == pytest.approx(8e6 / (10_000 + 5 + 6 + 50 + 0.46), rel=0.01)


def test_costs_come_back_from_what_was_measured() -> None:
    costs = Costs(own=5.0, served=6.0, waiter=0.1, idle=40.0)

    def measured(rate: float) -> Measured:
        return Measured(rate, costs.own, costs.served)

    # Where all of them wait, a fault takes what the queue takes.
    of = {
        1: measured(1e3 / (5 + 6 + 40)),
        8: measured(80.0),
        SOME: measured(1e3 / (6 + 0.1 * SOME)),
        MANY: measured(1e3 / (6 + 0.1 * MANY)),
    }
    found = costs_of("uffd", of)
    assert (found.own, found.served) == (5.0, 6.0)
    assert found.waiter == pytest.approx(0.1)
    assert found.idle == pytest.approx(40.0)
    # Few threads have one userfaultfd: of several there is no such figure.
    assert costs_of("sharded", {count: what for count, what in of.items() if count in (SOME, MANY)}).own == 5.0
    by_itself = costs_of("exit", {count: Measured(100.0, 7.0, 0.0) for count in (1, 8, SOME, MANY)})
    assert (by_itself.own, by_itself.served, by_itself.waiter, by_itself.idle) == (7.0, 0.0, 0.0, 0.0)


def test_another_machine_is_scaled_by_one_known_rate() -> None:
    scaled = scaled_to(2e5, replace(UFFD, idle=0.0), Network(2, 48))
    assert foretell(scaled, Network(2, 48)) == pytest.approx(2e5, rel=1e-3)
    assert (scaled.waiter, scaled.shared) == (UFFD.waiter, UFFD.shared)
    assert scaled.own / scaled.served == pytest.approx(UFFD.own / UFFD.served)


@pytest.mark.parametrize("series", SERIES, ids=lambda series: series.name)
def test_beside_what_is_published_the_first_point_is_right_and_the_others_say_by_what_they_miss(series: Series) -> None:
    costs = {"exit": EXIT, "sharded": replace(UFFD, shared=1.42)}.get(series.delivery, UFFD)
    figures = against(series, costs)
    assert [figure.limit for figure in figures] == list(series.rates.values())
    assert figures[0].ratio == pytest.approx(1.0, rel=1e-3)
    assert figures[0].bound is None
    for figure in figures:
        assert figure.peer == f"published; from here: {'w' if series.delivery == 'uffd' else 'nothing'}"
        assert figure.ratio == pytest.approx(max(figure.value / figure.limit, figure.limit / figure.value))
        assert figure.bound in (None, WITHIN)
    assert any(figure.bound == WITHIN for figure in figures)


@pytest.mark.parametrize("series", SERIES, ids=lambda series: series.name)
def test_beside_what_is_published_it_says_what_was_taken_from_here(series: Series) -> None:
    told = [figure.value for figure in against(series, replace(UFFD, served=0.0 if series.delivery == "exit" else 6.0))]
    slower = Costs(own=15.0, served=0.0 if series.delivery == "exit" else 18.0, waiter=UFFD.waiter, idle=9.0, shared=UFFD.shared)
    assert [figure.value for figure in against(series, slower)] == pytest.approx(told, rel=1e-6)
    slower_queue = [figure.value for figure in against(series, replace(slower, waiter=2 * UFFD.waiter))]
    assert (slower_queue == pytest.approx(told, rel=1e-4)) == (series.delivery != "uffd")


def test_one_core_foretells_itself_only() -> None:
    assert hosts(1) == [1]
    assert hosts(2) == [2, 16, 64, 256]
    assert hosts(64) == [16, 64, 256]


def test_on_many_cores_what_is_foretold_of_exit_is_the_lock_that_all_share() -> None:
    slow, quick = (forecasts({"exit": replace(EXIT, shared=shared)}, 256)["exit"][512] for shared in (0.46, QUICK_LOCK))
    assert (slow, quick) == pytest.approx((1e3 / 0.46, 1e3 / QUICK_LOCK), rel=0.05)


def test_several_userfaultfds_are_read_by_as_many_workers_as_a_pager_has() -> None:
    assert network("uffd", 512, 64) == Network(512, 64)
    assert network("sharded", 512, 64) == Network(512, 64, servers=4, queues=32)
    assert network("sharded", 512, 2) == Network(512, 2, servers=2, queues=32)
    assert network("sharded", 8, 64) == Network(8, 64, servers=1, queues=1)


def test_what_is_foretold_becomes_a_table_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    costs = dict.fromkeys(DELIVERIES, UFFD) | {"exit": EXIT}
    told = {cores: forecasts(costs, cores) for cores in (2, 64)}
    table = forecast_table(told)
    assert [str(column.header) for column in table.columns] == ["cores", "vCPUs", *DELIVERIES]
    assert table.row_count == 2 * len(told[2]["uffd"])
    path = tmp_path / "model.svg"
    draw_forecasts(told, 2, {"uffd": {1: 11.0, 64: 90.0}}, path)
    assert all(f">{name}<" in path.read_text() for name in DELIVERIES)
    assert "2 cores (this machine)" in path.read_text()
