"""TurboScheduler: the rCM schedule as SIGMAS."""

from comfy_api.latest import io

from .host.inputs import sigma_max_input, steps_input, wan_network
from .host.schedule import sigmas_of


class TurboScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboScheduler",
            display_name="Turbo Scheduler",
            category="model/sampling/schedulers",
            description="Sigmas of an rCM-distilled model, for SamplerCustom with the lcm sampler (the original's "
            "default) or euler (its ODE mode).",
            search_aliases=["rCM", "TurboWan", "sigmas"],
            inputs=[
                steps_input(),
                sigma_max_input(),
                io.Model.Input("model", optional=True, tooltip="Tells T2V from I2V where sigma_max is 0."),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, steps, sigma_max, model=None) -> io.NodeOutput:
        if model is not None:
            wan_network(model, "TurboScheduler")
        return io.NodeOutput(sigmas_of(steps, sigma_max, model))


NODES = [TurboScheduler]
