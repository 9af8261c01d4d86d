"""Training FLOPs as a pure function of what a run did."""

import pytest

from moeify.pipeline.training_cost import SequenceCost, expected_modes, sequences_of_steps, training_flops
from moeify.ssd import Fallback, SSDConfig
from moeify.train.loop import TrainConfig, sequences_read

COST = SequenceCost(dense_flops=10.0, sparse_flops=4.0)


def test_dense_sparse_probes_and_lost_steps_add_up():
    lost = Fallback(step=1, failed=3, until=4, reason="", numbers={}, dense_steps=1, sparse_steps=2)
    flops = training_flops(
        COST,
        modes=["dense", "sparse", "sparse", "dense"],
        sequences=[2, 2, 1, 2],
        probe_steps=[0, 2],
        probe_sequences=3,
        fallbacks=[lost],
    )
    assert (flops.dense_steps, flops.sparse_steps) == (2, 2)
    assert flops.dense_flops == 3 * 10 * 4
    assert flops.sparse_flops == 3 * 4 * 3
    assert flops.probe_flops == 3 * (10 + 10 + 4)  # before step 2 training was sparse
    assert flops.lost_flops == pytest.approx(7 / 4 * (30 + 2 * 12))
    assert flops.all_dense_flops == 3 * 10 * 7
    assert flops.total_flops == 120 + 36 + 72 + 94.5
    assert flops.to_dict()["gain"] == flops.gain == 210 / 322.5


@pytest.mark.parametrize(("sequences", "batch", "steps"), [(10, 4, 7), (8, 4, 3), (3, 8, 2), (100, 1, 5)])
def test_sequences_of_steps_are_those_that_the_loop_takes(sequences, batch, steps):
    config = TrainConfig(steps=steps, batch_sequences=batch)
    found = sequences_of_steps(sequences, config)
    assert len(found) == steps
    if sum(found) < sequences:
        assert sum(found) == len(sequences_read(sequences, config))
    per_epoch = -(-sequences // batch)
    assert sum(found[:per_epoch]) == min(sequences, batch * len(found[:per_epoch]))


def test_modes_are_expected_by_the_schedule_or_by_a_share():
    fixed = SSDConfig(schedule="fixed", switches=(0.2, 0.5))
    assert expected_modes(fixed, 10) == ["dense"] * 2 + ["sparse"] * 3 + ["dense"] * 5
    assert expected_modes(SSDConfig(), 10).count("sparse") == 5
    assert expected_modes(None, 3) == ["dense"] * 3
