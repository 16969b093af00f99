"""What tests in the host do with a MODEL of the small family, in a word each."""

import torch

from tests.helpers import tiny_dits

T2V, QUANT, STOCK = "TinyWan2.1-T2V.pth", "TinyWan2.1-T2V-quant.pth", tiny_dits.STOCK
HIGH, LOW = "TinyWan2.2-I2V-high.pth", "TinyWan2.2-I2V-low.pth"
LINEAR = "diffusion_model.blocks.0.ffn.0"  # a linear that the tests change
PROJ_L = "diffusion_model.blocks.0.self_attn.attn_op.local_attn.proj_l"
TEXT_DIM, TEXT_TOKENS = 64, 24
TINY_SHAPE = (1, 16, 2, 8, 10)  # 40 tokens: less than a key block, where something else is under test
SMALL = (1, 16, 5, 16, 18)  # 5 * 8 * 9 = 360 tokens: three query blocks, six key blocks, both ragged


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Lab:
    """The few things that every test here does with a MODEL."""

    shape = SMALL
    draw = staticmethod(_draw)

    def __init__(self, comfy, pack, tiny):
        self.comfy, self.pack, self.tiny = comfy, pack, tiny

    def path(self, name):
        return str(self.tiny / name)

    def load(self, name=T2V, dtype=None):
        """A fresh MODEL with its own weights from a file of the family, or any path, through TurboLoader's function."""
        return self.pack.loading.load_turbo_model(self.path(name), dtype)

    def as_kind(self, kind):
        """The text-to-video MODEL with weights in float, or int8 by block or row."""
        return self.load() if kind == "float" else self.quantize(self.load(), kind)

    def attention(self, model, topk=0.3, precision="bf16", **settings):
        return self.pack.nodes["SparseLowBitAttention"].execute(model, topk, precision, **settings)[0]

    def dense(self, model):
        return self.attention(model, 1.0, mode="dense")

    def quantize(self, model, kind="block", **settings):
        name = {"block": "block (TurboWan)", "row": "row (ComfyUI native)"}[kind]
        return self.pack.nodes["QuantizeW8A8"].execute(model, name, **settings)[0]

    def lora(self, model, *layers, seed=0, scale=0.3):
        """A LoRA file's tensors of rank 4 for some layers of a MODEL, LINEAR by default."""
        tensors = {}
        for i, layer in enumerate(layers or (LINEAR,)):
            rows, cols = self.comfy.utils.get_attr(model.model, f"{layer}.weight").shape
            tensors[f"{layer}.lora_A.weight"] = _draw(4, cols, seed=seed + 2 * i) * cols**-0.5
            tensors[f"{layer}.lora_B.weight"] = _draw(rows, 4, seed=seed + 2 * i + 1) * scale
        return tensors

    def merged(self, model, lora, strength=1.0):
        """A clone with this LoRA by the host's usual node."""
        return self.comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0)[0]

    def bypassed(self, model, lora, strength=1.0):
        """A clone with this LoRA by the host's bypass node, beside the weights."""
        return self.comfy.sd.load_bypass_lora_for_models(model, None, dict(lora), strength, 0)[0]

    def context(self, batch=1, seed=7):
        return _draw(batch, TEXT_TOKENS, TEXT_DIM, seed=seed)

    def positive(self, seed=7, **extra):
        return [[self.context(seed=seed), extra]]

    def picture(self, model, latent):
        """What an image-to-video model wants in its conditioning: the picture that the host takes in its absence."""
        if model.model.diffusion_model.patch_embedding.in_channels != 36:
            return {}
        height, width = latent["samples"].shape[-2:]
        frames = latent["samples"].shape[2] if latent["samples"].ndim == 5 else 1
        empty = torch.zeros(1, 16, frames, height, width)
        return {"concat_latent_image": model.get_model_object("latent_format").process_out(empty)}

    def latent(self, shape=SMALL, seed=None):
        """A LATENT: zeros, or noise-like where a seed is given."""
        return {"samples": torch.zeros(shape) if seed is None else _draw(*shape, seed=seed)}

    def inputs(self, shape=SMALL, sigma=0.9, seed=0, concat=0):
        """Arguments of apply_model; concat: how many channels an image-to-video model takes on top."""
        batch = shape[0]
        given = {"x": _draw(*shape, seed=seed), "t": torch.full((batch,), sigma), "c_crossattn": self.context(batch)}
        if concat:
            given["c_concat"] = _draw(batch, concat, *shape[2:], seed=seed + 1)
        return given

    def loaded(self, model, **load):
        """Put the MODEL on its device as the host does; returns the network's wrapper."""
        self.comfy.model_management.load_models_gpu([model], **load)
        return model.model

    def denoise(self, model, **given):
        """x0 of one evaluation of a MODEL, weights patched and loaded by the host."""
        given = self.inputs(**given)
        options = {**model.model_options["transformer_options"], "sigmas": given["t"]}
        return self.loaded(model).apply_model(**given, transformer_options=options)

    def sigmas(self, steps=4, sigma_max=0.0, model=None):
        return self.pack.nodes["TurboScheduler"].execute(steps, sigma_max, model)[0]

    def turbo(self, model, latent=None, seed=3, steps=4, mode="SDE", **settings):
        """Samples of TurboSampler."""
        latent = latent or self.latent()
        node = self.pack.nodes["TurboSampler"]
        settings = {"positive": self.positive(**self.picture(model, latent)), "sigma_max": 0.0, **settings}
        return node.execute(model, latent_image=latent, seed=seed, steps=steps, mode=mode, **settings)[0]["samples"]

    def custom(self, model, sampler, sigmas, latent=None, seed=3, noise=True):
        """Samples of the host's SamplerCustom with one of its samplers, cfg 1."""
        from comfy_extras.nodes_custom_sampler import SamplerCustom

        sampler = self.comfy.samplers.sampler_object(sampler)
        positive, latent = self.positive(), latent or self.latent()
        return SamplerCustom.execute(model, noise, seed, 1.0, positive, positive, sampler, sigmas, latent)[0]["samples"]

    def weights(self, model):
        """Every stored tensor of the network, copied, with the weights as they are now."""
        return {name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()}

    def same(self, ours, theirs):
        """True where two results of weights hold the same bits in the same types."""
        return ours.keys() == theirs.keys() and all(
            a.dtype == theirs[name].dtype and torch.equal(a, theirs[name]) for name, a in ours.items()
        )

    def difference(self, ours, theirs):
        """Largest absolute difference, relative to the largest value."""
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    def distance(self, ours, theirs):
        """Norm of the difference, relative to the norm: for rounding noise."""
        return ((ours - theirs).norm() / theirs.norm()).item()


def small_flux(comfy):
    """A MODEL of another family: a small Flux of random weights, which the host cannot tell from its weights alone."""
    config = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64}
    config |= {"hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1}
    config |= {"axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True}
    config = comfy.supported_models.Flux({**config, "txt_ids_dims": []})
    config.set_inference_dtype(torch.float32, None)
    model, device, random = config.get_model({}, ""), torch.device("cpu"), torch.Generator().manual_seed(0)
    state = model.diffusion_model.state_dict()
    model.diffusion_model.load_state_dict(
        {k: tiny_dits.random_weight(k, v.shape, random, 256) for k, v in state.items()}
    )
    return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=device)
