"""Build the explorer, a static page over results/: `python tools/explorer.py OUT_FOLDER`."""

import base64
import io
import json
import shutil
import sys
import tarfile
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
from npm_packages import fetch_package

from mft_nb.bitmask import BitMask
from mft_nb.files import fetch_archive
from mft_nb.mask_file import load_mask
from mft_nb.study.datasets import SNIPPETS, load_snippets
from mft_nb.study.names import (
    CHECKPOINT_NAMES,
    CONTROL_NAMES,
    METHOD_NAMES,
    MODEL_NAMES,
    VARIANT_NAMES,
)
from mft_nb.study.plan import PROFILES
from mft_nb.study.records import read_predictions, read_record
from mft_nb.study.threshold import best_threshold, moved_accuracy
from mft_nb.targets import layer_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "site" / "explorer"
PAGE_FILES = ("index.html", "explorer.css", "explorer.js", "comparison.js", "inside.js")
BUNDLES = {"@observablehq/plot": "dist/plot.umd.min.js", "d3": "dist/d3.min.js"}
TABLE_PROFILES = [
    name for name, one in PROFILES.items() if "units" not in one.studies and one.task != "causal-lm"
]
DATA_NAMES = {"snippets": "packaged snippets", "sst2": "SST-2"}
TREATMENTS = METHOD_NAMES | CONTROL_NAMES
STEPS = 2000  # of the threshold, from 0 to 1
HEADS = 12  # of MiniLM
MATRIX_NAMES = {  # of a BERT layer, by how the weight's name ends
    "query.weight": "query",
    "key.weight": "key",
    "value.weight": "value",
    "attention.output.dense.weight": "attention output",
    "intermediate.dense.weight": "MLP in",
    "output.dense.weight": "MLP out",
}
HEAD_AXIS = {"query": 0, "key": 0, "value": 0, "attention output": 1}
GRID = 24  # blocks of a matrix along each side of its picture


