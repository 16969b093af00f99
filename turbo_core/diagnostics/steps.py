"""Seconds of one step that a model of the kernels forecasts, see docs/forecast.md. None was measured.

Written by tests/tools/forecast_steps.py. Files with int8 blocks, 81 frames, SageSLA at top-k 0.15, all weights on the
card.
"""

SECONDS = {  # (card, model of turbo_core.pipeline.plan, size)
    ("RTX 5090", "t2v-1.3b", "832x480"): 0.26,
    ("RTX 5090", "t2v-14b", "832x480"): 1.73,
    ("RTX 5090", "t2v-14b", "1280x720"): 4.91,
    ("RTX 4090", "t2v-1.3b", "832x480"): 0.355,
    ("RTX 4090", "t2v-14b", "832x480"): 2.34,
    ("RTX 4090", "t2v-14b", "1280x720"): 6.53,
    ("H200", "t2v-1.3b", "832x480"): 0.212,
    ("H200", "t2v-14b", "832x480"): 1.22,
    ("H200", "t2v-14b", "1280x720"): 3.54,
    ("RTX 4060", "t2v-1.3b", "832x480"): 1.84,
    ("RTX 4060", "t2v-14b", "832x480"): 12.4,
    ("RTX 4060", "t2v-14b", "1280x720"): 34.7,
    ("RTX 4060 Ti", "t2v-1.3b", "832x480"): 1.32,
    ("RTX 4060 Ti", "t2v-14b", "832x480"): 8.72,
    ("RTX 4060 Ti", "t2v-14b", "1280x720"): 24.3,
    ("RTX 4070", "t2v-1.3b", "832x480"): 0.962,
    ("RTX 4070", "t2v-14b", "832x480"): 6.44,
    ("RTX 4070", "t2v-14b", "1280x720"): 18.0,
    ("RTX 4080", "t2v-1.3b", "832x480"): 0.59,
    ("RTX 4080", "t2v-14b", "832x480"): 3.9,
    ("RTX 4080", "t2v-14b", "1280x720"): 10.9,
    ("RTX 5060 Ti", "t2v-1.3b", "832x480"): 1.11,
    ("RTX 5060 Ti", "t2v-14b", "832x480"): 7.55,
    ("RTX 5060 Ti", "t2v-14b", "1280x720"): 21.5,
    ("RTX 5070", "t2v-1.3b", "832x480"): 0.834,
    ("RTX 5070", "t2v-14b", "832x480"): 5.75,
    ("RTX 5070", "t2v-14b", "1280x720"): 16.4,
    ("RTX 5070 Ti", "t2v-1.3b", "832x480"): 0.59,
    ("RTX 5070 Ti", "t2v-14b", "832x480"): 4.06,
    ("RTX 5070 Ti", "t2v-14b", "1280x720"): 11.5,
    ("RTX 5080", "t2v-1.3b", "832x480"): 0.474,
    ("RTX 5080", "t2v-14b", "832x480"): 3.21,
    ("RTX 5080", "t2v-14b", "1280x720"): 9.11,
}
