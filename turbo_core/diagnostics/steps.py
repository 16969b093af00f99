"""Seconds of one step that a model of the kernels forecasts, see docs/forecast.md. None was measured.

Written by tests/tools/forecast_steps.py. Files with int8 blocks, 81 frames, SageSLA at top-k 0.1, all weights on the
card.
"""

SECONDS = {  # (card, model of turbo_core.pipeline.plan, size)
    ("RTX 5090", "t2v-1.3b", "832x480"): 0.236,
    ("RTX 5090", "t2v-14b", "832x480"): 1.63,
    ("RTX 5090", "t2v-14b", "1280x720"): 4.36,
    ("RTX 4090", "t2v-1.3b", "832x480"): 0.326,
    ("RTX 4090", "t2v-14b", "832x480"): 2.22,
    ("RTX 4090", "t2v-14b", "1280x720"): 5.87,
    ("H200", "t2v-1.3b", "832x480"): 0.193,
    ("H200", "t2v-14b", "832x480"): 1.13,
    ("H200", "t2v-14b", "1280x720"): 3.11,
    ("RTX 4060", "t2v-1.3b", "832x480"): 1.69,
    ("RTX 4060", "t2v-14b", "832x480"): 11.7,
    ("RTX 4060", "t2v-14b", "1280x720"): 31.1,
    ("RTX 4060 Ti", "t2v-1.3b", "832x480"): 1.21,
    ("RTX 4060 Ti", "t2v-14b", "832x480"): 8.25,
    ("RTX 4060 Ti", "t2v-14b", "1280x720"): 21.8,
    ("RTX 4070", "t2v-1.3b", "832x480"): 0.882,
    ("RTX 4070", "t2v-14b", "832x480"): 6.09,
    ("RTX 4070", "t2v-14b", "1280x720"): 16.2,
    ("RTX 4080", "t2v-1.3b", "832x480"): 0.542,
    ("RTX 4080", "t2v-14b", "832x480"): 3.69,
    ("RTX 4080", "t2v-14b", "1280x720"): 9.79,
    ("RTX 5060 Ti", "t2v-1.3b", "832x480"): 1.0,
    ("RTX 5060 Ti", "t2v-14b", "832x480"): 7.1,
    ("RTX 5060 Ti", "t2v-14b", "1280x720"): 19.1,
    ("RTX 5070", "t2v-1.3b", "832x480"): 0.755,
    ("RTX 5070", "t2v-14b", "832x480"): 5.39,
    ("RTX 5070", "t2v-14b", "1280x720"): 14.5,
    ("RTX 5070 Ti", "t2v-1.3b", "832x480"): 0.535,
    ("RTX 5070 Ti", "t2v-14b", "832x480"): 3.81,
    ("RTX 5070 Ti", "t2v-14b", "1280x720"): 10.2,
    ("RTX 5080", "t2v-1.3b", "832x480"): 0.43,
    ("RTX 5080", "t2v-14b", "832x480"): 3.01,
    ("RTX 5080", "t2v-14b", "1280x720"): 8.1,
}
