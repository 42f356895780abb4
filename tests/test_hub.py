"""A mask from a stand-in of the hub on this machine; and one sentence where there is none."""

import http.server
import threading
import time

import pytest
import torch
from huggingface_hub import constants
from torch import nn

from mft_nb.config import MaskConfig
from mft_nb.hub import MASK_FILE, MODULES_FILE, find_mask
from mft_nb.mask import MFT

CONFIG = MaskConfig(layers=(0,), keep=0.75, modules_to_save=("head",))
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


def small():
    """A model with a head, the same in each call."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(4, 4))})
    model["head"] = nn.Linear(4, 2)
    return model


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for files as the hub does."""

    repos = {}  # id: files by commit
    asked = []  # what was asked for, and with which token

    def do_GET(self):
        """Send a file, or say by which code there is none."""
        owner, name, _, revision, file = self.path.strip("/").split("?")[0].split("/")
        repo, token = f"{owner}/{name}", self.headers.get("Authorization", "")
        self.asked.append((self.command, file, revision, token.removeprefix("Bearer ")))
        if repo == "me/gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if repo == "me/broken":
            return self.answer(400)
        if repo not in self.repos or (repo == "me/private" and token != "Bearer mine"):
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        commit = COMMITS.get(revision, revision)
        if commit not in self.repos[repo]:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        headers, files = {"X-Repo-Commit": commit}, self.repos[repo][commit]
        if file not in files:
            return self.answer(404, headers | {"X-Error-Code": "EntryNotFound"})
        self.answer(200, headers | {"ETag": f'"{commit}{file}"'}, files[file])

    do_HEAD = do_GET

    def answer(self, status, headers=None, content=b""):
        """One answer; of HEAD without the content."""
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Two masks with a head, in folders named by commit."""
    folders = {}
    for number, commit in enumerate(COMMITS.values(), 1):
        mft = MFT(small(), CONFIG)
        mft.scores[0].data += torch.randn(4, 4, generator=torch.Generator().manual_seed(number))
        mft.model["head"].bias.data += number
        folders[commit] = tmp_path_factory.mktemp("masks") / commit
        mft.save_pretrained(folders[commit])
    return folders


@pytest.fixture
def hub(masks, monkeypatch, tmp_path):
    """A hub with two masks, on this machine."""
    files = {c: {p.name: p.read_bytes() for p in f.iterdir()} for c, f in masks.items()}
    Hub.repos = {"me/mask": files, "me/private": files}
    Hub.repos["me/model"] = {COMMITS["main"]: {"model.safetensors": b"weights"}}
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    point_to(address, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def point_to(address, monkeypatch):
    """Let huggingface_hub ask there."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_a_mask_with_its_head_from_the_hub_is_that_of_the_folder(hub, masks, monkeypatch, tmp_path):
    for revision, commit in ((None, COMMITS["main"]), ("v1", COMMITS["v1"])):
        here = MFT.from_pretrained(small(), masks[commit])
        mft = MFT.from_pretrained(small(), "me/mask", revision=revision)
        assert mft.bitmask() == here.bitmask()
        assert torch.equal(mft.model["head"].bias, here.model["head"].bias)
    of_heads = {revision for _, file, revision, _ in Hub.asked if file == MODULES_FILE}
    assert of_heads == set(COMMITS.values())  # never those of another commit than the mask's
    assert (tmp_path / "cache").is_dir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = MFT.from_pretrained(small(), "me/mask", revision="v1", trainable=True)
    assert again.bitmask() == mft.bitmask() and again.scores


def test_token_and_cache_are_those_of_huggingface_hub_and_a_folder_comes_first(hub, tmp_path):
    path = find_mask("me/private", token="mine", cache_dir=tmp_path / "mine")
    assert path.is_relative_to(tmp_path / "mine") and path.name == MASK_FILE
    assert {token for *_, token in Hub.asked} == {"mine"}
    (tmp_path / "me" / "mask").mkdir(parents=True)
    (tmp_path / "me" / "mask" / MASK_FILE).write_bytes(b"here")
    assert find_mask("me/mask").read_bytes() == b"here"


@pytest.mark.parametrize(
    "repo, options, kind, said",
    [
        ("me/model", {}, FileNotFoundError, "me/model on the hub holds no mask.safetensors"),
        ("me/nothing", {}, FileNotFoundError, "no model me/nothing that this token may read, and"),
        ("me/private", {"token": "theirs"}, FileNotFoundError, "give a token for a private one"),
        ("me/mask", {"revision": "v9"}, ValueError, "revision is 'v9', which me/mask on the hub"),
        ("me/gated", {}, PermissionError, "only to those whom its owner allows"),
        ("me/broken", {}, ConnectionError, "The hub refused me/broken with status 400"),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(hub, repo, options, kind, said):
    model = small()
    with pytest.raises(kind) as caught:
        MFT.from_pretrained(model, repo, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert MFT.of(model) is None


def test_without_network_one_sentence_says_so(hub, monkeypatch):
    point_to("http://127.0.0.1:9", monkeypatch)  # nobody listens there
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its tries
    with pytest.raises(ConnectionError, match="could not be reached .* for me/mask, which is not"):
        MFT.from_pretrained(small(), "me/mask")
