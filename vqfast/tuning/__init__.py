"""Test-time tuning of one input at a time: configuration, candidate search, the step, the tuner."""
