"""Times and errors of the kernels on this machine, beside other contenders."""
