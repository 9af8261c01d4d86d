"""Fitting: capture what FFNs read, fit one layer at a time, and a plain training loop."""
