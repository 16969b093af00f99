"""What sparse attention asks of the device in one evaluation, and calls of the override that are not for it."""

import torch


class Counted:
    """sigmas of one evaluation that count how often they are read."""

    def __init__(self, sigma):
        self.sigma, self.reads = sigma, 0

    def max(self):
        self.reads += 1
        return torch.tensor(self.sigma)


def test_sigma_is_read_once_for_all_blocks(lab):
    """Each read would let the host wait for the card, 40 times a step."""
    part = lab.pack.settings
    settings = {**part.DEFAULTS, "sigma_start": 0.7}
    options = {part.OPTIONS: settings}
    for sigma, expected in ((0.5, settings), (0.9, None)):  # the second evaluation comes with the same options
        options["sigmas"] = Counted(sigma)
        for options["block_index"] in range(4):
            assert part.active_settings(options, 360, 64) is expected
        assert options["sigmas"].reads == 1


def test_a_call_for_another_shape_of_result_is_not_ours(lab):
    model = lab.attention(lab.load("tiny_wan_stock_bf16.safetensors"), 0.3)
    options = {**model.model_options["transformer_options"], "block_index": 0}
    q = torch.randn(1, 130, 128, generator=torch.Generator().manual_seed(0))
    for extra, given in (({}, 0), ({"skip_output_reshape": False}, 0), ({"skip_output_reshape": True}, 1)):
        seen = []
        options["optimized_attention_override"](
            lambda *args, seen=seen, **kwargs: seen.append(kwargs), q, q, q, 2, transformer_options={**options}, **extra
        )
        assert len(seen) == given
    assert seen[0]["skip_output_reshape"]
