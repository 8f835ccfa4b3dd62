# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How the benchmark makes figures of what guests, clients, hosts and migrations told."""

from __future__ import annotations

import pytest


def told(seq, rate=6, hist=(), uptime_ms=None, stall=10):
    return {"seq": seq, "rate_mib_s": rate, "stall_hist": list(hist), "uptime_ms": seq * 1000 if uptime_ms is None else uptime_ms, "stall_max_us": stall}


def test_percentiles_lie_within_their_bucket(figures):
    hist = [0, 98, 1, 0, 1]
    assert 1 < figures.percentile(hist, 0.5) < 2
    assert figures.percentile(hist, 0.98) == 2
    assert figures.percentile(hist, 0.99) == 4
    assert figures.percentile(hist, 1) == 16
    assert figures.percentile([0] * 10 + [2, 2], 0.25) == pytest.approx(2**9.5, abs=0.1)
    assert figures.percentile([], 0.5) is None
    assert figures.percentile([0, 0], 0.5) is None


def test_only_accesses_that_are_longer_than_usual_wait_for_a_page(figures):
    floor = figures.FLOOR_US.bit_length()
    quiet = [0] * floor
    usual = [told(1, hist=[100]), told(11, hist=[*quiet, 50])]  # five a second, move or not
    moving = [told(20, hist=[*quiet, 100]), told(24, hist=[9000, *quiet[1:], 130, 7])]
    assert figures.waits(usual, moving) == [*quiet, 10, 7]


def test_a_short_access_is_no_wait_however_many_there_are(figures):
    usual = [told(1, hist=[1]), told(2, hist=[1])]
    assert sum(figures.waits(usual, [told(3, hist=[1]), told(4, hist=[900, 900])])) == 0


def test_reports_without_a_histogram_are_left_out(figures):
    assert figures.waits([told(1), told(2, hist=[1])], [told(3, hist=[1]), told(4, hist=[2])]) == []


def test_only_stalls_of_the_move_count(figures):
    before = [told(n, hist=[100 * n, *[0] * 20, 5 * (n > 8)]) for n in range(1, figures.REPORTS + 2)]
    after = [told(10, hist=[1000, *[0] * 9, 7, *[0] * 10, 5], stall=6000)]
    seen = figures.measure(before, after, 0)
    assert seen["stalls"] == 7
    assert 512 < seen["stall_p50_us"] <= seen["stall_p99_us"] <= 1024
    assert seen["stall_max_us"] == 6000


def test_degraded_until_nine_tenths_of_the_earlier_rate_and_the_pause_counts(figures):
    before = [told(n, hist=[n]) for n in range(1, figures.REPORTS + 2)]
    after = [told(10, 1, [10]), told(11, 5.3, [11]), told(12, 5.4, [12])]
    assert figures.measure(before, after, 250)["degraded_ms"] == 3250
    assert figures.measure(before, after[:2], 250)["degraded_ms"] is None


def test_a_guest_that_writes_nothing_can_not_be_degraded(figures):
    before = [told(n, 0, [n]) for n in range(1, figures.REPORTS + 2)]
    assert figures.measure(before, [told(10, 0, [10])], 250)["degraded_ms"] is None
    assert figures.measure(before, before, None)["degraded_ms"] is None


def test_the_quickest_answer_tells_a_clock_best(figures):
    value, error = figures.ahead([(10.0, 115.0, 10.4), (11.0, 116.002, 11.01), (12.0, 120.0, 13.0)])
    assert (value, error) == (pytest.approx(104.997), pytest.approx(0.005))


def test_two_measurements_of_a_clock_agree_or_it_has_gone_wrong(figures):
    assert figures.agreed((5.0, 0.02), (5.01, 0.005)) == (5.01, 0.005)
    assert figures.agreed((5.0, 0.02), (5.1, 0.005)) == (5.1, pytest.approx(0.08))


