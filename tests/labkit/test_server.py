"""The server under load: answers are the model's, nothing is lost below capacity, what is too much is refused."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from refusals import check_refusal

from labkit.data import datasets, fetch, models
from labkit.deploy import engines, server
from labkit.files import ROOT

mosec = pytest.mark.skipif(server.Worker is object, reason="needs mosec")
minilm = pytest.mark.skipif(fetch.asset("minilm").state != "ready", reason="needs the fetched MiniLM")


class Pretender(threading.Thread):
    """An HTTP server on loopback that answers one request at a time after `service_s`, and a few not at all."""

    def __init__(self, service_s: float, dead: int = 0) -> None:
        super().__init__(daemon=True)
        self.service_s, self.dead, self.started = service_s, dead, threading.Event()
        self.start()
        self.started.wait()

    def run(self) -> None:
        asyncio.run(self.serve())

    async def serve(self) -> None:
        turn = asyncio.Lock()

        async def answer(reader, writer) -> None:
            while True:
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except asyncio.IncompleteReadError:
                    return
                body = await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))
                async with turn:
                    if self.dead > 0:
                        self.dead -= 1
                        writer.close()
                        return
                    await asyncio.sleep(self.service_s)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

        listening = await asyncio.start_server(answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/x"
        self.started.set()
        await listening.serve_forever()


def test_open_load_counts_from_the_scheduled_moment_and_sees_the_queue():
    """100 requests in about 0.1 s, 10 ms each, one at a time: the last waits for all before it, about 1 s."""
    load = server.open_loop(Pretender(0.01).url, [b"a", b"bb"], rate=1000, n=100)
    assert load.answered == 100 and [load.answers[i] for i in (0, 1, 2)] == [b"a", b"bb", b"a"]
    assert load.latency_s.max() > 0.7 and load.percentile(50) > 0.3
    closed = server.closed_loop(Pretender(0.01).url, [b"a"], clients=2, n=20)
    assert closed.answered == 20 and closed.latency_s.max() < 0.3, "clients that wait see no queue"
    assert 20 / closed.seconds < 105


def test_a_lost_request_is_counted_and_the_run_ends():
    load = server.open_loop(Pretender(0.001, dead=3).url, [b"a"], rate=500, n=20)
    assert (load.answered, load.count(0)) == (17, 3)
    start = time.perf_counter()
    slow = server.open_loop(Pretender(30).url, [b"a"], rate=500, n=5, timeout_s=0.2)
    assert slow.count(0) == 5 and time.perf_counter() - start < 5


def test_a_percentile_wants_ten_requests_beyond_it():
    times = np.linspace(0.001, 1, 1000)
    load = server.Load(1.0, [200] * 1000, times, [b""] * 1000)
    assert load.percentile(99) == pytest.approx(0.99, abs=1e-3)
    one_refused = server.Load(1.0, [200] * 999 + [429], times, [b""] * 1000)
    check_refusal("A p99 needs 1000 answered requests, and there are 999", lambda: one_refused.percentile(99))


def test_without_mosec_it_says_what_brings_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "Worker", object)
    check_refusal("needs mosec, which is not installed: ./lab setup --with serving", server.Server)


def test_loadgen_judges_what_it_was_told():
    """At 200 a second 2 ms each are far within half a second; 8 ms each are more than it can do."""
    pytest.importorskip("mlperf_loadgen")
    quick = server.loadgen(Pretender(0.002).url, [b"a", b"bb"], rate=200, bound_s=0.5, seconds=3.5)
    assert quick.valid and not quick.reasons and quick.refused == 0
    assert quick.queries > 500 and 0.002 < quick.p99_s < 0.5
    slow = server.loadgen(Pretender(0.008).url, [b"a"], rate=200, seconds=1)
    assert not slow.valid and slow.p99_s > 0.05 and "Reduce target QPS to improve latency" in slow.reasons
    few = server.loadgen(Pretender(0.002).url, [b"a"], rate=50, bound_s=0.5, seconds=1)
    assert not few.valid and few.p99_s < 0.5, "some fifty queries say nothing of a p99"
    dead = server.loadgen(Pretender(0.002, dead=1).url, [b"a"], rate=200, bound_s=0.5, seconds=3.5)
    assert not dead.valid and dead.refused == 1


def test_loadgen_judges_a_service_of_this_process():
    pytest.importorskip("mlperf_loadgen")
    asked = []

    async def answer(sample):
        asked.append(sample)
        await asyncio.sleep(0.001)
        return sample != 1 or len(asked) < 100

    refusing = server.judge(answer, 3, rate=400, bound_s=0.5, seconds=1.5)
    assert not refusing.valid and refusing.refused > 0 and set(asked) == {0, 1, 2}
    asked.clear()
    assert server.judge(answer, 3, rate=400, bound_s=0.5, seconds=0.2).refused == 0


@pytest.fixture(scope="module")
def engine_folder(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("engine")
    example = next(iter(models.review_batches("test", 8, batch_size=8)))
    sizes = {0: (1, 16), 1: (2, server.LONGEST)}
    engines.prepare("onnxruntime-dynamic", models.minilm_finetuned(), example, dynamic=sizes, folder=folder)
    return folder


def bodies(n: int) -> list[bytes]:
    return [json.dumps({"text": text}).encode() for text in datasets.reviews("test", n).texts]


@mosec
@minilm
@pytest.mark.slow
def test_answers_are_the_model_s_bad_requests_are_told_and_too_much_is_refused(engine_folder):
    texts = bodies(64)
    with server.Server(engine_folder, max_batch=8, capacity=16) as running:
        load = server.closed_loop(running.url, texts, clients=8, n=64)
        assert load.answered == 64
        answers = [json.loads(answer) for answer in load.answers]
        assert max(answer["batch"] for answer in answers) > 1
        engine, tokenize = engines.load(engine_folder), models.tokenizer("minilm")
        for text, answer in zip(texts, answers, strict=True):
            options = {"truncation": True, "max_length": server.LONGEST, "return_tensors": "pt"}
            encoded = tokenize(json.loads(text)["text"], **options)
            scores = engine(encoded["input_ids"], encoded["attention_mask"]).softmax(-1)
            if abs(float(scores[0, 0]) - 0.5) > 0.2:  # int8 with ranges of the batch: near the border a class may turn
                assert answer["label"] == datasets.REVIEW_CLASSES[int(scores.argmax())]
        bad = server.open_loop(running.url, [b"no json", b'{"text": 3}', b"[]", b'{"text": ""}'], rate=100, n=4)
        assert list(bad.status) == [400, 422, 422, 422]
        assert b'send {"text": "..."}' in bad.answers[0] and b"1 to 10000 characters" in bad.answers[1]
        mixed = server.open_loop(running.url, [texts[0], b"no json"], rate=100, n=40)
        assert mixed.answered == mixed.count(400) == 20, "a bad request spoils no batch"
        flood = server.open_loop(running.url, texts, rate=5000, n=400)
        assert flood.count(429) > 0 and flood.answered >= 16 and flood.answered + flood.count(429) == 400
        assert server.open_loop(running.url, texts, rate=50, n=10).answered == 10, "and it goes on"
    assert server.open_loop(running.url, texts, rate=50, n=1).count(0) == 1


def alive(session: int) -> list[str]:
    """The commands of a session's processes, but for those that ended and whose parent has not looked."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(" ".join(process.cmdline()))
    return processes


