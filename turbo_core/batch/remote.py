"""Videos to any address that fsspec knows: s3://bucket/videos, gs://..., sftp://host/videos, memory://.

A video is made in a scratch folder of this machine and sent as a whole: object stores show it when all of it is there,
elsewhere it is sent aside and renamed. Its settings go before it, which claims the name, and again behind it, so that a
video whose settings name a job and its bytes is whole. Nothing can be appended there, so each batch has a journal of
its own, batch-*.jsonl, sent anew every half minute; and the lock is a file that its owner renews, a courtesy among
batches and no more.
"""

import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

from ..errors import TurboError, shown
from .folder import Folder

_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "hf", "memory"}  # show a file when it is whole
_EVERY, _STALE = 30, 150  # seconds between two signs of life, and after which an owner counts as gone
_LOCK = "batch-lock.json"


class Remote:
    """A folder elsewhere, with the interface of Folder."""

    signs_later = False  # videos that were sent are not fetched again

    def __init__(self, url: str):
        """Raises TurboError for an address of an unknown kind, or one whose library is not installed."""
        self.url = url.rstrip("/")
        self.fs, self.root = _opened(url)
        self.root = self.root.rstrip("/")
        kinds = self.fs.protocol if isinstance(self.fs.protocol, (tuple, list)) else (self.fs.protocol,)
        self._shows_whole = bool(_WHOLE & set(kinds))
        self.of_one_process = "memory" in kinds
        self._scratch = tempfile.TemporaryDirectory(prefix="turbowan-")
        self._near = Folder(self._scratch.name)
        self._sizes = None  # by name, as listed when the batch began

    def __str__(self):
        return self.url

    def shared(self) -> str:
        return self.url

    def size(self, name: str) -> int | None:
        if self._sizes is not None:
            return self._sizes.get(name)
        with self._told("read"):
            place = self._at(name)
            return self.fs.size(place) if self.fs.exists(place) else None

    def holds(self, name: str, id: str) -> bool:
        """True where settings lie beside the video, which follow it, and name this job and the video's bytes."""
        with self._told("read"):
            try:
                size = self.fs.size(self._at(name))  # now: another process may have sent it since they were listed
                beside = json.loads(self.fs.cat_file(self._at(_beside(name))))
                whole = beside["settings"]["id"] == id and beside["bytes"] == size
            except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
                return False
        if whole and self._sizes is not None:
            self._sizes[name] = size
        return whole

    def is_foreign(self, name: str) -> bool:
        """True where something lies there and no settings of a job beside it, which claim the name before the video is
        sent. What somebody puts in its place later is not told apart."""
        if self.size(_beside(name)) is None:
            return self.size(name) is not None
        with self._told("read"):
            try:
                return "id" not in json.loads(self.fs.cat_file(self._at(_beside(name))))["settings"]
            except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
                return True

    def write(self, name: str, frames, beside: dict, metadata: bool = True, signer=None) -> int:
        place = self._near.path / _beside(name)
        try:
            size = self._near.write(name, frames, beside, metadata, signer)
            told = place.read_text(encoding="utf-8")
            place.write_text(json.dumps({"settings": beside["settings"]}), encoding="utf-8")  # a claim: without bytes
            self._send(_beside(name))
            self._send(name)
            place.write_text(told, encoding="utf-8")
            self._send(_beside(name))
        finally:
            for file in (name, _beside(name)):
                (self._near.path / file).unlink(missing_ok=True)
        if self._sizes is not None:
            self._sizes[name] = size
        return size

    def free(self) -> int:
        return self._near.free()

    def check(self) -> None:
        with self._told("reach"):
            self.fs.exists(self.root)
        self._check_lock()

    check_shared = check

    @contextmanager
    def journal(self):
        self._check_lock()
        lines = self._read()
        own, added = f"batch-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}.jsonl", []
        turn, over = threading.Lock(), threading.Event()

        def add(line):
            with turn:
                added.append(line + "\n")

        def send():
            owner = {"owner": f"process {os.getpid()} on {socket.gethostname()}", "at": time.time()}
            with turn, self._told("write"):
                self.fs.pipe_file(self._at(_LOCK), json.dumps(owner).encode())
                if added:
                    self.fs.pipe_file(self._at(own), "".join(added).encode())

        def send_often():
            while not over.wait(_EVERY):
                try:
                    send()
                except TurboError as error:  # the last one at the end is an error
                    logging.warning("TurboWan: %s", error)

        with self._told("write"):
            self.fs.makedirs(self.root, exist_ok=True)
        send()  # that nothing can be written is told before any model is read
        thread = threading.Thread(target=send_often, name="journal", daemon=True)
        thread.start()
        try:
            yield lines, add
        finally:
            over.set()
            thread.join()
            send()
            with self._told("write"):
                self.fs.rm_file(self._at(_LOCK))

    def _read(self):
        """Lines of all earlier journals; the sizes of what is there are known from now on."""
        with self._told("read"):
            found = self.fs.ls(self.root, detail=True) if self.fs.exists(self.root) else []
            names = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in found if entry["type"] == "file"}
            journals = sorted(name for name in names if name.startswith("batch-") and name.endswith(".jsonl"))
            texts = [self.fs.cat_file(self._at(name)).decode(errors="replace") for name in journals]
        self._sizes = names
        return [line for text in texts for line in text.splitlines()]

    def _check_lock(self):
        with self._told("read"):
            try:
                owner = json.loads(self.fs.cat_file(self._at(_LOCK)))
                since = time.time() - owner["at"]
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                return
        if since < _STALE:
            raise TurboError(
                f"{self.url} is being written by {shown(owner.get('owner'))}. Wait until it is done, or {_STALE} s "
                "after it was killed, or choose another folder."
            )

    def _send(self, name):
        near, place = str(self._near.path / name), self._at(name)
        with self._told("write"):
            if self._shows_whole:
                self.fs.put_file(near, place)
                return
            aside = f"{place}.part"
            self.fs.put_file(near, aside)
            if self.fs.exists(place):  # not all of them rename onto a file
                self.fs.rm_file(place)
            self.fs.mv(aside, place)

    def _at(self, name):
        return f"{self.root}/{name}"

    @contextmanager
    def _told(self, deed):
        """What goes wrong over there, in any library's own kind of error, as one for a person."""
        try:
            yield
        except TurboError:
            raise
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise TurboError(
                f"Could not {deed} {self.url} ({type(error).__name__}: {shown(first, 200)}). Check the address, the "
                "rights and the connection, and start again: what is done stays."
            ) from error


def folder_of(place) -> Folder | Remote:
    """The folder of a path, or of an address like s3://bucket/videos; a folder is one. Raises TurboError for an address
    that cannot be used."""
    if not isinstance(place, (str, Path)):
        return place
    kind, is_address, rest = str(place).partition("://")
    if not is_address:
        return Folder(place)
    return Folder(rest) if kind in ("file", "local") else Remote(str(place))


def _beside(name: str) -> str:
    return str(Path(name).with_suffix(".json"))


def _opened(url: str):
    """(file system, path in it) of an address."""
    kind = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations
    except ImportError as error:
        raise TurboError(f'{shown(url)} needs fsspec. Cure: pip install "comfyui-turbowan[cluster]".') from error
    try:
        return url_to_fs(url)
    except ImportError as error:
        module = known_implementations.get(kind, {}).get("class", kind).partition(".")[0]
        cure = f"pip install {module}" if module != "fsspec" else shown(error, 200)
        raise TurboError(f"{shown(url)} needs a library that is not installed. Cure: {cure}") from error
    except Exception as error:
        raise TurboError(
            f"{shown(url)} is no address that can be written to ({shown(error, 200)}). Expected a folder, or an "
            "address that fsspec knows, such as s3://bucket/videos."
        ) from error
