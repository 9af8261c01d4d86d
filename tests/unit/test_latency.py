"""The clock itself, with a fake one."""

import itertools

import pytest

from moeify.evaluate import measure_ms


def test_measure_ms_interleaves_and_leaves_warmup_out(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("moeify._latency.time.perf_counter", lambda: next(ticks) * 1e-3)
    calls = []
    result = measure_ms({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert result["a"].median_ms == pytest.approx(1.0)
    assert result["b"].p20_ms <= result["b"].median_ms <= result["b"].p80_ms


def test_measure_ms_waits_for_device_around_each_call():
    waits = []
    measure_ms({"a": lambda: None}, rounds=2, warmup=1, sync=lambda: waits.append(1))
    assert len(waits) == 6


def test_measure_ms_without_rounds_raises():
    with pytest.raises(ValueError, match="rounds"):
        measure_ms({"a": lambda: None}, rounds=0)