@mosec
@minilm
@pytest.mark.slow
def test_ctrl_c_stops_the_server_and_leaves_no_process(engine_folder):
    code = (
        "import signal, sys, time; from labkit.deploy import server\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's job in the background ignores
        "with server.Server(sys.argv[1], max_batch=1) as running:\n"
        "    print(running._process.pid, flush=True)\n"
        "    time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(engine_folder)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    group = int(child.stdout.readline())
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=40)
    assert errors.strip().endswith("KeyboardInterrupt")
    time.sleep(1)
    assert not alive(group)


def test_texts_are_padded_to_a_step_beyond_the_longest_of_their_batch():
    seen = {}

    def engine(input_ids, attention_mask):
        seen.update(ids=input_ids, mask=attention_mask)
        return torch.tensor([[0.0, 2.0], [3.0, 0.0]])

    worker = object.__new__(server.Classifier)
    worker.engine, worker.max_batch_size = engine, 8
    answers = worker.forward([[1, 2, 3], [4]])
    rest = [0] * (server.STEP - 3)
    assert seen["ids"].tolist() == [[1, 2, 3, *rest], [4, 0, 0, *rest]]
    assert seen["mask"].tolist() == [[1, 1, 1, *rest], [1, 0, 0, *rest]]
    assert [(answer["label"], answer["batch"]) for answer in answers] == [("positive", 2), ("negative", 2)]
