"""Stable Diffusion bases: finding, downloading, reading and writing them."""
