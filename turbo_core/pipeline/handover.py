"""Each block of the next expert overwrites the same block of the one at work as soon as the last step of that one has
left it.

The copies run behind the compute of the blocks that follow: on a card on a stream of their own, from two pinned
buffers of a block each; on a CPU in a thread. One model and no more is in memory, and the wait between the experts
shrinks to what compute could not hide.
"""

import queue
import re
import threading

import torch

from ..errors import TurboError

_BLOCK = re.compile(r"blocks\.(\d{1,9})\.")
_STOP = object()


def can_follow(model, state) -> bool:
    """True where a canonical state dict has the tensors of this model, and int8 where they are int8."""
    own = model.state_dict()
    return own.keys() == state.keys() and all(
        t.shape == state[name].shape and (t.dtype == torch.int8) == (state[name].dtype == torch.int8)
        for name, t in own.items()
    )


class Handover:
    """Made before the last forward of `model` as it is; from the next forward on it is the model of `state`.

    model: a WanModel for which can_follow(model, state) holds. state: canonical state dict on the CPU, best mapped
    from its file; read(tensor, again=True) then reads what lies there. When reading fails, the next forward raises
    TurboError. After that, or after `cancel`, the model is a mixture of the two: drop it.
    """

    def __init__(self, model, state, read=None):
        assert can_follow(model, state)
        self._read = read
        own = model.state_dict()
        self._groups = {}  # number of the block, None for all that is in no block -> [(own tensor, the next one)]
        for name, tensor in own.items():
            match = _BLOCK.match(name)
            self._groups.setdefault(int(match[1]) if match else None, []).append((tensor, state[name]))
        device = next(model.parameters()).device
        self._lane = CardLane(device, self._groups.values()) if device.type == "cuda" else _HostLane()
        self._error = None
        self._left = {}  # group -> (set when its copy is under way, what the lane knows of it)
        self._work = queue.SimpleQueue()
        modules = [*enumerate(model.blocks), (None, model)]
        self._hooks = [module.register_forward_pre_hook(self._before(group)) for group, module in modules]
        self._hooks += [module.register_forward_hook(self._after(group)) for group, module in modules]
        self._thread = threading.Thread(target=self._run, name="expert handover", daemon=True)
        self._thread.start()

    def cancel(self):
        """End it, waiting for the copy under way. Calling it when all is over changes nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._work.put(_STOP)
        self._thread.join()
        self._lane.finish()

    def _before(self, group):
        def hook(module, args):
            if group not in self._left:
                return
            copied, ticket = self._left[group]
            copied.wait()
            if self._error is not None:
                raise TurboError(
                    f"The low-noise expert could not be read ({self._error}): is its file still there, and whole?"
                ) from self._error
            self._lane.wait(ticket)

        return hook

    def _after(self, group):
        def hook(module, args, output):
            if group not in self._left:
                self._left[group] = threading.Event(), self._lane.ticket()
                self._work.put(group)
                if group is None:
                    module.edition += 1
            elif group is None:  # the first forward of the next expert is over
                self.cancel()

        return hook

    def _run(self):
        for group in iter(self._work.get, _STOP):
            copied, ticket = self._left[group]
            try:
                if self._error is None:
                    with torch.inference_mode():
                        self._lane.copy(self._pairs(group), ticket)
            except Exception as error:  # of any kind: the forward that waits raises it
                self._error = error
            finally:
                copied.set()

    def _pairs(self, group):
        """(own tensor, the next one in memory, until the pair after it is asked for)"""
        for own, following in self._groups[group]:
            yield own, following if self._read is None else self._read(following, again=True)


class _HostLane:
    """Copies within the memory of the machine: done when copy returns."""

    def ticket(self):
        return None

    def copy(self, pairs, ticket):
        for own, following in pairs:
            own.copy_(following)

    def wait(self, ticket):
        pass

    def finish(self):
        pass


class CardLane:
    """Copies to a card on a stream of their own. A ticket is (event: last use is over, event: copy is over)."""

    def __init__(self, device, groups):
        self.device, self.stream = device, torch.cuda.Stream(device)
        size = max(sum(_aligned(own) for own, _ in pairs) for pairs in groups)
        self.buffers = [(_pinned(size), torch.cuda.Event()) for _ in range(2)]

    def ticket(self):
        left = torch.cuda.Event()
        left.record(torch.cuda.current_stream(self.device))
        return left, torch.cuda.Event()

    def copy(self, pairs, ticket):
        left, arrived = ticket
        buffer, free = self.buffers[0]
        self.buffers.reverse()
        free.synchronize()  # what it held before is on the card
        self.stream.wait_event(left)
        start = 0
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            for own, following in pairs:
                if following.is_pinned():
                    own.copy_(following, non_blocking=True)
                    continue
                size = own.numel() * own.element_size()
                staged = buffer[start : start + size].view(own.dtype).view(own.shape)
                staged.copy_(following)
                own.copy_(staged, non_blocking=True)
                start += _aligned(own)
        free.record(self.stream)
        arrived.record(self.stream)

    def wait(self, ticket):
        torch.cuda.current_stream(self.device).wait_event(ticket[1])

    def finish(self):
        self.stream.synchronize()


def _aligned(tensor):
    return -(-tensor.numel() * tensor.element_size() // 256) * 256


def _pinned(size):
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # the system allows no more locked memory: the copies are slower and as right
        return torch.empty(size, dtype=torch.uint8)
