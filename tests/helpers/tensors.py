"""Random tensors and the one measure of error that tests share."""

import torch


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(got, want) -> float:
    """Norm of the difference over the norm of what is wanted, in float64."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def assert_close(got, want, bound):
    """relative(got, want) is at most bound; the figure is printed, and a NaN fails."""
    assert got.shape == want.shape, f"{list(got.shape)} in place of {list(want.shape)}"
    error = relative(got, want)
    print(f"relative error {error:.1e}, at most {bound:.1e}")
    assert error <= bound, f"relative error {error:.2e}, at most {bound:.2e}"
