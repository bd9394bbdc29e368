"""qkit push: what arrives on a hub is the result, byte for byte, and every refusal is a sentence."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import Quiet
from fake_hub import TOKEN, FakeHub, running

from qkit.workflows.quantize import Request, quantize

REPO = "me/model-w4a16"


@pytest.fixture(scope="module")
def result(tiny, tmp_path_factory):
    source, out = tmp_path_factory.mktemp("push") / "model", tmp_path_factory.mktemp("out") / "out"
    shutil.copytree(tiny("llama"), source)
    (source / "LICENSE").write_text("Do as you like.\n")
    quantize(Request(model=str(source), scheme="w4a16", group_size=32), out, Quiet())
    return out


@pytest.fixture
def hub():
    return FakeHub()


@pytest.fixture
def push(hub, tmp_path):
    """Runs the command in a process of its own, as huggingface_hub reads its settings once: (exit code, stdout, stderr)."""

    def go(*arguments, token=TOKEN, address=None, **more):
        settings = {
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1", **more,
        }  # fmt: skip
        with running(hub) as here:
            env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
            env |= {**settings, "HF_ENDPOINT": address or here, **({"HF_TOKEN": token} if token else {})}
            command = [sys.executable, "-m", "qkit", "push", *map(str, arguments)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        return done.returncode, " ".join(done.stdout.split()), done.stderr.strip()

    return go


def content(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def refused(done, code, *words):
    found, _, err = done
    assert found == code and len(err.splitlines()) == 1 and err.startswith("qkit: "), done
    assert all(word in err for word in words), err


def test_what_arrives_is_the_result(push, hub, result, tmp_path):
    out = shutil.copytree(result, tmp_path / "out")
    (out / "README.md").write_text((out / "README.md").read_text() + "Words of mine.\n")
    code, said, err = push(out, REPO, "--message", "The first one", "--json", tmp_path / "push.json")
    assert code == 0, err
    assert hub.files(REPO) == content(out) and not hub.repositories[REPO]["private"]
    assert hub.commits == ["The first one"] and "uploaded and compared: http" in said
    assert "note: README.md was edited" in said and "names no base_model" in said and "names no license" in said
    found = json.loads((tmp_path / "push.json").read_text())
    assert {f["name"] for f in found["files"]} == set(content(out)) and found["commit"].endswith("c" * 40)
    assert found["bytes"] == sum(map(len, content(out).values()))
    # Once more: nothing that is there already goes up again, and weights of another result are named.
    hub.files(REPO)["model-00001-of-00002.safetensors"] = b"old"
    before = len(hub.requests)
    code, said, err = push(out, REPO)
    assert code == 0, err
    assert not any(r.startswith("PUT") for r in hub.requests[before:])
    assert "also has model-00001-of-00002.safetensors, which is not of this result" in said


def test_a_branch_and_a_private_repository(push, hub, result):
    code, _, err = push(result, REPO, "--private", "--revision", "group-32")
    assert code == 0, err
    assert (
        hub.repositories[REPO]["private"] and hub.files(REPO, "group-32") == content(result) and hub.files(REPO) == {}
    )


def test_a_dry_run_needs_neither_network_nor_token(push, hub, result, tmp_path):
    out = shutil.copytree(result, tmp_path / "out")
    mark = {"made_by": "qkit check", "budget": "b", "checks": [], "measured": {}}
    (out / "qkit-rejected.json").write_text(json.dumps(mark))
    done = push(out, REPO, "--dry-run", "--json", tmp_path / "p.json", token=None, HF_HUB_OFFLINE="1")
    code, said, err = done
    assert code == 0, err
    found = json.loads((tmp_path / "p.json").read_text())
    assert {f["name"] for f in found["files"]} == set(content(result)) and found["left_out"] == ["qkit-rejected.json"]
    assert hub.requests == [] and all(f["name"] in said for f in found["files"]) and "would be uploaded" in said
    assert "left out: qkit-rejected.json" in said and found["commit"] is None


def test_an_unsound_folder_is_not_uploaded(push, hub, result, tmp_path):
    out = shutil.copytree(result, tmp_path / "out")
    (out / "notes-of-mine.txt").write_text("secret")
    refused(push(out, REPO), 4, "notes-of-mine.txt", "nothing is uploaded")
    (out / "notes-of-mine.txt").unlink()
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    refused(push(out, REPO), 4, "nothing is uploaded")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        ({"/api/repos/create": (403, "You don't have the rights")}, ("HTTP 403", "You don't have the rights", "token")),
        ({"/objects/batch": (403, "Private repository storage limit reached")}, ("HTTP 403", "storage limit reached")),
        ({"/upload/": (413, "too large")}, ("HTTP 413", "storage")),
        ({"/commit/": (404, "Not here")}, ("HTTP 404",)),
    ],
    ids=["no right", "quota", "too large", "not found"],
)
def test_what_the_hub_refuses(push, hub, result, refuse, words):
    hub.refuse = refuse
    refused(push(result, REPO), 5, REPO, *words)


def test_a_token_that_is_missing_or_wrong(push, hub, result):
    refused(push(result, REPO, token=None), 2, "no token", "hf auth login")
    assert hub.requests == []
    refused(push(result, REPO, token="hf_wrong"), 5, "HTTP 401", "hf auth login")


def test_no_network(push, result):
    refused(push(result, REPO, address="http://127.0.0.1:9"), 5, "cannot be reached")
    refused(push(result, REPO, HF_HUB_OFFLINE="1"), 5, "HF_HUB_OFFLINE")


def test_a_public_repository_is_not_taken_for_a_private_one(push, hub, result):
    hub.repositories[REPO] = {"private": False, "branches": {"main": {}}}
    refused(push(result, REPO, "--private"), 2, "is public")
    assert hub.files(REPO) == {}


def test_a_file_that_did_not_arrive_as_it_was_sent_is_told(push, hub, result):
    hub.spoil = {"model.safetensors": b"something else"}
    refused(push(result, REPO), 5, "model.safetensors is not as it was sent")
    hub.spoil = {"config.json": b"{}"}
    refused(push(result, REPO), 5, "config.json is not as it was sent")


@pytest.mark.parametrize("name", ["a/b/c", "me/..", "has space/x", "-x"])
def test_a_name_that_no_repository_has(run, result, name):
    code, _, err = run("push", "--dry-run", "--", result, name)
    assert code == 2 and "OWNER/NAME" in err and len(err.strip().splitlines()) == 1


def test_help_does_not_load_the_hub():
    script = "import sys; from qkit.commands import main\ntry: main(['push', '--help'])\nexcept SystemExit: pass\n"
    script += "print([m for m in ('huggingface_hub', 'torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
