"""Compares the outputs in a notebook with those of a fresh run from top to bottom."""

import base64
import io
import os
import re
import tempfile
from pathlib import Path
from queue import Empty

import nbformat
import numpy as np
from jupyter_client import AsyncKernelClient, AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

from tests.forks import FORKS

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [
    p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts
]

os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else a debugger warns of itself
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the outputs were made; forks of more may hang


def serve(connection_file, folder):
    """Be the kernel of one notebook."""
    import pandas
    from ipykernel.kernelapp import IPKernelApp

    os.chdir(folder)
    pandas.set_option("display.max_columns", 20)  # as where a kernel imports it, not a terminal
    ends_with = f"--IPKernelApp.parent_handle={os.getppid()}"
    sharp = "--InlineBackend.figure_formats=retina"  # pictures at twice the resolution
    quiet = ["--log-level=ERROR", "--HistoryManager.enabled=False"]  # leaves the user's history
    IPKernelApp.launch_instance(argv=["-f", connection_file, ends_with, sharp, *quiet])


class Client(AsyncKernelClient):
    """Asks a kernel."""

    async def wait_for_ready(self, timeout=None):
        """Wait for an answer, and for what is shown meanwhile to come here too.

        The usual way then waits a fifth of a second in which nothing may come. Each request tells
        its own messages from earlier ones, so that is not needed.
        """
        while True:
            await self.kernel_info(reply=True, timeout=timeout)
            try:
                return await self.get_iopub_msg(timeout=0.2)
            except Empty:
                continue  # not connected yet


class ForkedKernel(AsyncKernelManager):
    """Manages a kernel that is a fork of the process with the imports."""

    client_factory = Client
    process = None

    async def start_kernel(self, cwd=None, **_):
        """Fork a kernel that works in a folder."""
        self.write_connection_file()
        # read when the process with the imports starts: how notebooks draw
        os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
        self.process = FORKS.Process(target=serve, args=(self.connection_file, str(cwd)))
        self.process.start()

    async def is_alive(self):
        """Whether the kernel runs."""
        return self.process is not None and self.process.is_alive()

    _async_is_alive = is_alive  # by which its clients ask

    async def shutdown_kernel(self, **_):
        """End it."""
        self.process.kill()
        self.process.join()


def run(path):
    """The notebook after a fresh run from top to bottom."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    folder = {"metadata": {"path": str(path.parent)}}
    settings = {"timeout": 600, "resources": folder, "coalesce_streams": True}
    with tempfile.TemporaryDirectory() as sockets:  # of its own: two tests never want the same
        kernel = ForkedKernel(transport="ipc", ip=f"{sockets}/kernel")
        return NotebookClient(notebook, km=kernel, **settings).execute(cleanup_kc=True)


def texts(output, digits=True):
    """What an output shows as text, without memory addresses, or also without numbers."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    shown = {kind: text for kind, text in data.items() if kind.startswith("text")}
    pattern = r" at 0x[0-9a-f]+" if digits else r" at 0x[0-9a-f]+|[0-9][0-9.,]*"
    return {kind: re.sub(pattern, "", str(text)).strip() for kind, text in shown.items()}


def pixels(output):
    """The picture of an output as numbers from 0 to 1."""
    coded = base64.b64decode(output["data"]["image/png"])
    return np.asarray(Image.open(io.BytesIO(coded)).convert("RGB")) / 255


def check_pictures(before, after, source):
    """Two outputs of a cell show about the same picture, if any."""
    coded = [output.get("data", {}).get("image/png") for output in (before, after)]
    if coded[0] == coded[1]:
        return
    assert None not in coded, source
    was, is_now = pixels(before), pixels(after)
    assert was.shape == is_now.shape, source
    assert np.abs(was - is_now).mean() < 0.002, source


def check_outputs(path):
    """The committed outputs are those of a fresh run."""
    committed = nbformat.read(path, as_version=4)
    for old, new in zip(committed.cells, run(path).cells, strict=True):
        if old.cell_type != "code":
            continue
        # tutorials show results of training, whose last digits may differ on another processor
        digits = path.parent.name != "tutorials"
        assert [texts(output, digits) for output in old.outputs] == [
            texts(output, digits) for output in new.outputs
        ]
        for before, after in zip(old.outputs, new.outputs, strict=True):
            check_pictures(before, after, old.source)
