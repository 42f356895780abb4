"""Processes that are forked from one that has imported what takes seconds to import."""

import multiprocessing

# It has run nothing else, so each fork starts with fresh modules and a fresh random state.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.imported"])
