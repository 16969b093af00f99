"""TurboDoctor: what runs here, which path each part takes and why, as text."""

from comfy.model_management import get_torch_device
from comfy_api.latest import io

from ..turbo_core.selfcheck import prove
from .reports.doctor import examined
from .reports.show import report


class TurboDoctor(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboDoctor",
            display_name="Turbo Doctor",
            category="utilities",
            description="What this machine runs and why: card, memory, libraries, attention, int8. With a MODEL also "
            "its family, the formats of its layers and how it attends. Put this text into a bug report.",
            search_aliases=["TurboWan", "diagnose", "system info", "model info", "why slow"],
            inputs=[io.Model.Input("model", optional=True, tooltip="A MODEL to look at as well; it is not loaded.")],
            outputs=[io.String.Output(display_name="report", tooltip="The text that the node shows.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return float("nan")  # memory and settings change: look again at every run

    @classmethod
    def execute(cls, model=None) -> io.NodeOutput:
        prove(get_torch_device() if model is None else model.load_device)
        text = examined(model)
        return io.NodeOutput(text, ui=report(text))


NODES = [TurboDoctor]
