"""The diffusion models of a pipeline in memory: one, or two experts that take turns or stay both."""

from collections import Counter

from ..checkpoint import Opened, files_of, opened, weights
from ..devices import page_locked, release
from ..errors import TurboError
from ..files import state_of
from ..lora import Library, put_on
from ..wan import WanModel
from .handover import Handover, can_follow


class Experts:
    """Reads a model when it is asked for, in the place of the other one unless both may stay.

    On an accelerator the low-noise expert comes block by block behind the last high-noise step where both files hold
    the same tensors; else, and on a CPU, it is read after the other is gone. What is larger than the free memory stays
    mapped on a CPU, and its file is looked at before each evaluation.
    Models that an accelerator asks for again wait in page-locked memory where there is room for all of them: from
    there they come as fast as the bus takes them, whatever became of the file's pages.
    """

    def __init__(self, files: list[Opened], device, dtype, sequence=None, waiting: int = 0):
        """files: of the only model, or of the high- and the low-noise expert; the caller must not keep them, for a file
        stays mapped as long as it is referred to. sequence: see WanModel.sequence. waiting: bytes of main memory for
        models that wait."""
        self.descriptions = [file.description for file in files]
        self.library = Library(files)
        self.bytes = [_bytes(file, dtype) for file in files]  # in memory, each
        self.files = dict(enumerate(files))
        self._states = [_states(file.description.path) for file in files]
        self.device, self.dtype, self.sequence = device, dtype, sequence
        self.in_place = device.type != "cpu"
        self.waits = self.in_place and sum(self.bytes) <= waiting
        self.waiting, self._reads = {}, Counter()  # state dicts by model; how often each came from its file
        self.models, self.mapped, self.handover = {}, {}, None
        self._loras, self._changed = {}, {}  # of the models: what is on them, which float parameters hold some of it

    def at(self, wanted: int, stage, keep: bool = False, leaves: bool = False, loras=((), ())) -> WanModel:
        """Model 0, the only or the high-noise one, or model 1, for one evaluation.

        stage: context manager of a name that gives a callable (bytes done, total), entered while a file is read. keep:
        the other model may stay. leaves: model 0 is wanted for the last time before model 1. loras: those of both
        models, see turbo_core.lora.
        """
        if wanted == 1 and self.handover is not None and wanted not in self.models:
            self.models = {wanted: self.models.popitem()[1]}  # the same module, other weights
            self._loras, self._changed = {wanted: None}, {}
        if not keep and self.handover is None:  # an earlier, smaller clip may have left both
            self._let_go(self.models.keys() - {wanted})
        if wanted not in self.models:
            if not keep or self.handover is not None:
                self.free()
            with stage("load DiT") as progress:
                (state, read), heads = self._state(wanted), self.descriptions[wanted].num_heads
                self.models[wanted] = WanModel.from_state_dict(state, self.dtype, self.device, heads, read, progress)
                self.models[wanted].sequence = self.sequence
        model = self.models[wanted]
        if wanted in self.mapped:
            self.mapped[wanted].check()
        if self._loras.get(wanted, ()) != loras[wanted]:
            with stage("load LoRA"):
                self._put_on(wanted, loras[wanted])
        if leaves and self.in_place and not keep and self.handover is None:
            with stage("load DiT"):
                file = None if 1 in self.waiting else self._opened(1)
                state, read = self._state(1, file)
                if can_follow(model, state):
                    self.handover = Handover(model, state, read)
                elif file is not None:
                    self.files[1] = file
        return model

    def _state(self, which, file=None):
        """(the weights of a model where they wait, None), or where they are mapped with what reads them."""
        if which in self.waiting:
            return self.waiting[which], None
        file = file or self._opened(which)
        state, read = weights(file, mapped=True), file.disk.reader(file.tensors.values(), self.device)
        if read is None:
            self.mapped[which] = file.disk
        self._reads[which] += 1
        if self.waits and self._reads[which] > 1:  # a third time is likely
            locked = page_locked(state, read)
            self.waits = locked is not None  # the system may allow less than there is
            if self.waits:
                self.waiting[which] = locked
                return locked, None
        return state, read

    def _put_on(self, which, loras):
        try:
            self._changed[which] = put_on(
                self.models[which],
                self.library.acting(loras, which),
                self._changed.get(which, frozenset()),
                lambda names: self._originals(which, names),
                all_original=self.handover is not None,  # whose copies may not have arrived
            )
        except BaseException:
            self.free()
            raise
        self._loras[which] = loras

    def _originals(self, which, names):
        file = self._opened(which)
        for name in names:
            tensors = {one: file.tensors[one] for one in (name, f"{name}_scale") if one in file.tensors}
            yield name, weights(file._replace(tensors=tensors), self.device)[name]

    def leave_room(self, size, memory: int):
        """Let go of the models unless size() more bytes fit beside them into memory."""
        if self.models and sum(self.bytes[which] for which in self.models) + size() > memory:
            self.free()

    def _let_go(self, which):
        for one in which:
            for kept in (self.models, self.mapped, self._loras, self._changed):
                kept.pop(one, None)
        if which:
            release(self.device)

    def close(self):
        """Let go of all, also of what waits."""
        self.free()
        self.waiting.clear()

    def free(self):
        """Let go of the models, and end a hand-over."""
        if self.handover is not None:
            self.handover.cancel()
        self.handover = None
        self.models.clear()
        self._loras, self._changed = {}, {}
        self.mapped.clear()
        release(self.device)

    def _opened(self, which: int) -> Opened:
        """A file as it was first opened, or opened again. Raises TurboError where it is another one by now."""
        known = self.descriptions[which]
        file = self.files.pop(which, None) or opened(known.path)
        if file.description != known or _states(known.path) != self._states[which]:
            raise TurboError(f"{known.path} has changed since this run began. Start it again.")
        return file


def _states(path) -> list:
    return [state_of(part) for part in files_of(path)]


def _bytes(file: Opened, dtype) -> int:
    return sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() and tensor.ndim > 1 else tensor.itemsize)
        for tensor in file.tensors.values()
    )
