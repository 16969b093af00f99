"""What the host and this pack run here, which path each part takes and why, as text."""

import comfy.memory_management
import comfy.model_management
import comfy_kitchen
from comfyui_version import __version__ as comfyui_version

from ...turbo_core.diagnostics.doctor import examine
from ...turbo_core.files import human_bytes
from .facts import host_attention, model_facts

# what turbo-core does by itself and ComfyUI does instead here
_STANDALONE = {"device", "dense attention", "text encoder", "VAE", "generate", "inspect, convert, quantize"}


def examined(model=None) -> str:
    """Everything as aligned text, section by section."""
    findings = examine()
    paths = [(item, finding) for item, finding in findings["paths"] if item not in _STANDALONE]
    sections = {"machine": findings["machine"], "ComfyUI": host_facts(), "TurboWan": paths}
    if model is not None:
        sections["this model"] = model_facts(model)
    sections |= {name: findings[name] for name in ("libraries", "on this card")}
    width = max(len(item) for rows in sections.values() for item, _ in rows)
    return "\n\n".join(
        "\n".join([title, *(f"  {item:<{width}}  {finding}" for item, finding in rows)])
        for title, rows in sections.items()
    )


def host_facts() -> list[tuple[str, str]]:
    """[(item, finding)] about the ComfyUI this runs in."""
    management, device = comfy.model_management, comfy.model_management.get_torch_device()
    free, total = management.get_free_memory(device), management.get_total_memory(device)
    dynamic = "on" if comfy.memory_management.aimdo_enabled else "off: whole models or lowvram loading"
    return [
        ("ComfyUI", comfyui_version),
        ("device", management.get_torch_device_name(device)),
        ("memory of the device", f"{human_bytes(free)} free of {human_bytes(total)}"),
        ("VRAM state", management.vram_state.name),
        ("dynamic VRAM", dynamic),
        ("dense attention", f"{host_attention()}, ComfyUI's choice (--use-sage-attention and the like change it)"),
        *_kitchen(),
    ]


def _kitchen():
    rows = []
    for name, backend in sorted(comfy_kitchen.list_backends().items()):
        if not backend["available"]:
            finding = f"off: {backend['unavailable_reason']}"
        elif backend["disabled"]:
            finding = "switched off by ComfyUI or its command line"
        else:
            finding = f"on, {len(backend['capabilities'])} functions"
        rows.append((f"comfy_kitchen {name}", finding))
    return rows
