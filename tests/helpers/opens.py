"""How often files are opened and described."""

from collections import Counter
from pathlib import Path

from turbo_core.checkpoint import loading, read


def counted_opens(monkeypatch) -> tuple[Counter, Counter]:
    """({file name: times opened}, {file name: times validated and described}), counted from now on."""

    def counted(module, name: str, counter: Counter) -> None:
        function = getattr(module, name)

        def wrapper(path, *arguments, **settings):
            counter[Path(path).name] += 1
            return function(path, *arguments, **settings)

        monkeypatch.setattr(module, name, wrapper)

    opened, described = Counter(), Counter()
    for name in ("_open_safetensors", "_open_pickle"):  # whoever imported read.open_tensors comes through one of them
        counted(read, name, opened)
    counted(loading, "describe", described)
    return opened, described
