"""An experiment small enough for a test; `python -m tests.tiny OUT [ENGINE]` runs it."""

import sys

from mft_nb.study.plan import Profile, Run, Workspace
from mft_nb.study.runner import run_missing
from mft_nb.train import TrainConfig

PROFILE = Profile(
    name="tiny",
    data="snippets",
    model="minilm",
    fine_tuning=TrainConfig(learning_rate=3e-4, max_steps=8, batch_size=8),
    early_every=4,
    late_every=4,
    look_rows=32,
    watch_rows=16,
    mask_rows=32,
    gradient_rows=16,
    test_rows=48,
)
RUNS = [
    Run("tiny", 0, "baseline", "none", 1.0),
    Run("tiny", 0, "90", "none", 1.0),
    Run("tiny", 0, "90", "mft_recommended"),
    Run("tiny", 0, "90", "gradient_all", 1.0),
    Run("tiny", 0, "90", "random"),
]

if __name__ == "__main__":
    engine = sys.argv[2] if len(sys.argv) > 2 else "processes"
    print(run_missing(RUNS, Workspace(sys.argv[1]), jobs=2, profile=PROFILE, engine=engine))
