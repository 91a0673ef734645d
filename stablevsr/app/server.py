"""Serves the page of the app: on this machine only, unless told otherwise."""

import errno
import importlib.util
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stablevsr.app.studio import Folders, Studio, disk_error, make_folder, writing_to
from stablevsr.errors import OptionsError, ResourceError

try:
    import fcntl
except ImportError:  # on Windows, where nothing prevents two apps in one folder
    fcntl = None  # type: ignore[assignment]  # a module or none

log = logging.getLogger(__name__)

# What a browser may load: nothing from another server. Gradio builds its components with inline scripts and eval.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; frame-ancestors 'self'"
)
LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]"]


def require_gradio() -> None:
    """Raises `ResourceError` where Gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise ResourceError("the app needs the package gradio: pip install 'stablevsr[app]'")


def require_address(host: str, port: int) -> None:
    """Check that a server can listen there, before weights are loaded.

    Raises:
        OptionsError: when `host` is no address of this machine, or `port` is no port.
        ResourceError: when the port is taken, or needs a permission.
    """
    if not 0 < port < 2**16:
        raise OptionsError(f"got port {port}, expected 1 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            if os.name == "posix":  # as servers do: a port whose last connection has just ended is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = "is in use" if error.errno == errno.EADDRINUSE else "may not be used without more rights"
            raise ResourceError(f"port {port} {reason}: choose another with --port") from error
        raise OptionsError(
            f"got host {host}, which is no address of this machine ({error.strerror}): use 127.0.0.1"
        ) from error


@contextmanager
def open_folders(folders: Folders) -> Iterator[None]:
    """Make the folders, and keep other apps out of them.

    Raises:
        ResourceError: when they cannot be made, or another app uses them.
    """
    make_folder(folders.root)
    with writing_to(folders.root):
        lock = (folders.root / "lock").open("w")
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ResourceError(
                    f"{folders.root} is in use by another app: close that one, or choose another folder with --folder"
                ) from error
        folders.make()
        yield


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@contextmanager
def serving(studio: Studio, host: str, port: int, max_upload: int) -> Iterator[str]:
    """Serve the page in threads of its own; yields its address.

    Args:
        max_upload: bytes of a file that a page may send.

    Raises:
        ResourceError: when the port has been taken since `require_address`.
    """
    # Read when Gradio makes its components. It serves this folder, and would otherwise use one in the system's
    # temporary folder that all its apps share.
    os.environ["GRADIO_TEMP_DIR"] = str(studio.folders.uploads)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    from stablevsr.app.page import build_page
    from stablevsr.app.texts import asset

    page = build_page(studio, max_upload)
    # Fonts are names, not files from elsewhere; labels are plain text.
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(block_title_text_weight="600", block_shadow="none", body_background_fill="*neutral_50")
    try:
        _, address, _ = page.queue(api_open=False, default_concurrency_limit=2).launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            allowed_paths=[str(studio.folders.inputs), str(studio.folders.outputs)],
            max_file_size=max_upload,
            app_kwargs={"middleware": _middleware(host, studio.folders.uploads)},
            theme=theme,
            css=asset("page.css"),
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
        )
    except OSError as error:
        raise ResourceError(f"port {port} is in use: choose another with --port") from error
    try:
        yield address
    finally:
        page.close(verbose=False)


def wait_for_interrupt() -> None:
    """Returns at Ctrl-C, or at SIGTERM where that is handled as Ctrl-C."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return


def _middleware(host: str, uploads: Path) -> list[Any]:
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    found = [Middleware(StayHere), Middleware(SayThatDiskIsFull, folder=uploads)]
    if is_loopback(host):  # a page elsewhere could otherwise reach the app under a name that it lets point here
        found.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_NAMES, host]))
    return found


class SayThatDiskIsFull:
    """ASGI middleware: what cannot be written costs one request, and the page shows a sentence."""

    def __init__(self, app: Callable[..., Any], folder: Path) -> None:
        self._app, self._folder = app, folder

    async def __call__(self, scope: Mapping[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        try:
            await self._app(scope, receive, send)
        except OSError as error:
            if scope["type"] != "http" or not scope["path"].endswith("/upload"):
                raise
            problem = disk_error(self._folder, error)
            log.error("%s", problem)
            await send({"type": "http.response.start", "status": 507, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": str(problem).encode()})


class StayHere:
    """ASGI middleware: no request of Gradio's server to another, and none of the browser.

    Gradio fetches web addresses that a visitor asks it for; this app has no use for that.
    """

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if any(each in scope["path"] for each in ("file=http", "file/http", "proxy=")):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"this app fetches nothing from elsewhere"})
            return

        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_policy)
