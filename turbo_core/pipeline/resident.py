"""Models that stay: one video or thousands from the same files, each file read once where memory allows.

While a video is decoded and written, the next one is sampled. What stays in memory is decided for each video by what
it takes, see Stay; on a CPU a video is the same bit for bit whatever stays and whatever came before it.
"""

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress

import torch

from .. import devices
from ..checkpoint import files_of
from ..errors import TurboError
from ..parallel import Alone, kernel_facts, program_facts
from ..selfcheck import prove
from ..vae import LATENT_CHANNELS, Coders
from .clip import Clip, Ready, Result, Work, check_clip, check_prompt, raised, raised_if_told, settings_of
from .embeddings import Embeddings, padded
from .experts import Experts
from .inputs import open_models
from .residence import Stay, check_room, free_memory, waiting_memory, what_stays
from .sampling import Trajectory, decode_frames, encode_image
from .video import prepare_image

WINDOW = 256  # clips whose prompts are encoded before the first is sampled; 1 GB of embeddings at the very most


class Pipeline:
    """A set of files as something that makes videos: a context manager, or call close().

    dit, dit_low, vae, text_encoder, tokenizer: paths; dit_low is the low-noise expert. vae_fast: path of a decoder for
    drafts, in the VAE's place where videos are decoded; the VAE is read for pictures only then. device: default CUDA,
    then MPS, then CPU. dtype: default bfloat16, on a CPU float32. memory: bytes on the device that the networks and
    their work may take; default what is free when the pipeline is made; 0 keeps nothing that is not at work. cache:
    folder in which embeddings of prompts are kept, default none. progress: callable (stage, done, total), called from a
    second thread too. team: turbo_core.parallel.Team of the processes that make each video together; all of them do the
    same with their pipelines on its device, only the first one has the frames and writes, and the first failure ends it
    all. sharing: how many processes share the device, and the machine, whose free memory they divide. Diffusion models
    are validated here, and nothing is read but their headers. For one thread at a time. Raises TurboError.
    """

    def __init__(
        self,
        dit,
        vae,
        text_encoder,
        *,
        dit_low=None,
        tokenizer=None,
        vae_fast=None,
        device=None,
        dtype=None,
        memory: int | None = None,
        cache=None,
        progress: Callable | None = None,
        team=None,
        sharing: tuple[int, int] = (1, 1),
    ):
        self.team = team or Alone()
        self.device = devices.pick_device(device)
        self.dtype = dtype or devices.default_dtype(self.device)
        waiting = 0 if memory == 0 else waiting_memory(self.device) // max(sharing[1], self.team.size)
        self.experts = Experts(open_models(dit, dit_low), self.device, self.dtype, self.team.sequence, waiting)
        models = [path for path in (dit, dit_low, vae, vae_fast) if path is not None]
        self.team.agree(lambda: program_facts(self.device, [file for path in models for file in files_of(path)]))
        self.model, self.has_low = self.experts.descriptions[0], dit_low is not None
        self.memory = free_memory(self.device) // sharing[0] if memory is None else memory
        self.progress = progress or (lambda stage, done, total: None)
        self.paths = {"dit": dit, "vae": vae, "text encoder": text_encoder}
        self.embeddings = Embeddings(text_encoder, tokenizer, self.device, self.dtype, cache)
        self.coders = Coders(vae, vae_fast, encodes=self.model.in_dim > LATENT_CHANNELS)
        self._vae_alone = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Let go of all models."""
        self.experts.close()
        self.embeddings.free()
        self.coders.free()
        devices.release(self.device)

    def check(self, clip: Clip) -> Ready:
        """Hold a clip to the models before anything computes. Raises TurboError, which names the cure."""
        ready = check_clip(clip, self.model, self.has_low)
        self.team.check(self.model.num_heads, ready.tokens)
        check_room(self.model, ready, self.dtype, self.device, self.team.size)
        self._expert_bytes(clip)  # a LoRA file that does not fit is found by its header
        return ready

    def __call__(self, prompt: str, **settings) -> Result:
        """Make one video; settings: the fields of Clip."""
        [result] = self.map([Clip(prompt, **settings)])
        return result

    def map(
        self,
        clips: Iterable[Clip],
        write: Callable[[Clip, Result], None] | None = None,
        failed: Callable[[Clip, Exception], None] | None = None,
        begun: Callable[[Clip], None] | None = None,
    ) -> Iterator[Result]:
        """Make videos, in their order.

        write: takes each video as soon as it is decoded, in the thread that decodes. failed: takes a clip that could
        not be made, with the reason, of whatever kind, and the rest goes on; without it the first failure ends it all.
        What `failed` raises ends it all too. begun: takes each clip when its sampling begins.
        """
        assert failed is None or self.team.size == 1, "the other processes of a team would wait for this one's clip"
        clips, self._tell_begun = iter(clips), begun or (lambda clip: None)
        with ThreadPoolExecutor(1, "decode") as worker:
            while window := list(itertools.islice(clips, WINDOW)):
                yield from self._window(window, worker, write, failed or raised)

    def _window(self, clips, worker, write, failed):
        works = [Work(clip, self.progress) for clip in clips]
        if len(works) == 1:  # of more, each is checked when it is its turn: pictures take memory
            works = self._checked(works, failed)
        works = self._encoded(works, failed)
        pending = None
        for stay, group in self._groups(works, failed):
            done = []
            if pending is not None and not stay.overlap:  # nor may it be decoded beside these
                yield from pending.result()
                pending = None
            for work in self._sampled(group, stay, failed):
                if stay.overlap:
                    if pending is not None:
                        yield from pending.result()
                    pending = worker.submit(self._finished, work, write, failed, True)
                elif stay.dit:
                    yield from self._finished(work, write, failed)
                else:
                    done.append(work)
            if not stay.dit:
                self.experts.free()
            for work in done:
                yield from self._finished(work, write, failed)
            if not stay.dit:
                self.coders.decoder.to("cpu")
        if pending is not None:
            yield from pending.result()

    def _checked(self, works, failed):
        for work in works:
            with self._failing(work, failed, sampling=False):
                work.ready = self.check(work.clip)
        return [work for work in works if not work.failed]

    @torch.inference_mode()
    def _encoded(self, works, failed):
        for work in works:
            with self._failing(work, failed, sampling=False):
                check_prompt(work.clip.prompt)
        kept = [work for work in works if not work.failed]
        if not kept:
            return []
        first = kept[0]
        devices.reset_peak_memory(self.device)
        self.coders.load_once(first.stage, "cpu", self.dtype)
        of = functools.cache(lambda prompt: self.embeddings.of([prompt], first.stage, self._leave_room)[prompt])
        for work in kept:
            with self._failing(work, raised_if_told(failed), sampling=False):  # a bad encoder is no clip's fault
                work.embedding = self.team.from_first(lambda prompt=work.clip.prompt: of(prompt))
        kept = [work for work in kept if not work.failed]
        if not kept:
            return []
        width = kept[0].embedding.shape[-1]
        if width != self.model.text_dim:
            raise TurboError(
                f"text encoder {self.paths['text encoder']} gives {width} numbers a token, {self.paths['dit']} expects "
                f"{self.model.text_dim}: use umT5-xxl with the published models."
            )
        if self.embeddings.bytes() + sum(self.experts.bytes) + self.coders.bytes() > self.memory / 2:
            self.embeddings.free()
        prove(self.device)  # before weights fill its memory
        self.team.agree(lambda: kernel_facts(self.device))
        return kept

    def _groups(self, works, failed):
        """(what stays, clips that are sampled one after the other): of one clip, or of several that share the reading
        of a network."""
        group, shared = [], None
        for work in works:
            if work.ready is None and not self._checked([work], failed):
                continue
            stay = Stay(*self.team.told(lambda ready=work.ready: self.stay(ready)))  # the order of clips hangs on it
            if group and stay != shared:
                yield shared, group
                group = []
            group.append(work)
            shared = stay
            if len(group) == stay.together(self.has_low):
                yield shared, group
                group = []
        if group:
            yield shared, group

    def stay(self, ready: Ready) -> Stay:
        """What may be in memory together while this clip is made."""
        rest = self.memory - self.coders.bytes() - self.embeddings.bytes()
        found = what_stays(self.model, ready, self._expert_bytes(ready.clip), rest, self.dtype)
        # processes that decode together do one thing at a time, in the same order
        return found if self.team.size == 1 else found._replace(overlap=False)

    def _expert_bytes(self, clip):
        library, count = self.experts.library, enumerate(self.experts.bytes)
        return [size + library.bytes(clip.loras[which], which, self.dtype.itemsize) for which, size in count]

    def _leave_room(self, size):
        self.experts.leave_room(size, self.memory - self.coders.bytes())

    @torch.inference_mode()
    def _sampled(self, group, stay, failed):
        """The clips of a group with their latents, those that fail left out; the experts one after the other."""
        for work in group:
            with self._failing(work, failed):
                work.trajectory = self._begun(work, stay)
        group = [work for work in group if work.trajectory is not None]
        if stay.together(self.has_low) > 1 and self.has_low:
            for work in group:
                with self._failing(work, failed):
                    self._advanced(work, stay, work.ready.high_steps, leaves=work is group[-1])
                    work.trajectory.text.let_go()  # the low-noise expert makes its own: room for one was counted
        for work in group:
            if work.failed:
                continue
            with self._failing(work, failed):
                self._advanced(work, stay, work.ready.clip.steps, leaves=len(group) == 1)
                work.seconds["sampling"] -= sum(work.seconds.get(name, 0.0) for name in ("load DiT", "load LoRA"))
                work.latents, work.trajectory = work.trajectory.latents().cpu(), None
                if not torch.isfinite(work.latents).all():
                    raise TurboError(
                        f"Sampling gave NaN or infinity in {self.dtype}. Use --dtype bfloat16 or float32, or another "
                        "file."
                    )
            if not work.failed:
                yield work

    def _begun(self, work, stay):
        ready, y = work.ready, None
        self.team.agree(lambda: self._settings(ready) | {"device": self.device.type})
        self._tell_begun(ready.clip)
        if ready.picture is not None:
            with work.stage("encode image"), self._vae_alone:
                y = self.team.from_first(lambda: self._encoded_image(ready, stay))
        clip, context = ready.clip, padded(work.embedding).to(self.device)
        work.ready, work.embedding = ready._replace(picture=None), None
        return Trajectory(
            context, ready.shape, ready.sigmas, y=y, seed=clip.seed, topk=ready.topk,
            precision=clip.precision, ode=clip.ode, device=self.device, noise_device=clip.noise_device,
        )  # fmt: skip

    def _encoded_image(self, ready, stay):
        if not stay.dit:  # an earlier, smaller clip may have left them
            self.experts.free()
        image = prepare_image(ready.picture, *ready.size)
        y = encode_image(self.coders.encoder.to(self.device), image, ready.clip.frames).to(self.dtype)
        if not stay.dit:
            self.coders.encoder.to("cpu")
            devices.release(self.device)
        return y

    def _advanced(self, work, stay, until, leaves):
        """Take a clip's steps up to `until`. leaves: no other clip wants the high-noise expert before the low one."""
        ready = work.ready
        steps, high = ready.clip.steps, ready.high_steps
        last_high = ready.sigmas[high - 1].item() if 0 < high < steps else None

        def model_at(sigma):
            low = self.has_low and sigma < ready.clip.boundary
            leaving = leaves and sigma == last_high
            model = self.experts.at(int(low), work.stage, stay.experts, leaving, ready.clip.loras)
            if not work.step_seconds:  # now, below what was read for it
                self.progress("sampling", 0, steps)
            return model

        with work.stage("sampling", steps, begins=False, ends=until == steps):
            work.trajectory.advance(
                model_at, until, work.step_seconds, lambda done: self.progress("sampling", done, steps)
            )

    @torch.inference_mode()
    def _finished(self, work, write, failed, beside=False) -> list[Result]:
        """The finished clip, in a list that is empty where it failed; runs beside sampling where both fit."""
        result = None
        with self._failing(work, failed, sampling=False):
            clip, ready = work.clip, work.ready
            steps = work.latents.shape[2]
            lane = devices.own_stream(self.device) if beside else nullcontext()  # which gets nothing that others freed
            with work.stage("decode", steps, ends=False), self._vae_alone, lane:
                frames = decode_frames(
                    self.coders.decoder.to(self.device), work.latents.to(self.device), clip.tiled,
                    lambda done, total: self.progress("decode", done, total), self.team, beside,
                )  # fmt: skip
            made = Result(frames, work.latents, self._settings(ready), work.seconds, work.step_seconds)
            made.peak_memory = devices.peak_memory(self.device)
            if write is not None and self.team.first:
                with work.stage("write"):
                    write(clip, made)
            result = made
            work.let_go()
        return [] if result is None else [result]

    def _settings(self, ready: Ready) -> dict:
        clip, told = ready.clip, self.experts.library.told
        return settings_of(ready, self.model, self.has_low) | {
            "lora": told(clip.lora), "lora_low": told(clip.lora_low), "decoder": self.coders.told(),
            "device": str(self.device), "dtype": str(self.dtype).removeprefix("torch."),
            "noise_device": str(clip.noise_device), "processes": self.team.size if self.team.size > 1 else None,
        }  # fmt: skip

    @contextmanager
    def _failing(self, work, failed, sampling=True):
        """A fault of this clip goes to `failed`; when sampling, a hand-over under way leaves no usable model, nor may a
        fault of ours, and where memory ran out none stays."""
        try:
            with self._memory_told():
                yield
        except BaseException as error:  # an interrupt too: the pipeline may be used again
            if sampling and (not isinstance(error, TurboError) or self.memory == 0 or self.experts.handover):
                with suppress(RuntimeError):  # of a card that does nothing any more, which the next clip tells
                    self.experts.free()
            if not isinstance(error, Exception):
                raise
            work.failed = True
            work.let_go()
            failed(work.clip, error)

    @contextmanager
    def _memory_told(self):
        """Memory that ran out as the error that a person can mend; from then on nothing stays that is not at work."""
        try:
            with devices.memory_told():
                yield
        except TurboError as error:
            if isinstance(error, devices.OutOfMemory) and self.memory > 0:
                logging.warning("TurboWan: memory ran out; from now on no model stays that is not at work.")
                self.memory = 0
            raise
