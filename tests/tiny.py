"""An experiment small enough for a test."""

from mft_nb.study.plan import Profile, Run, Workspace
from mft_nb.study.runner import run_missing
from mft_nb.train import TrainConfig

PROFILE = Profile(
    name="tiny",
    data="snippets",
    model="minilm",
    fine_tuning=TrainConfig(learning_rate=3e-4, max_steps=8, batch_size=4),
    early_every=4,
    late_every=4,
    look_rows=8,
    watch_rows=8,
    mask_rows=32,
    gradient_rows=8,
    test_rows=16,
    shared=True,
)
RUNS = [
    Run("tiny", 0, "baseline", "none", 1.0),
    Run("tiny", 0, "90", "none", 1.0),
    Run("tiny", 0, "90", "mft_recommended"),
    Run("tiny", 0, "90", "gradient_all", 1.0),
    Run("tiny", 0, "90", "random"),
]


def run(out, engine="processes", runs=RUNS):
    """Run it, or a part of it; how many tasks were done."""
    options = {"profile": PROFILE, "engine": engine, "progress": False}
    return run_missing(runs, Workspace(str(out)), jobs=2, **options)
