"""Imports what takes seconds to import, once, for the processes that are forked from this one."""

import contextlib
import gc
import importlib

gc.disable()  # a search for garbage finds none in what is imported, and takes a fifth of the time
for name in (
    "tests.outputs",
    "ipykernel.kernelapp",
    "ipykernel.debugger",
    "ipykernel.zmqshell",
    "mft_nb.study.runner",
    "mft_nb.trainer",
    "matplotlib.pyplot",
    "seaborn",
    "peft",
):
    with contextlib.suppress(ImportError):  # what is not installed is left out
        importlib.import_module(name)
gc.freeze()
gc.enable()
