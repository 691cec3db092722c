"""Timings on a CUDA device."""