def test_a_pause_is_from_the_last_stop_to_the_first_run(figures):
    assert figures.pause("STOP 1.5\nRESUME 1.75\nSTOP 10.000250\n", "RESUME 12.5\nSTOP 20.0\nRESUME 21.0\n") == (10.00025, 12.5)
    virsh = "event {} at {} for domain 'bench-libvirt': <null>\n"
    assert figures.pause(virsh.format("STOP", "1.000002"), virsh.format("RESUME", "1.200000")) == (1.000002, 1.2)
    assert figures.pause(virsh.format("MIGRATION", "1.000002"), virsh.format("RESUME", "1.200000")) is None
    assert figures.pause("STOP 1.0\n", "") is None


def result(per_second, latency, updated, **more):
    return {"started": 1000.0, "updated": updated, "per_second": per_second, "worst_ms_per_second": [float(n) for n in per_second], "latency_ms": latency,
            "requests": sum(per_second), "failed": 0, "wrong": 0, **more}  # fmt: skip


def test_what_a_client_saw_is_cut_out_around_the_move(figures):
    before = result([100] * 20 + [3], [[1.0, 2000], [2.0, 3]], 1020.1)
    after = result([100] * 24 + [10, 0, 50, 95, 100, 7], [[1.0, 2400], [2.0, 3], [800.0, 4]], 1029.2)
    times = {"started": 1021.0, "switched": 1025.4, "finished": 1027.0}
    seen = figures.served(before, after, times, 300)
    assert seen["rate_before_s"] == 100
    # The first whole second after the switch with 90 requests is the one from 27 to 28.
    assert seen["degraded_ms"] == 2900
    assert seen["latency_ms"] == [[1.0, 400], [800.0, 4]]
    assert (seen["latency_p50_ms"], seen["latency_p99_ms"], seen["latency_worst_ms"]) == (1.0, 1.0, 100.0)
    course = seen["course"]
    assert (course["first_s"], course["started_s"], course["finished_s"]) == (-13.4, -4.4, 1.6)
    assert course["per_second"] == [100] * 12 + [10, 0, 50, 95, 100]


def test_the_last_second_of_a_client_is_not_over_and_does_not_count(figures):
    assert figures.until_again(result([100, 100, 100], [], 1002.5), 1001.5, 0, 100) is None


def test_latencies_of_some_runs_are_one(figures):
    rows = [{"latency_ms": [[1.0, 5], [4.0, 1]]}, {"latency_ms": [[2.0, 3], [4.0, 1]]}]
    assert figures.pooled(rows) == [[1.0, 5], [2.0, 3], [4.0, 2]]
    assert figures.slower_than(figures.pooled(rows), 0.9) == 4.0
    assert figures.slower_than([], 0.5) is None


def test_a_processor_counts_what_is_not_a_guest_and_not_idle(figures):
    #        user nice system idle iowait irq softirq steal guest
    lines = ["100.0 cpu 1000 0 500 9000 10 20 30 0 600 0", "101.0 cpu 1100 0 520 9000 10 20 40 0 650 0", "102.0 cpu 1100 0 620 9000 10 20 40 0 650 0"]
    samples = "\n".join(lines)
    assert figures.cpu_between(samples, 100.0, 101.0) == pytest.approx(0.8)
    assert figures.cpu_between(samples, 100.5, 101.5) == pytest.approx(0.4 + 0.5)
    assert figures.cpu_between(samples + "\n103.0 cpu 12", 0, 200) == pytest.approx(1.8)
    assert figures.cpu_between(lines[0], 100, 101) is None


def test_what_the_kernel_counted(figures):
    counted = {"wait_hist": [0] * 10 + [4], **dict.fromkeys(("pages_ahead", "pages_zero", "pages_bubble", "pages_background"), 1), "pages_demand": 1024}
    seen = figures.kernel(counted, 64)
    assert seen["faults_per_working_set"] == 0.0625
    assert 512 < seen["wait_p50_us"] < seen["wait_p99_us"] <= 1024
    assert figures.kernel(None, 64) == {}


