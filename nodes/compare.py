"""TurboCompare: two MODELs on the same states, block by block and step by step, as a picture and a table."""

import torch
from comfy_api.latest import io, ui

from ..turbo_core.diagnostics.compare import picture, table
from ..turbo_core.errors import TurboError
from .checks.red import comparing, red
from .host.inputs import check_choice, check_image, check_number, seed_input, steps_input, wan_network
from .host.run import MODES
from .host.schedule import sigmas_of
from .reports.compare_run import run_both
from .reports.facts import summary
from .reports.show import report

MIN_TOKENS, MAX_TOKENS = 16, 8192
TITLE = "Turbo Compare: B against A, both on A's states"


def _sizes(model):
    network = wan_network(model, "TurboCompare")
    return network.dim, network.num_heads, len(network.blocks), network.patch_embedding.in_channels


def _check_alike(a, b):
    if a != b:
        raise TurboError(
            "TurboCompare needs two MODELs of one family, got (dim, heads, blocks, channels) "
            f"{a} and {b}: connect two versions of the same model."
        )


class TurboCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboCompare",
            display_name="Turbo Compare",
            category="utilities",
            description="Shows what top-k and low precision cost: samples with model A, evaluates model B on the same "
            "states, and draws the error of every block at every step, the share of dense attention that B's key "
            "blocks keep, and what other top-k would keep. Takes as long as two runs; each MODEL is loaded once.",
            search_aliases=["TurboWan", "quality", "error", "recall", "topk", "heat map", "quantization error"],
            inputs=[
                io.Model.Input("model_a", tooltip="The reference, for example dense or not quantized."),
                io.Model.Input("model_b", tooltip="The one to judge: the same model, sparse or int8."),
                io.Conditioning.Input("positive", tooltip="The prompt, the same for both."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Gives the size and the number of frames; what sparsity costs depends on both.",
                ),
                seed_input("Of the noise, the same for both."),
                steps_input("Steps of the Turbo Scheduler."),
                io.Combo.Input("mode", options=list(MODES), tooltip="How A goes from step to step."),
                io.Int.Input(
                    "tokens",
                    default=512,
                    min=MIN_TOKENS,
                    max=MAX_TOKENS,
                    advanced=True,
                    tooltip="Tokens of each block's output that are compared, drawn at random. They wait in main "
                    "memory: 512 take 0.8 GB for a 14B model at 4 steps, 0.2 GB for 1.3B.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Takes the place of steps; for one expert of A14B, its part of them.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="picture",
                    tooltip="Three heat maps: the error of each block and step, what B keeps of dense attention, and "
                    "what other top-k would keep.",
                ),
                io.String.Output(display_name="table", tooltip="The same figures as text."),
                io.Latent.Output(display_name="latent_a", tooltip="What A samples, as Turbo Sampler gives it."),
                io.Latent.Output(
                    display_name="latent_b", tooltip="What B makes of A's last state; B's own run may lead elsewhere."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, model_b=None):
        return red(comparing, cls.hidden.unique_id, _check_alike)

    @classmethod
    def execute(
        cls, model_a, model_b, positive, latent_image, seed, steps, mode="SDE", tokens=512, sigmas=None
    ) -> io.NodeOutput:
        _check_alike(_sizes(model_a), _sizes(model_b))
        check_image(model_a, positive)
        sigmas = sigmas_of(steps, 0.0, model_a, sigmas)
        check_choice("mode", mode, MODES)
        check_number("tokens", tokens, MIN_TOKENS, MAX_TOKENS)
        a, b, trial = run_both(model_a, model_b, positive, latent_image, seed, sigmas, mode == "ODE", tokens)
        figures = sigmas.tolist(), *trial.figures(len(model_a.model.diffusion_model.blocks))
        head = [f"A: {summary(model_a)}", f"B: {summary(model_b)}"]
        drawn = torch.from_numpy(picture(TITLE, head, *figures)).float()[None] / 255
        text = table([TITLE, *head], *figures)
        shown = report(text, **ui.PreviewImage(drawn, cls=cls).as_dict())
        return io.NodeOutput(drawn, text, a, b, ui=shown)


NODES = [TurboCompare]
