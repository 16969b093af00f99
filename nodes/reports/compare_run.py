"""Two MODELs on the same states: samples of what one run's blocks gave, and the other run held against them."""

import torch

from ...turbo_core.diagnostics.compare import TOPKS, error_of, recall_by_topk, sample_tokens, squared_norms
from ...turbo_core.errors import TurboError
from ..host.blocks import has_trained_sla
from ..host.kernels import outside_graph
from ..host.run import GuidedRun, Relay
from ..host.settings import DEFAULTS, active_settings

_HEADS, _ROWS = 8, 128  # of each self-attention, for the recall


class Reference:
    """The run of model A: a sampler function, and a patch that sees the block outputs.

    Keeps the states and denoised latents of each step, and `tokens` tokens of each block's output in main memory.
    """

    def __init__(self, tokens, ode):
        self.tokens, self.ode = tokens, ode
        self.states, self.denoised, self.outputs = [], [], {}

    def watching(self, model):
        """A clone of the MODEL that this run sees."""
        model = model.clone()
        model.set_model_double_block_patch(self._see_block)
        return model

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        def watched(x, sigma, **kwargs):
            self.states.append(x)
            self.denoised.append(model(x, sigma, **kwargs))
            return self.denoised[-1]

        return Relay(self.ode)(watched, x, sigmas, extra_args, callback, disable)

    def sampled(self, x):
        return x[:, sample_tokens(x.shape[1], self.tokens, x.device)]

    def _see_block(self, args):
        # a list, because context windows evaluate the network several times a step
        key = len(self.states) - 1, args["block_index"]
        with outside_graph():
            self.outputs.setdefault(key, []).append(self.sampled(args["img"]).cpu())
        return args


class Trial:
    """The run of model B on the states of a Reference, which it uses up.

    errors {(step, block): squared norms}, denoised [step] squared norms, recall {(step, block): [[mean, least head]]}
    with one row for B's own settings and one for each of TOPKS.
    """

    def __init__(self, reference):
        self.reference, self.step, self.defaults = reference, -1, None
        self.errors, self.denoised, self.recall = {}, [], {}

    def watching(self, model):
        """A clone of the MODEL that this run sees."""
        self.defaults = DEFAULTS if has_trained_sla(model.model.diffusion_model) else None
        model = model.clone()
        model.set_model_double_block_patch(self._see_block)
        model.set_model_attn1_patch(self._see_attention)
        return model

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        reference = self.reference
        for i, (state, theirs, sigma) in enumerate(zip(reference.states, reference.denoised, sigmas)):
            self.step = i
            denoised = model(state, sigma.to(state).expand(len(state)), **(extra_args or {}))
            self.denoised.append(squared_norms(denoised, theirs))
            if callback is not None:
                callback({"i": i, "x": state, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        # the host takes what a sampler gives for a state at the last sigma, and divides what noise has left of it
        return denoised * (1 - sigmas[-1])

    def _see_block(self, args):
        with outside_graph():
            self._compare((self.step, args["block_index"]), self.reference.sampled(args["img"]))
        return args

    def _compare(self, key, ours):
        theirs = self.reference.outputs.get(key)
        if not theirs or theirs[0].shape != ours.shape:
            raise TurboError(
                "TurboCompare: the two MODELs do not cut the video in the same way (context windows, or a batch that "
                "is split where memory is short): give both the same nodes, and one video at a time."
            )
        self.errors[key] = self.errors.get(key, 0) + squared_norms(ours, theirs.pop(0))

    def _see_attention(self, args):
        with outside_graph():
            self._recall(args["q"], args["k"], args["transformer_options"])
        return args["x"]

    def _recall(self, q, k, options):
        settings = active_settings(options, q.shape[1], q.shape[-1], self.defaults)
        heads = torch.linspace(0, q.shape[2] - 1, min(_HEADS, q.shape[2])).long().to(q.device)
        q, k = q[:, :, heads], k[:, :, heads]
        rows = sample_tokens(q.shape[1], _ROWS, q.device)
        topks = TOPKS if settings is None else (settings["topk"], *TOPKS)
        coverage = None if settings is None else settings["coverage"]
        share = recall_by_topk(q, k, topks, rows, coverage=coverage).mean(-1).flatten(1).cpu()  # [top-k, B * heads]
        share = share if settings is not None else torch.cat([torch.ones_like(share[:1]), share])
        found = self.recall.setdefault((self.step, options["block_index"]), [])
        found.append(torch.stack([share.mean(1), share.amin(1)], 1))

    def figures(self, blocks):
        """(errors, denoised, recall) as turbo_core.diagnostics.compare takes them, nan where nothing was seen."""
        steps, nan = range(len(self.denoised)), torch.full((2,), torch.nan).double()
        errors = [[error_of(self.errors.get((s, b), nan)) for b in range(blocks)] for s in steps]
        unseen = [torch.full((1 + len(TOPKS), 2), torch.nan)]
        recall = [torch.stack(self.recall.get((s, b), unseen)).mean(0) for s in steps for b in range(blocks)]
        return errors, [error_of(n) for n in self.denoised], torch.stack(recall).view(len(steps), blocks, -1, 2)


def run_both(model_a, model_b, positive, latent, seed, sigmas, ode, tokens):
    """Sample with A, then evaluate B on A's states, each under the host's own guider and loaded once.

    Returns (LATENT that A samples, LATENT that B makes of A's last state, the Trial).
    """
    run = GuidedRun(model_a, positive, latent, seed, 2 * (len(sigmas) - 1), previewed=False)
    reference = Reference(tokens, ode)
    ours = run.sample(reference.watching(model_a), reference, sigmas)
    trial = Trial(reference)
    theirs = run.sample(trial.watching(model_b), trial, sigmas)
    return run.packed(ours), run.packed(theirs), trial
