"""The wall clock: no drift over thousands of events, calls from outside at the moment they were made."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from simpy.core import EmptySchedule

from helios_sim.live import clock as clock_module
from helios_sim.live.clock import WallClock

MS = 1_000_000


def run_until_empty(clock: WallClock) -> None:
    with suppress(EmptySchedule):
        while True:
            clock.step()


def test_two_thousand_steps_do_not_drift() -> None:
    clock = WallClock()
    late_ns = []

    def ticking():
        for _ in range(2000):
            yield clock.timeout(MS // 2)
            late_ns.append(clock.wall_ns - clock.now)

    clock.process(ticking())
    clock.sync()
    run_until_empty(clock)
    assert clock.now == 2000 * MS // 2
    assert isinstance(clock.now, int)
    assert min(late_ns) >= 0  # never early
    # lateness does not add up: the last steps are as punctual as the first, whatever else this machine does
    assert np.percentile(late_ns[-500:], 25) < 2 * MS


def test_no_time_passes_while_the_clock_is_stopped() -> None:
    clock = WallClock()
    seen = []

    def looking():
        yield clock.timeout(MS)
        before_ns = clock.wall_ns
        with clock.stopped():
            time.sleep(0.05)
        seen.append(clock.wall_ns - before_ns)
        later = clock.timeout(10 * MS)
        began_s, rest_ns = time.monotonic(), clock.now + 10 * MS - clock.wall_ns
        yield later
        seen.append(round((time.monotonic() - began_s) * 1e9) - rest_ns)

    clock.process(looking())
    clock.sync()
    run_until_empty(clock)
    stood_ns, late_ns = seen
    assert 0 <= stood_ns < 40 * MS
    assert late_ns > -MS  # what is due later is due as much later by any other clock
    with pytest.raises(ZeroDivisionError), clock.stopped():
        raise ZeroDivisionError  # it goes on all the same
    assert clock.wall_ns > 11 * MS


def test_time_that_the_host_takes_counts() -> None:
    clock = WallClock()
    seen = []

    def busy():
        yield clock.timeout(MS)
        time.sleep(0.02)
        seen.append((clock.now, clock.wall_ns))
        yield clock.timeout(MS)  # due long ago
        seen.append((clock.now, clock.wall_ns))

    clock.process(busy())
    clock.sync()
    run_until_empty(clock)
    (first, wall), (second, later) = seen
    assert (first, second) == (MS, 2 * MS)
    assert wall >= 21 * MS
    assert later >= wall


def test_a_call_from_outside_happens_at_its_own_time() -> None:
    clock = WallClock()
    clock.open_door()
    order: list[tuple[str, int]] = []

    def caller() -> None:
        time.sleep(0.03)
        for i in range(3):
            clock.call(lambda i=i: order.append((f"call {i}", clock.now)))
            time.sleep(0.002)
        clock.call(clock.close_door)

    def computing():
        yield clock.timeout(MS)
        time.sleep(0.08)  # all calls are made meanwhile
        end_ns = clock.wall_ns
        yield clock.timeout(end_ns - clock.now)
        order.append(("computed", clock.now))

    clock.process(computing())
    thread = threading.Thread(target=caller)
    clock.sync()
    thread.start()
    run_until_empty(clock)
    thread.join()
    assert [name for name, _ in order] == ["call 0", "call 1", "call 2", "computed"]
    times = [at for _, at in order]
    assert times == sorted(times)
    assert times[0] >= 29 * MS  # when it was made, not when it was noticed
    assert times[2] < 80 * MS


def test_an_open_door_is_waited_on_and_a_call_wakes() -> None:
    clock = WallClock()
    clock.open_door()
    heard: list[int] = []

    def heard_one() -> None:
        heard.append(clock.now)
        clock.close_door()

    timer = threading.Timer(0.03, lambda: clock.call(heard_one))
    clock.sync()
    timer.start()
    run_until_empty(clock)
    assert heard[0] >= 29 * MS


def test_without_a_door_an_empty_schedule_ends() -> None:
    with pytest.raises(EmptySchedule):
        WallClock().step()


def test_a_signal_that_ends_no_wait_is_handled_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes between Python's look at signals and the wait itself: SIGTERM would stop no idle server."""
    monkeypatch.setattr(clock_module, "_WAIT_S", 0.02)
    clock, handled = WallClock(), []

    def on_signal(number: int, frame: object) -> None:
        handled.append(number)
        clock.call(clock.close_door)

    before = signal.signal(signal.SIGUSR1, on_signal)
    waits = (0.1, _thread.interrupt_main, [signal.SIGUSR1]), (10, clock.call, [clock.close_door])
    timers = [threading.Timer(*wait) for wait in waits]
    try:
        clock.open_door()
        for timer in timers:
            timer.start()
        run_until_empty(clock)
        assert handled == [signal.SIGUSR1]
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGUSR1, before)
