"""The verb push, against a hub of our own on loopback that takes what huggingface_hub sends."""

import base64
import hashlib
import http.server
import json
import threading

import pytest


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as an upload needs; `got` has the files of the last commit."""

    got: dict[str, bytes]
    large: dict[str, bytes]
    refuse = 0

    def log_message(self, *_):
        pass

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, told, code=200):
        data = json.dumps(told).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer({"id": "me/it", "sha": "0" * 40, "siblings": [], "private": False})

    def do_PUT(self):
        data = self.body()
        self.large[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_POST(self):
        here, sent = f"http://{self.headers['Host']}", self.body()
        if self.refuse:
            self.answer({"error": "no"}, self.refuse)
        elif self.path.endswith("/repos/create"):
            self.answer({"url": f"{here}/me/it", "id": "me/it"})
        elif "/preupload/" in self.path:
            files = json.loads(sent)["files"]
            mode = lambda name: "lfs" if name.endswith(".safetensors") else "regular"  # noqa: E731
            told = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]
            self.answer({"files": told})
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(sent)["objects"]
            self.answer({"transfer": "basic", "objects": [
                one | {"actions": {"upload": {"href": f"{here}/put", "header": {}}}} for one in objects
            ]})  # fmt: skip
        elif "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.got[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.got[value["path"]] = self.large[value["oid"]]
            self.answer(
                {"commitUrl": f"{here}/me/it/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None}
            )
        else:
            self.answer({})


@pytest.fixture
def hub(monkeypatch):
    kind = type("Own", (Hub,), {"got": {}, "large": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.ENDPOINT"):
        monkeypatch.setattr(name, address, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield kind
    server.shutdown()


def test_the_files_of_a_checkpoint_arrive_and_nothing_else(run, folder, hub, tmp_path):
    import shutil

    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    (mine / "optimizer.pt").write_bytes(b"x")
    (mine / "checkpoint-5").mkdir()
    (mine / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    code, out, err = run("push", mine, "me/it", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert {*told["files"]} == {*hub.got} == {path.name for path in folder.iterdir()}
    for name, content in hub.got.items():
        assert content == (folder / name).read_bytes()
    assert told["url"].endswith("/me/it/commit/1")


def test_a_refusal_is_told_with_what_to_do(run, folder, hub):
    hub.refuse = 403
    code, _, err = run("push", folder, "me/it")
    assert code == 2
    assert "cannot upload to me/it" in err
    assert "whoami" in err
    code, _, err = run("push", folder, "it")
    assert code == 2
    assert "org/name" in err
