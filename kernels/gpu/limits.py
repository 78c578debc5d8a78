"""What the Triton kernels take; without Triton, for whoever counts their bytes."""

MOST_STREAMS = 10
"""Of a site."""

MOST_COLUMNS = 128
"""Columns of φ that fit one program: n² + 2n of up to 10 streams."""

MOST_FUSED_STREAMS = 4
"""Of a seam in one kernel. More do not fit the registers: those seams are made of the kernels of
both sites."""
