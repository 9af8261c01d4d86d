"""Measurements: every case checks correctness first, interleaves what it compares in one process, and reports medians with their spread."""
