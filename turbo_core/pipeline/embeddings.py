"""Prompts to embeddings: the encoder in memory only while it is needed, its results kept on disk."""

import hashlib
import json
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from ..devices import release
from ..errors import TurboError, shown
from ..files import digest, state_of, sweep, written_aside
from .text import TEXT_LENGTH, TOKENIZERS, clean_prompt, encode_text, load_text_encoder, tokenizer_place

MOST = 1 << 30  # bytes of a cache: more than a thousand prompts of umT5-xxl
_VERSION = "1"  # of what is kept
_ROOM = 16  # the part of a cache that is written between two looks at all of it


class Embeddings:
    """Embeddings of prompts by one text encoder, one prompt at a time: beside others the last bits would differ."""

    def __init__(self, path, tokenizer, device, dtype, folder=None):
        """folder: where results are kept, None for nowhere."""
        self.path, self.tokenizer, self.device, self.dtype = path, tokenizer, device, dtype
        self.store = None if folder is None else Store(folder)
        self.encoder = self._whose = self._states = None

    def of(self, prompts, stage, room=None) -> dict[str, torch.Tensor]:
        """{prompt: [tokens, text_dim] on the CPU}, the padding left out.

        stage: context manager of a name. room: callable (size), before the encoder is read, which takes size() bytes.
        """
        whose, found = self._key() if self.store else None, {}
        for prompt in dict.fromkeys(prompts):
            kept = self.store.read(whose, clean_prompt(prompt)) if self.store else None
            if kept is None:
                if self.encoder is None and room is not None:
                    room(self._size)
                with stage("text encoder") as progress:
                    found[prompt] = self._encode(prompt, progress)
                if self.store:
                    self.store.write(whose, clean_prompt(prompt), found[prompt])
            else:
                found[prompt] = kept
        return found

    def _encode(self, prompt, progress):
        if self.encoder is None:
            self.encoder = load_text_encoder(self.path, self.tokenizer, self.device, self.dtype, progress)
            if self._states is not None and self._states != self._states_now():
                self.encoder = None  # what it makes would be kept as another file's, for good
                raise TurboError(f"{self.path} or its tokenizer has changed since this run began. Start it again.")
        padded = encode_text(*self.encoder, [prompt])[0].cpu()
        if not padded.isfinite().all():
            raise TurboError(
                f'The text encoder gave NaN or infinity for "{shown(prompt)}". {self.path} may be damaged, or its '
                "numbers leave the range of float16: check it with turbo-core inspect, and compute in bfloat16."
            )
        own = int((padded != 0).any(1).sum())
        return padded[:own].clone()

    def _size(self):
        model, _ = load_text_encoder(self.path, self.tokenizer, "meta", self.dtype)
        return sum(p.nbytes for p in model.parameters())

    def _key(self):
        """Tells apart all that a prompt's embedding depends on."""
        if self._whose is None:
            files, self._states = self._files(), self._states_now()
            device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
            parts = [_VERSION, *map(self.store.digest, files), self.dtype, device, torch.__version__]
            self._whose = "\0".join(map(str, parts))
        return self._whose

    def _files(self):
        return [Path(self.path), *tokenizer_files(self.tokenizer, self.path)]

    def _states_now(self):
        return [state_of(file) for file in self._files() if os.path.isfile(file)]

    def bytes(self) -> int:
        """What the encoder takes in memory now."""
        return 0 if self.encoder is None else sum(p.nbytes for p in self.encoder[0].parameters())

    def free(self):
        """Let go of the encoder."""
        if self.encoder is not None:
            self.encoder = None
            release(self.device)


def padded(embedding: torch.Tensor) -> torch.Tensor:
    """[tokens, text_dim] -> [1, 512, text_dim], zeros after the prompt's own tokens, as the DiT was trained."""
    return F.pad(embedding, (0, 0, 0, TEXT_LENGTH - len(embedding)))[None]


class Store:
    """A folder of embeddings, bounded; what is damaged counts as missing, and two processes may share it."""

    def __init__(self, folder, most: int = MOST):
        self.folder, self.most = Path(folder), most
        self._left = 0  # bytes that may be written before the folder is looked through again
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TurboError(f"cache: could not make {folder} ({error}). Choose another folder.") from error

    def read(self, whose: str, prompt: str) -> torch.Tensor | None:
        """What was kept for a clean prompt, or None."""
        place = self._place(whose, prompt)
        try:
            raw = place.read_bytes()
            checksum, body = raw[:32], raw[32:]
            if hashlib.sha256(body).digest() != checksum:
                return None
            with suppress(OSError):  # another person's folder may be read, and no more
                os.utime(place)  # used last
            kept = load(body)["embedding"]
            return kept if kept.isfinite().all() else None
        except (OSError, ValueError, KeyError, safetensors.SafetensorError):
            return None

    def write(self, whose: str, prompt: str, embedding: torch.Tensor) -> None:
        """Keep it; a full disk or another process at the same file is no fault of the video."""
        body = save({"embedding": embedding.contiguous()})
        self._put(self._place(whose, prompt), hashlib.sha256(body).digest() + body)
        self._left -= len(body)
        if self._left < 0:
            self._forget()

    def digest(self, path: Path) -> str:
        """SHA-256 of a file, remembered for as long as its size and time stay: 11 GB take ten seconds and more."""
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
        place = self.folder / f"{name}.digest"
        try:
            state = list(state_of(path))
        except OSError as error:
            raise TurboError(f"{path} does not exist. Check the path.") from error
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(place.read_text(encoding="utf-8"))
            if known["state"] == state:
                return known["digest"]
        found = digest([path])
        self._put(place, json.dumps({"state": state, "digest": found}).encode())
        return found

    def _place(self, whose, prompt):
        return self.folder / f"{hashlib.sha256(f'{whose}{chr(0)}{prompt}'.encode()).hexdigest()[:32]}.embedding"

    def _put(self, place, contents):
        with suppress(OSError, TurboError), written_aside(place, sweeps=False) as aside:
            aside.write_bytes(contents)

    def _forget(self):
        """Remove what was used longest ago where there is more than the bound, with some room for what comes."""
        sweep(self.folder)
        kept = []
        for place in self.folder.glob("*.embedding"):
            with suppress(OSError):  # another process may remove it
                found = place.stat()
                kept.append((found.st_mtime_ns, found.st_size, place))
        total, room = sum(size for _, size, _ in kept), self.most // _ROOM
        for _, size, place in sorted(kept) if total > self.most else ():
            if total <= self.most - room:
                break
            with suppress(OSError):
                place.unlink()
            total -= size
        self._left = min(room, self.most - total)  # other processes write too


def tokenizer_files(tokenizer, encoder) -> list[Path]:
    """What may be read of a tokenizer: a path, its folder, or None for that within the encoder file or beside it."""
    place = tokenizer_place(tokenizer, encoder)
    if tokenizer is None or os.path.isdir(place):
        return [file for name in TOKENIZERS if os.path.isfile(file := place / name)]
    return [place]


def cache_folder() -> Path | None:
    """Where a person's programs keep what they can make again, for embeddings of ours; made. None where it cannot be,
    which the log tells: nobody asked for it by name."""
    try:
        if os.name == "nt":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "turbowan" / "embeddings"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # in a container the home may be read-only, or none
        logging.warning("TurboWan: no embeddings are kept (%s). --cache names a folder for them.", shown(error, 120))
        return None
    return folder
