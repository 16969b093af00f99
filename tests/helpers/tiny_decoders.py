"""Tiny decoders of the Wan 2.1 VAE in their published layout, random weights."""

import torch

WIDTHS = ((256, 1, 128), (128, 2, 64), (64, 2, 64))  # of a stage: channels, frames of one, channels after it


def tiny_decoder(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors float32 by their names in taew2_1, one of the encoder too; they make pixels around grey."""
    generator = torch.Generator().manual_seed(seed)
    state = {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}

    def add(name, out, channels, side=3, bias=True, gain=1.4):
        fan = channels * side * side
        state[f"{name}.weight"] = torch.randn(out, channels, side, side, generator=generator) * gain * fan**-0.5
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)

    add("decoder.1", 256, 16)
    for stage, (width, times, after) in enumerate(WIDTHS):
        first = 3 + 6 * stage
        for index in range(first, first + 3):
            add(f"decoder.{index}.conv.0", width, 2 * width)
            add(f"decoder.{index}.conv.2", width, width)
            add(f"decoder.{index}.conv.4", width, width, gain=0.3)
        add(f"decoder.{first + 4}.conv", width * times, width, 1, bias=False, gain=1.0)
        add(f"decoder.{first + 5}", after, width, bias=False, gain=1.0)
    add("decoder.22", 3, 64, gain=0.1)
    state["decoder.22.bias"] += 0.5
    return state
