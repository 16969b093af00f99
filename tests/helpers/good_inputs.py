"""Inputs that each node takes, to replace one of them by a bad one."""

from tests.helpers.lab import STOCK, T2V

BLOCK = "block (TurboWan)"


def good_inputs(node, given):
    """Inputs that this node takes, by name; given: see the fixture."""
    model, run = given["t2v"], {"positive": given["positive"], "latent_image": given["latent"], "seed": 0, "steps": 1}
    return {
        "TurboLoader": {"model_name": T2V},
        "TurboLoraReport": {"model": model, "lora_name": STOCK},
        "QuantizeW8A8": {"model": model, "format": BLOCK},
        "SparseLowBitAttention": {"model": model, "topk": 0.3, "precision": "bf16"},
        "TurboScheduler": {"steps": 4, "sigma_max": 0.0},
        "TurboSampler": {"model": model, **run, "sigma_max": 0.0},
        "TurboSave": {"model": model, "filename_prefix": "x"},
        "TurboTextEncoderLoader": {"text_encoder": "x"},
        "TurboVAE": {"vae": None},
        "TurboSize": {"resolution": "480p", "aspect_ratio": "16:9", "seconds": 5.0},
        "TurboCompare": {"model_a": model, "model_b": model, **run},
        "TurboDoctor": {},
        "TurboPrompt": {"idea": "a fox", "camera": "still", "light": "night", "style": "film", "seed": 0},
        "TurboConvert": {"source": T2V, "format": "bf16"},
        "TurboMerge": {"finetune": STOCK, "base": STOCK, "turbo": T2V, "strength": 1.0, "format": "bf16"},
    }[node]
