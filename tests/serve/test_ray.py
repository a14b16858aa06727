"""The example for Ray Serve: it answers, scales from one to two replicas, and survives the death of one."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from serving import free_port

import tiny
from layerskip.serve.load import Target, measured

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, time
import ray
from ray import serve
from examples.ray_serve import built
ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
settings = {"name": "tiny", "rows": 2, "context": 256}
app = built(sys.argv[1], at_once=4, settings=settings, loading={"threads": 1, "dtype": "float32"})
serve.run(app)
print("running", flush=True)
while True:
    replicas = serve.status().applications["default"].deployments["layerskip"].replica_states
    print("replicas", replicas.get("RUNNING", 0), flush=True)
    time.sleep(0.5)
"""


@pytest.fixture
def folder(tmp_path):
    model, words = tiny.speaking()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    return tmp_path


def replicas():
    """Process ids of the replicas, as Ray names its actors' processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ServeReplica" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_it_answers_scales_and_loses_no_request_when_a_replica_is_killed(folder):
    port = free_port()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment,
    )  # fmt: skip
    said = []
    threading.Thread(target=lambda: said.extend(iter(process.stdout.readline, "")), daemon=True).start()
    try:
        until(lambda: "running\n" in said or process.poll() is not None, 180)
        assert process.poll() is None, "".join(said)[-3000:]
        target = Target(f"http://127.0.0.1:{port}")
        told, answers = measured(target, ["Hello there."], 4, 1, 16, temperature=0)
        assert told["failed"] == 0
        [text] = {answer.text for answer in answers}

        result = []
        load = threading.Thread(
            target=lambda: result.append(
                measured(target, ["Hello there."], 400, 16, 16, temperature=0, retries=8)
            )
        )
        load.start()
        until(lambda: "replicas 2\n" in said, 120)
        time.sleep(1)
        os.kill(replicas()[0], signal.SIGKILL)
        load.join(300)
        told, answers = result[0]
        assert told["failed"] == 0, told["errors"]
        assert {answer.text for answer in answers} == {text}
        until(lambda: len(replicas()) == 2, 120)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "stop", "--force"], capture_output=True, check=False
        )
