"""Seconds of one step that a model of the kernels forecasts, see docs/forecast.md. None was measured.

Written by tests/tools/forecast_steps.py. Files with int8 blocks, 81 frames, SageSLA at top-k 0.1, all weights on the
card.
"""

SECONDS = {  # (card, model of turbo_core.pipeline.plan, size)
    ("RTX 5090", "t2v-1.3b", "832x480"): 0.247,
    ("RTX 5090", "t2v-14b", "832x480"): 1.67,
    ("RTX 5090", "t2v-14b", "1280x720"): 4.46,
    ("RTX 4090", "t2v-1.3b", "832x480"): 0.33,
    ("RTX 4090", "t2v-14b", "832x480"): 2.23,
    ("RTX 4090", "t2v-14b", "1280x720"): 5.91,
    ("H200", "t2v-1.3b", "832x480"): 0.194,
    ("H200", "t2v-14b", "832x480"): 1.14,
    ("H200", "t2v-14b", "1280x720"): 3.13,
    ("RTX 4060", "t2v-1.3b", "832x480"): 1.7,
    ("RTX 4060", "t2v-14b", "832x480"): 11.8,
    ("RTX 4060", "t2v-14b", "1280x720"): 31.2,
    ("RTX 4060 Ti", "t2v-1.3b", "832x480"): 1.23,
    ("RTX 4060 Ti", "t2v-14b", "832x480"): 8.31,
    ("RTX 4060 Ti", "t2v-14b", "1280x720"): 22.0,
    ("RTX 4070", "t2v-1.3b", "832x480"): 0.89,
    ("RTX 4070", "t2v-14b", "832x480"): 6.12,
    ("RTX 4070", "t2v-14b", "1280x720"): 16.2,
    ("RTX 4080", "t2v-1.3b", "832x480"): 0.547,
    ("RTX 4080", "t2v-14b", "832x480"): 3.71,
    ("RTX 4080", "t2v-14b", "1280x720"): 9.85,
    ("RTX 5060 Ti", "t2v-1.3b", "832x480"): 1.05,
    ("RTX 5060 Ti", "t2v-14b", "832x480"): 7.28,
    ("RTX 5060 Ti", "t2v-14b", "1280x720"): 19.5,
    ("RTX 5070", "t2v-1.3b", "832x480"): 0.791,
    ("RTX 5070", "t2v-14b", "832x480"): 5.53,
    ("RTX 5070", "t2v-14b", "1280x720"): 14.8,
    ("RTX 5070 Ti", "t2v-1.3b", "832x480"): 0.56,
    ("RTX 5070 Ti", "t2v-14b", "832x480"): 3.91,
    ("RTX 5070 Ti", "t2v-14b", "1280x720"): 10.5,
    ("RTX 5080", "t2v-1.3b", "832x480"): 0.45,
    ("RTX 5080", "t2v-14b", "832x480"): 3.09,
    ("RTX 5080", "t2v-14b", "1280x720"): 8.28,
}
