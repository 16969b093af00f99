"""ComfyUI's page without ComfyUI: the frontend package's files and as much of a server as it takes to open a graph."""

import asyncio
import contextlib
import importlib.util
import threading
from pathlib import Path


def frontend_folder():
    """The built page of the PyPI package comfyui-frontend-package."""
    spec = importlib.util.find_spec("comfyui_frontend_package")
    return Path(spec.submodule_search_locations[0]) / "static"


def _application(object_info):
    from aiohttp import web

    answers = {
        "object_info": object_info,
        "settings": {"Comfy.TutorialCompleted": True},  # else a dialog covers the canvas
        "users": {"storage": "server", "migrated": True},
        "queue": {"queue_running": [], "queue_pending": []},
        "system_stats": {"system": {"comfyui_version": "0.33.0", "argv": []}, "devices": []},
    }
    answers |= {name: [] for name in ("extensions", "embeddings", "userdata", "models", "experiment/models")}
    answers |= {name: {} for name in ("i18n", "features", "history", "workflow_templates")}
    static = frontend_folder()

    async def answer(request):
        name = request.path.removeprefix("/api/").strip("/")
        if request.method == "POST":
            return web.json_response({})
        return web.json_response(answers[name]) if name in answers else web.Response(status=404)

    async def events(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        status = {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "page-test"}
        await socket.send_json({"type": "status", "data": status})
        async for _ in socket:
            pass
        return socket

    async def index(request):
        return web.FileResponse(static / "index.html")

    application = web.Application()
    application.router.add_get("/ws", events)
    application.router.add_get("/", index)
    application.router.add_route("*", "/api/{name:.*}", answer)
    application.router.add_static("/", static)
    return application


@contextlib.contextmanager
def serve(object_info):
    """Run the stub in a thread; yields its address."""
    from aiohttp import web

    loop, started, address = asyncio.new_event_loop(), threading.Event(), []

    async def start():
        runner = web.AppRunner(_application(object_info), shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address.append(runner.addresses[0])
        started.set()
        return runner

    def work():
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(30), "the stub did not start"
    yield f"http://127.0.0.1:{address[0][1]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
