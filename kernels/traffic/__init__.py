"""Bytes and operations of every operator, and the times that they allow on named GPUs.

    traffic("seam", T=16384, n=4, C=4096, columns=24)    -> Traffic
    apart("seam", T=16384, n=4, C=4096, columns=24)      -> what its kernels move besides streams
    predicted_seconds("seam", GPUS["H200"], T=16384, n=4, C=4096, columns=24)

Streams dominate: a token has C elements of x, of h and of f, nC of X. The table counts them.

    floor        each tensor of streams once: what device memory has to move
    requested    what the loads and stores of the kernels ask for: where X does not fit on chip it
                 is read twice, the second time, with luck, from L2

Note: What is predicted and what is measured
    Requested bytes, of streams and apart, are what Triton's interpreter counts: tests compare them
    exactly, for the paper's variant; the table itself needs no Triton. Seconds are PREDICTED by a
    roofline: they assume the kernel reaches the copy rate of the device.
"""

from .apart import KERNELS, KINDS, Apart, apart, apart_bytes  # noqa: F401
from .roofline import GPUS, Gpu, predicted_seconds  # noqa: F401
from .streams import OF_MANY_STREAMS, OPERATORS, Traffic, traffic  # noqa: F401
