"""TurboDiffusion's inference scripts, run for their sampling loops alone, against turbo_core.pipeline.sample."""

import runpy
import sys
from types import SimpleNamespace

import torch

from tests.parity import official
from turbo_core.pipeline import sample
from turbo_core.schedule import rcm_sigmas

LATENT = (16, 2, 4, 6)  # channels, frames, height, width
SCRIPTS = {"t2v": "wan2.1_t2v_infer.py", "i2v": "wan2.2_i2v_infer.py"}
PATHS = {
    "t2v": ["--dit_path", "high"],
    "i2v": ["--high_noise_model_path", "high", "--low_noise_model_path", "low", "--image_path", "none"],
}


class _Network:
    """What a script moves between devices and calls: velocity(path, x, timesteps)."""

    def __init__(self, path, velocity):
        self.path, self.velocity = path, velocity

    def cpu(self):
        return self

    cuda = cpu

    def __call__(self, x_B_C_T_H_W, timesteps_B_T, **_):
        return self.velocity(self.path, x_B_C_T_H_W, timesteps_B_T)


class _Vae:
    latent_ch, spatial_compression_factor = LATENT[0], 8

    def __init__(self, vae_pth):
        self.path = vae_pth

    def get_latent_num_frames(self, _):
        return LATENT[1]

    def encode(self, _):
        return torch.zeros(1, *LATENT)


def run_script(task, velocity, arguments):
    """Run their script with stand-ins for all but the loop; the latent that it would decode.

    velocity: callable (path, x, timesteps) -> tensor, path being the checkpoint that the script chose.
    """
    height, width = (8 * n for n in LATENT[2:])
    decoded = []

    class Vae(_Vae):
        def decode(self, latent):
            decoded.append(latent)
            return torch.zeros(1, 3, 1, 1, 1)

    steps = ("Compose", "ToImage", "Resize", "ToDtype", "Normalize")
    transforms = dict.fromkeys(steps, lambda *_, **__: lambda _: torch.zeros(3, height, width))
    replaced = {
        "imaginaire.utils.io": {"save_image_or_video": official.silent},
        "rcm.datasets.utils": {"VIDEO_RES_SIZE_INFO": {"test": {"test": (width, height)}}},
        "rcm.utils.umt5": {
            "clear_umt5_memory": official.silent,
            "get_umt5_embedding": lambda **_: torch.zeros(1, 1, 1),
        },
        "rcm.tokenizers": {"__path__": []},
        "rcm.tokenizers.wan2pt1": {"Wan2pt1VAEInterface": Vae},
        "modify_model": {
            "tensor_kwargs": {"device": "cpu", "dtype": torch.bfloat16},
            "create_model": lambda dit_path, args: _Network(dit_path, velocity),
        },
        "tqdm": {"tqdm": lambda items, **_: items},
        "PIL": {"Image": SimpleNamespace(open=lambda _: SimpleNamespace(convert=lambda _: None))},
        "torchvision": {"__path__": []},
        "torchvision.transforms": {"__path__": []},
        "torchvision.transforms.v2": transforms,
    }
    for name, members in replaced.items():
        official.stand_in_module(name, **members)
    fixed = ["--prompt", "test", "--resolution", "test", "--aspect_ratio", "test", "--seed", "7"]
    sys.argv = [SCRIPTS[task], *fixed, *PATHS[task], *arguments]
    runpy.run_path(str(official.folder() / "turbodiffusion" / "inference" / SCRIPTS[task]), run_name="__main__")
    return decoded[0]


def _velocity(expert, x, timestep):
    """Any function of all it is given, in bf16 like the network."""
    wave = torch.sin(3 * x.float() + timestep.float().view(-1, 1, 1, 1, 1) / 300)
    return (wave + (expert == "low")).to(torch.bfloat16)


def figures(error):
    """The final latent of every number of steps; asserts the experts and the timesteps that the network saw."""
    result = {}
    runs = [("t2v", steps, False) for steps in (1, 2, 3, 4)]
    runs += [("i2v", steps, ode) for steps in (1, 2, 3, 4) for ode in (False, True)]
    for task, steps, ode in runs:
        theirs_saw, ours_saw = [], []

        def network(path, x, timestep, saw=theirs_saw):
            saw.append((path, timestep.flatten().tolist()))
            return _velocity(path, x, timestep)

        def model_at(sigma, task=task, saw=ours_saw):
            path = "high" if task == "t2v" or sigma >= 0.9 else "low"

            def model(x, timestep, context, **_):
                saw.append((path, timestep.tolist()))
                return _velocity(path, x.to(torch.bfloat16), timestep)

            return model

        arguments = ["--num_steps", str(steps), "--num_samples", "2", *(["--ode"] if ode else [])]
        expected = run_script(task, network, arguments)
        sigmas = rcm_sigmas(steps, 200.0 if task == "i2v" else 80.0)
        ours = sample(model_at, None, (2, *LATENT), sigmas, seed=7, ode=ode)
        assert ours_saw == theirs_saw, f"the network saw {ours_saw}, theirs {theirs_saw}"
        result[f"sampler {task} {steps} steps {'ODE' if ode else 'SDE'}"] = error(ours, expected)
    return result
