"""Pretraining of the mini base and of the judge on the rendered world."""