def main(folder):
    """Fill a folder with the page; without npm or the snippets say so and leave it out."""
    try:
        libraries, licences = fetch_libraries()
        sentences = load_snippets()["test"]["sentence"]
        licences["vaderSentiment (the snippets)"] = snippets_licence()
    except FileNotFoundError as error:
        print(f"The explorer is left out of the site: {error}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in PAGE_FILES:
        shutil.copyfile(PAGE / name, folder / name)
    shutil.copyfile(PAGE.parent / "theme.js", folder / "theme.js")  # dark or light as on the site
    for name, content in libraries.items():
        (folder / name).write_bytes(content)
    texts = [f"{name}\n\n{text.strip()}\n" for name, text in licences.items()]
    (folder / "licences.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (folder / "data.js").write_text(data_file(sentences), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print(f"the explorer is in {folder / 'index.html'} ({size / 1e6:.2f} MB)")


def fetch_libraries():
    """The minified libraries by file name, and their licences, from npm or the cache."""
    wanted = json.loads((PAGE / "package.json").read_text())["dependencies"]
    libraries, licences = {}, {}
    for package, version in wanted.items():
        with tarfile.open(fetch_package(package, version)) as archive:
            bundle = archive.extractfile(f"package/{BUNDLES[package]}").read()
            licence = archive.extractfile("package/LICENSE").read().decode()
        libraries[Path(BUNDLES[package]).name] = bundle
        licences[f"{package} {version}"] = licence
    return libraries, licences


def snippets_licence():
    """The licence of the package that the snippets come from."""
    path = fetch_archive(SNIPPETS["requirement"], SNIPPETS["sha256"], source=True)
    folder = SNIPPETS["archive"].partition("/")[0]
    with tarfile.open(path) as archive:
        return archive.extractfile(f"{folder}/LICENSE.txt").read().decode()


def data_file(sentences, results=ROOT / "results"):
    """The text of data.js: every run's predictions, and the published masks."""
    runs = read_runs(results)
    labels = {PROFILES[record["asked"]["profile"]].data: rows.label for record, rows in runs}
    data = {
        "steps": STEPS,
        "profiles": profile_entries(runs),
        "checkpoints": CHECKPOINT_NAMES,
        "treatments": TREATMENTS,
        "labels": {name: "".join(map(str, column)) for name, column in labels.items()},
        "sentences": {"snippets": list(sentences)},
        "runs": [run_entry(record) for record, _ in runs],
        "predictions": packed([levels(rows) for _, rows in runs]),
        "first": first_look(results / "base"),
        "masks": mask_entries(results / "masks"),
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"// made by tools/explorer.py from results/\nconst DATA = {text};\n"


def read_runs(results):
    """Every record with predictions and its rows, in the order in which the page lists them.

    Profiles of pruned neurons have a page of their own, and are left out.
    """
    runs = []
    for profile in TABLE_PROFILES:
        for path in sorted((results / profile).rglob("*.json")):
            record = read_record(path)
            if "test" in record["happened"]:
                runs.append((record, read_predictions(path.parent, record)))
    return sorted(runs, key=lambda run: order_of(run[0]["asked"]))


def order_of(asked):
    """Where a run stands in the page's lists: a treatment's own settings come first."""
    variant = asked.get("variant", "")
    variants = ["", *VARIANT_NAMES]
    return (
        list(PROFILES).index(asked["profile"]),
        list(CHECKPOINT_NAMES).index(asked["checkpoint"]),
        list(TREATMENTS).index(asked["method"]),
        variants.index(variant) if variant in variants else len(variants),
        variant,
        asked["keep"] not in (0.9, 1.0),
        -asked["keep"],
        asked["seed"],
    )


def profile_entries(runs):
    """For each profile that has runs: its title and the data whose sentences it is tested on."""
    used = dict.fromkeys(record["asked"]["profile"] for record, _ in runs)
    return {
        name: {
            "title": f"{MODEL_NAMES[name]}, {DATA_NAMES[PROFILES[name].data]}",
            "data": PROFILES[name].data,
        }
        for name in used
    }


def run_entry(record):
    """One run as a list: profile, checkpoint, method, setting, seed, study, fraction pruned."""
    asked, mask = record["asked"], record["happened"].get("mask")
    pruned = round(1 - mask["density"], 4) if mask else 0
    names = [asked[name] for name in ("profile", "checkpoint", "method")]
    return [*names, setting_of(asked), asked["seed"], asked.get("study", "table"), pruned]


def setting_of(asked):
    """What tells runs of one treatment apart: the fraction it was to prune, and its variant."""
    variant = asked.get("variant", "")
    parts = [f"{100 * (1 - asked['keep']):g} % pruned"] if asked["keep"] < 1 else []
    if variant in VARIANT_NAMES:
        parts.append(VARIANT_NAMES[variant])
    elif variant:  # rate_0.0003
        parts.append(f"rate {float(variant.removeprefix('rate_')):.0e}".replace("e-0", "e-"))
    return ", ".join(parts) or "own settings"


def levels(rows):
    """P(positive) of each sentence as the highest step of the threshold that it is above.

    A sentence is called positive at threshold k / STEPS where its level is at least k; at one
    half that is the recorded prediction, whatever the rounding of the probability.
    """
    millionths = np.rint(rows.positive.to_numpy() * 1e6).astype(np.int64)
    size = 1_000_000 // STEPS
    level = np.clip(-(-millionths // size) - 1, 0, STEPS - 1)
    half = STEPS // 2
    said = np.where(rows.prediction == 1, np.maximum(level, half), np.minimum(level, half - 1))
    return said.astype(np.uint16)


def packed(arrays):
    """Numbers below 65,536 as base64 of their compressed low bytes, and of the high ones."""
    together = np.concatenate(arrays)
    planes = (together & 255, together >> 8)
    return [encoded(plane.astype(np.uint8).tobytes()) for plane in planes]


def encoded(content):
    """Bytes as base64 of their compressed form, which a browser can undo."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def first_look(folder):
    """The half-trained MPNet-base: what the threshold alone does to its accuracy."""
    gains, shown = [], {}
    for path in sorted(folder.glob("seed*-75-none.json")):
        record = read_record(path)
        rows = read_predictions(folder, record)
        label, positive = rows.label.to_numpy(), rows.positive.to_numpy()
        accuracy = record["happened"]["test"]["accuracy"]
        gains.append(moved_accuracy(label, positive) - accuracy)
        treated = folder / path.name.replace("none", "mft_recommended")
        if not shown and treated.exists():
            step = round(best_threshold(label, positive) * STEPS)
            moved = ((levels(rows) >= step) == label).mean()
            shown = {"seed": record["asked"]["seed"], "accuracy": accuracy}
            shown |= {"step": step, "moved": round(float(moved), 4)}
    return shown | {"seeds": len(gains), "gain": round(float(np.mean(gains)), 4)}


def mask_entries(folder):
    """The published masks: zeros by matrix, head and block, and what each two masks share."""
    paths = sorted(folder.glob("*.safetensors"), key=lambda path: mask_order(path.stem))
    masks = {path.stem: load_mask(path).mask for path in paths}
    if not masks:
        return None
    matrices = [matrix_entry(name, tensor) for name, tensor in next(iter(masks.values())).items()]
    zeros = {name: ~mask for name, mask in masks.items()}
    pairs = {
        f"{first} {second}": counts(zeros[first] & zeros[second], matrices)
        for first, second in combinations(zeros, 2)
    }
    return {
        "titles": {name: mask_title(name) for name in masks},
        "matrices": matrices,
        "heads": HEADS,
        "grid": GRID,
        "zeros": {name: counts(zero, matrices) for name, zero in zeros.items()},
        "shared": pairs,
        "blocks": {name: encoded(block_bytes(zero)) for name, zero in zeros.items()},
    }


def mask_order(name):
    """Where a mask, whose file is named as its run, stands in the page's lists."""
    _, checkpoint, method = name.split("-")
    return list(METHOD_NAMES).index(method), list(CHECKPOINT_NAMES).index(checkpoint)


def mask_title(name):
    """What the page calls a mask."""
    _, checkpoint, method = name.split("-")
    return f"{METHOD_NAMES[method]}, {CHECKPOINT_NAMES[checkpoint]}"


def matrix_entry(name, tensor):
    """One masked matrix: its layer's number, what it is, and its shape."""
    kind = next(kind for end, kind in MATRIX_NAMES.items() if name.endswith(end))
    return {"name": name, "layer": layer_of(name), "kind": kind, "shape": list(tensor.shape)}


def counts(chosen: BitMask, matrices):
    """How many weights are chosen: in each matrix, and in each head of those that have heads."""
    by_matrix, by_head = [], []
    for entry in matrices:
        tensor = chosen[entry["name"]]
        by_matrix.append(int(tensor.sum()))
        axis = HEAD_AXIS.get(entry["kind"])
        parts = tensor.chunk(HEADS, axis) if axis is not None else ()
        by_head.append([int(part.sum()) for part in parts])
    return {"matrices": by_matrix, "heads": by_head}


def block_bytes(zeros: BitMask):
    """The fraction of zeros, 255 for all, in each of GRID x GRID blocks of every matrix."""
    pictures = io.BytesIO()
    for tensor in zeros.values():
        rows, columns = (size // GRID for size in tensor.shape)
        blocks = tensor.reshape(GRID, rows, GRID, columns).double().mean((1, 3))
        pictures.write(np.rint(255 * blocks.numpy()).astype(np.uint8).tobytes())
    return pictures.getvalue()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Name the folder to build into: python tools/explorer.py OUT_FOLDER")
    main(Path(sys.argv[1]))
