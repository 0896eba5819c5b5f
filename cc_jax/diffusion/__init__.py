"""Noise schedules and samplers: pure functions."""
