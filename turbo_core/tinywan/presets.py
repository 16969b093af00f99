"""Steps, sizes and learning rates of every stage of TinyWan's recipe; batches are of one process.

"cpu" is meant for two processes on two cores and three hours, "gpu" for one card; "try" shows in a minute that all of
it works, and learns nothing. "pair" is for the image-to-video experts, which are made on request.
"""

_SHIFT = {"shift": 5}  # of a pair's times: shows the high-noise expert a quarter of them, 3 an eighth

PRESETS = {
    "cpu": {
        "vae": {"dim": 8, "steps": 1500, "image_steps": 600},
        "decoder": {"steps": 1400, "image_steps": 0, "muon_lr": 0.012, "lr": 1.2e-3},
        "text": {"steps": 300},
        "data": {"count": 2800},
        "teacher": [
            {"steps": 900, "batch": 12, "kept_frames": 2, "muon_lr": 5e-3, "lr": 2e-3, "decay": 0.996},
            {"steps": 1600, "batch": 12, "kept_frames": 5, "muon_lr": 3e-3, "lr": 1.5e-3, "decay": 0.995},
            {"steps": 1000, "batch": 8, "muon_lr": 2.7e-3, "lr": 1.3e-3, "decay": 0.995},
        ],
        "distill": [
            {"steps": 420, "batch": 8, "kept_frames": 5},
            {"steps": 220, "batch": 4, "muon_lr": 4e-4, "lr": 2e-4, "alone": 0.12},
        ],
        "sparsify": {"steps": 900, "batch": 6, "muon_lr": 8e-4, "lr": 1.5e-3},
        "pair": {
            "data": {"count": 900},
            "teacher": [
                {"steps": 400, "batch": 12, "kept_frames": 5, "muon_lr": 2.7e-3, "lr": 1.3e-3, "decay": 0.99} | _SHIFT,
                {"steps": 700, "batch": 8, "muon_lr": 2e-3, "lr": 1e-3, "decay": 0.99} | _SHIFT,
            ],
            "distill": [
                {"steps": 150, "batch": 8, "kept_frames": 5} | _SHIFT,
                {"steps": 220, "batch": 4, "muon_lr": 6e-4, "lr": 3e-4, "decay": 0.98} | _SHIFT,
            ],
            "sparsify": {"steps": 400, "batch": 6, "muon_lr": 8e-4, "lr": 1.5e-3},
        },
    },
    "gpu": {
        "vae": {"dim": 8, "steps": 8000, "image_steps": 1000, "batch": 32},
        "decoder": {"steps": 8000, "image_steps": 0, "batch": 32},
        "text": {"steps": 1000},
        "data": {"count": 8000},
        "teacher": [
            {"steps": 6000, "batch": 64, "kept_frames": 2, "muon_lr": 5e-3, "lr": 2e-3},
            {"steps": 12000, "batch": 64, "muon_lr": 3e-3, "lr": 1.5e-3},
        ],
        "distill": [{"steps": 4000, "batch": 32}],
        "sparsify": {"steps": 2000, "batch": 32},
        "pair": {
            "data": {"count": 4000},
            "teacher": [{"steps": 4000, "batch": 64, "muon_lr": 2.7e-3, "lr": 1.3e-3} | _SHIFT],
            "distill": [{"steps": 2000, "batch": 32} | _SHIFT],
            "sparsify": {"steps": 1000, "batch": 32},
        },
    },
    "try": {
        "vae": {"dim": 8, "steps": 4, "image_steps": 2, "pool": 4},
        "decoder": {"steps": 1, "image_steps": 0, "pool": 2},
        "text": {"steps": 4, "batch": 4},
        "data": {"count": 4, "frames": 9, "side": 64},
        "teacher": [{"steps": 2, "batch": 2, "kept_frames": 2}, {"steps": 2, "batch": 2}],
        "distill": [{"steps": 4, "batch": 2, "kept_frames": 2}, {"steps": 2, "batch": 2, "alone": 0.5}],
        "sparsify": {"steps": 2, "batch": 2},
        "pair": {
            "data": {"count": 4, "frames": 9, "side": 64},
            "teacher": [{"steps": 2, "batch": 2, "kept_frames": 2}],
            "distill": [{"steps": 4, "batch": 2}],
            "sparsify": {"steps": 2, "batch": 2},
        },
    },
}
