"""TurboSampler: a TurboWan model, or the two experts of A14B, from noise to latent in 1 to 4 steps."""

import logging

from comfy_api.latest import io

from .checks.red import red, sampling
from .host.inputs import check_choice, check_image, check_number, seed_input, sigma_max_input, steps_input, wan_network
from .host.run import MODES, experts_of, sample_experts
from .host.schedule import sigmas_of
from .reports.advice import of_sampling
from .reports.show import report
from .reports.stages import Stages


class TurboSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboSampler",
            display_name="Turbo Sampler",
            category="model/sampling",
            description="Samples a TurboWan model in 1 to 4 steps. With two experts (Wan 2.2 A14B) it changes from the "
            "high-noise to the low-noise model at the boundary sigma, one noise stream running through.",
            search_aliases=["rCM", "TurboWan", "TurboDiffusion", "KSampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model, or the high-noise expert of A14B."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt. There is no negative one: guidance is distilled in."
                ),
                io.Latent.Input("latent_image", tooltip="An empty video latent, or what WanImageToVideo gives."),
                seed_input("Of all noise, that of the later steps too. The same seed gives the same video."),
                steps_input(),
                sigma_max_input(),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    tooltip="SDE: fresh noise at each step, the original's default. ODE: sharper, less robust.",
                ),
                io.Float.Input(
                    "boundary",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="The low-noise expert takes over at the first step whose sigma is below this.",
                ),
                io.Model.Input("model_low", optional=True, tooltip="The low-noise expert of A14B."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Takes the place of steps and sigma_max."),
            ],
            outputs=[io.Latent.Output()],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,  # its report, when the host takes the node from its cache
        )

    @classmethod
    def validate_inputs(cls, model=None):
        return red(sampling, cls.hidden.unique_id)

    @classmethod
    def execute(
        cls, model, positive, latent_image, seed, steps, sigma_max, mode="SDE", boundary=0.9, model_low=None,
        sigmas=None,
    ) -> io.NodeOutput:  # fmt: skip
        for expert in (model, model if model_low is None else model_low):
            wan_network(expert, "TurboSampler")
        check_choice("mode", mode, MODES)
        check_number("boundary", boundary, 0, 1)
        sigmas = sigmas_of(steps, sigma_max, model, sigmas)
        experts = experts_of(model, model_low, sigmas, boundary)
        check_image(model, positive)
        said = of_sampling(model, model_low, boundary, sigmas)
        stages = Stages(model.load_device)
        latent = sample_experts(experts, positive, latent_image, seed, mode == "ODE", stages)
        line = stages.line()
        logging.info("TurboSampler: %s", line)
        return io.NodeOutput(latent, ui=report(*said, line))


NODES = [TurboSampler]
