"""TurboVAE: the Wan 2.1 VAE computed in exact pieces, for the host's own nodes."""

from comfy_api.latest import io

from .host.vae import turbo_vae


class TurboVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboVAE",
            display_name="Turbo VAE",
            category="model/latent",
            description="The same Wan 2.1 VAE, computed by TurboWan: the same pixels in less time and memory, from VAE "
            "Decode, VAE Encode and their tiled forms. The VAE that is connected stays as it is.",
            search_aliases=["TurboWan", "fast vae", "vae decode", "wan vae", "out of memory"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of Wan 2.1 or Wan 2.2 A14B, from Load VAE, TinyWan's too."),
            ],
            outputs=[io.Vae.Output(tooltip="For VAE Decode, VAE Encode, their tiled forms and image-to-video nodes.")],
        )

    @classmethod
    def execute(cls, vae) -> io.NodeOutput:
        return io.NodeOutput(turbo_vae(vae))


NODES = [TurboVAE]
