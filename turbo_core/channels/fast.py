"""The norm by the Triton kernel, under the name and with the arguments of reference.py.

Importing this needs Triton: turbo_core.channels.paths does so where the kernel computes.
"""

from ..kernels.norm_silu import norm_silu

__all__ = ["norm_silu"]
