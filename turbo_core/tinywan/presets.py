"""Steps, sizes and learning rates of every stage of TinyWan's recipe; batches are of one process.

"cpu" is meant for two processes on two cores and some hours, and made what lies in models/tinywan; "gpu", for one card,
has never been run. "try" shows in a minute that all of it works, and learns nothing. "pair" is for the image-to-video
experts, which are made on request.
"""

# of a teacher from nothing; how high its rates may go was tried out, see models/tinywan/log.md
_FAST = {"muon_lr": 0.02, "lr": 3e-3, "decay": 0.997, "compiled": True}
_AS_TAUGHT = {"shift": 6, "compiled": True}
_ORBITS = {"count": 600, "motion": "orbits"}
_SHIFT = {"shift": 5}  # of a pair's times: shows the high-noise expert a quarter of them, 3 an eighth

PRESETS = {
    "cpu": {
        "vae": {"dim": 8, "steps": 1500, "image_steps": 600, "side": 128},
        "decoder": {"steps": 1400, "image_steps": 0, "muon_lr": 0.012, "lr": 1.2e-3},
        "text": {"steps": 1000, "muon_lr": 5e-3, "lr": 1e-3},
        "data": {"count": 3000},  # 21 key blocks, of which sparse attention keeps three or two
        "teacher": [
            {"steps": 2200, "batch": 32, "kept": [5, 6, 6], "shift": 10} | _FAST | {"muon_lr": 0.03, "lr": 5e-3},
            {"steps": 1200, "batch": 8, "kept": [5, 12, 12], "shift": 6} | _FAST,
            {"steps": 1000, "batch": 5, "shift": 6} | _FAST,
            {"steps": 900, "batch": 16, "kept": [9, 6, 6], "shift": 10, "more": _ORBITS} | _FAST,
            {"steps": 600, "batch": 5, "shift": 6} | _FAST,
        ],
        "distill": [
            {"steps": 400, "batch": 4, "kept": [5, 12, 12], "muon_lr": 2e-3, "lr": 5e-4} | _AS_TAUGHT,
            {"steps": 250, "batch": 3, "muon_lr": 1e-3, "lr": 3e-4, "alone": 0.0} | _AS_TAUGHT,
        ],
        "sparsify": [
            {"steps": 500, "batch": 4, "muon_lr": 2e-3, "lr": 1.5e-3},
            {"steps": 500, "batch": 4, "start": 0.15, "muon_lr": 1.5e-3, "lr": 1e-3, "more": _ORBITS},
        ],
        "pair": {
            "data": {"count": 900},
            "teacher": [
                {"steps": 350, "batch": 6, "kept": [5, 12, 12], "muon_lr": 0.01, "lr": 2e-3, "decay": 0.99} | _SHIFT,
                {"steps": 350, "batch": 4, "muon_lr": 0.01, "lr": 1.5e-3, "decay": 0.99} | _SHIFT,
            ],
            "distill": [
                {"steps": 150, "batch": 4, "kept": [5, 12, 12], "muon_lr": 2e-3, "lr": 5e-4} | _SHIFT,
                {"steps": 120, "batch": 3, "muon_lr": 1e-3, "lr": 3e-4, "alone": 0.0, "decay": 0.98} | _SHIFT,
            ],
            "sparsify": [{"steps": 250, "batch": 4, "muon_lr": 2e-3, "lr": 1.5e-3}],
        },
    },
    "gpu": {
        "vae": {"dim": 8, "steps": 8000, "image_steps": 1000, "batch": 32},
        "decoder": {"steps": 8000, "image_steps": 0, "batch": 32},
        "text": {"steps": 1000, "muon_lr": 5e-3, "lr": 1e-3},
        "data": {"count": 8000},
        "teacher": [
            {"steps": 6000, "batch": 64, "kept": [5, 6, 6], "muon_lr": 3e-2, "lr": 2e-3},
            {"steps": 12000, "batch": 64, "muon_lr": 3e-3, "lr": 1.5e-3},
        ],
        "distill": [{"steps": 4000, "batch": 32}],
        "sparsify": [{"steps": 2000, "batch": 32}],
        "pair": {
            "data": {"count": 4000},
            "teacher": [{"steps": 4000, "batch": 64, "muon_lr": 2.7e-3, "lr": 1.3e-3} | _SHIFT],
            "distill": [{"steps": 2000, "batch": 32} | _SHIFT],
            "sparsify": [{"steps": 1000, "batch": 32}],
        },
    },
    "try": {
        "vae": {"dim": 8, "steps": 4, "image_steps": 2, "pool": 4, "side": 64},
        "decoder": {"steps": 1, "image_steps": 0, "pool": 2, "side": 64},
        "text": {"steps": 4, "batch": 4},
        "data": {"count": 4, "frames": 9, "side": 64},
        "teacher": [
            {"steps": 2, "batch": 2, "kept": [2, 2, 2]},
            {"steps": 2, "batch": 2, "more": {"count": 2, "motion": "orbits", "frames": 9, "side": 64}},
        ],
        "distill": [{"steps": 4, "batch": 2, "kept": [2, 2, 2]}, {"steps": 2, "batch": 2, "alone": 0.5}],
        "sparsify": [
            {"steps": 2, "batch": 2},
            {"steps": 1, "batch": 2, "start": 0.15, "more": {"count": 2, "motion": "orbits", "frames": 9, "side": 64}},
        ],
        "pair": {
            "data": {"count": 4, "frames": 9, "side": 64},
            "teacher": [{"steps": 2, "batch": 2, "kept": [2, 2, 2]}],
            "distill": [{"steps": 4, "batch": 2}],
            "sparsify": [{"steps": 2, "batch": 2}],
        },
    },
}
