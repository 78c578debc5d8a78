"""Dtypes of a site."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of coefficients, parameters and sums for streams of `dtype`: float32 but for float64."""
    return torch.float64 if dtype is torch.float64 else torch.float32
