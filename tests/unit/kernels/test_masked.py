"""What is special to the masked kernel: dense GEMMs, exactly."""

import torch
from ffn_cases import random_ffn, random_plan

from moeify.kernels import masked
from moeify.sites.formula import ffn_dense


def test_masked_when_all_experts_run_is_the_dense_ffn_to_the_bit():
    weights, x_TD = random_ffn(16, 30, gated=True, biased=True), torch.randn(5, 16)
    assert masked.moe_ffn(x_TD, weights, random_plan(5, 4, 1.0), activation="silu").equal(ffn_dense(x_TD, weights, activation="silu"))
