"""The case that times training steps with and without the penalty."""

from bench.cases import enforcement


def test_run_times_both_sides_of_every_model_with_the_penalty_on():
    rows = list(enforcement.run(quick=True))
    assert [row["model"] for row in rows] == ["gpt2 relu", "llama relu", "gpt2 gelu"]
    for row in rows:
        assert row["tokens"] == 128
        assert 1 <= row["penalty"] <= 1024  # square-Hoyer counts neurons: the hooks have run
        assert row["plain_us"] > 0 and row["enforced_us"] > 0 and row["cost"] > -1