def test_medians_are_of_one_engine_driver_and_workload(figures, row):
    rows = [row(), row(downtime_ms=260), row(downtime_ms=210, degraded_ms=None), row(driver="libvirt", corrupt=2)]
    del rows[3]["bytes"]
    qmp, libvirt = figures.medians(rows)
    assert (qmp["runs"], qmp["downtime_ms"], qmp["degraded_ms"], qmp["corrupt"]) == (3, 210, 4000, 0)
    assert (libvirt["runs"], libvirt["corrupt"], libvirt["bytes"]) == (1, 2, None)


def test_a_run_that_was_given_up_counts_as_a_run_and_has_no_figures(figures, row):
    failed = {key: value for key, value in row().items() if key in ("engine", "transport", "driver", "workload", "corrupt", "failed")}
    (found,) = figures.medians([row(), {**failed, "result": "failed", "reason": "it did not converge"}])
    assert (found["runs"], found["moved"], found["total_ms"]) == (2, 1, 9000)


def verdict(found, figure, judged):
    return next(each for each in found if (each["figure"], each["judged"]) == (figure, judged))


def test_ratios_are_to_userfault_of_the_same_driver_and_workload(figures, row):
    rows = [row(), row(driver="libvirt", total_ms=1), row(workload="idle", total_ms=1), row("precopy", total_ms=1),
            row("remote_ram", "siw", total_ms=7200, stall_p99_us=5000.0, downtime_ms=150)]  # fmt: skip
    found = figures.verdicts(rows, [], 300)
    total = verdict(found, "total_ms", "ratio")
    assert (total["value"], total["ours"], total["stock"], total["met"]) == (0.8, 7200, 9000, True)
    stall = verdict(found, "stall_p99_us", "ratio")
    assert (stall["value"], stall["met"]) == (0.556, False)
    assert all(each["transport"] == "siw" and each["workload"] == "hot" for each in found)


def test_no_run_may_be_longer_than_max_downtime(figures, row):
    rows = [row("remote_ram", "rxe", downtime_ms=ms, faults_per_working_set=share) for ms, share in ((10, 0.1), (20, 0.2), (301, 0.1))]
    found = figures.verdicts(rows, [], 300)
    assert (verdict(found, "downtime_ms", "worst run")["value"], verdict(found, "downtime_ms", "worst run")["met"]) == (301, False)
    assert verdict(found, "faults_per_working_set", "worst run")["met"] is False
    assert verdict(found, "downtime_ms", "ratio")["met"] is None


def test_no_migration_may_be_given_up(figures, row):
    found = figures.verdicts([row("remote_ram", "siw"), row("remote_ram", "siw", result="failed")], [], 300)
    assert (verdict(found, "given_up", "sum")["value"], verdict(found, "given_up", "sum")["met"]) == (1, False)


def test_no_page_may_be_corrupt_and_no_request_lost(figures, row):
    found = figures.verdicts([row("remote_ram", "siw"), row("remote_ram", "siw", corrupt=1, failed=2)], [], 300)
    assert [verdict(found, figure, "sum")["met"] for figure in ("corrupt", "failed")] == [False, False]


def test_evictions_are_compared_with_the_loop(figures):
    rows = [{"how": how, "transport": transport, "play_s": seconds} for how, transport, seconds in
            (("loop", None, 100), ("evacuate", "siw", 40), ("evacuate", "rxe", 61), ("loop", None, 120),
             ("evacuate", "siw", 50), ("evacuate", "rxe", 61))]  # fmt: skip
    siw, rxe = figures.verdicts([], rows, 300)
    assert (siw["transport"], siw["ours"], siw["stock"], siw["value"], siw["met"]) == ("siw", 45, 110, 0.409, True)
    assert (rxe["transport"], rxe["value"], rxe["met"]) == ("rxe", 0.555, False)
    assert figures.verdicts([], rows[1:3], 300)[0]["met"] is None
