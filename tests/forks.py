"""Processes that are forked from one that has imported what takes seconds to import."""

import multiprocessing

# It has run nothing else, so each fork starts with fresh modules and a fresh random state. What is
# not installed is left out.
IMPORTED = (
    "tests.outputs",
    "ipykernel.kernelapp",
    "ipykernel.debugger",
    "ipykernel.zmqshell",
    "mft_nb.study.runner",
    "mft_nb.trainer",
    "matplotlib.pyplot",
    "seaborn",
    "peft",
)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(list(IMPORTED))
