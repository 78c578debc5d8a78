"""Dtypes of a site."""

import functools

import torch


@functools.cache  # asked at every call of some operators: a cached answer is no Python call
def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of coefficients, parameters and sums for streams of `dtype`: float32 but for float64."""
    return torch.float64 if dtype is torch.float64 else torch.float32
