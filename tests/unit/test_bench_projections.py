"""The case that compares the starts of distilled projections."""

from bench.cases import projections


def test_run_distils_layers_from_both_starts_and_counts_steps_to_the_same_loss():
    rows = list(projections.run(quick=True))
    assert len(rows) == 2
    for row in rows:
        assert row["random_before"] > row["random_after"] > 0
        assert row["svd_before"] < row["random_before"]
        assert row["svd_steps"] is None or 0 <= row["svd_steps"] <= row["steps"]


def test_running_mean_is_of_windows():
    assert projections._running_mean([1.0, 3.0]) == [2.0]
    assert projections._running_mean([0.0] * 16 + [16.0]) == [0.0, 1.0]
