"""Inputs and tolerances shared by tests and benchmarks."""
