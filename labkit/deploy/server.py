"""A classifier of texts behind HTTP, and requests that come when they come: a real server under real load.

The server is mosec (a front in Rust, workers in Python) in processes of its own, on loopback, from `with Server(...)`
until the end of the block. One worker reads requests one by one, so that a bad one spoils no batch; the other computes
what waits, up to a batch, without waiting for more. Load is open: requests are sent at moments drawn beforehand,
whatever the server does, and their latency counts from those moments. Clients that wait for an answer before they send
again would hide a queue (coordinated omission, Tene 2013).
"""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from labkit.data import models
from labkit.data.datasets import REVIEW_CLASSES
from labkit.deploy import engines
from labkit.deploy.simulation import Times, poisson_arrivals
from labkit.errors import InputError, LabError, check_whole
from labkit.files import child_environment, set_up_with

try:
    from mosec import Worker
    from mosec.errors import DecodingError, ValidationError
except ImportError:
    Worker = object

INSTALL = set_up_with("serving")
LONGEST = 48  # tokens; what is beyond is cut off
STEP = 8  # tokens: texts are padded to a multiple, since engines prepare kernels for each new shape
CLIENT_S = 5.0  # that a client waits for an answer
CHARACTERS = 10_000  # of a text; a longer one is refused


# --- the server's processes -------------------------------------------------------------------------------------------


class Reader(Worker):
    """Bytes of a request -> token ids; what is no request is answered with a sentence and status 400 or 422."""

    def __init__(self) -> None:
        self.tokenizer = models.tokenizer("minilm")

    def deserialize(self, data: bytes) -> str:
        try:
            body = json.loads(data)
        except ValueError:
            raise DecodingError('the body is no JSON: send {"text": "..."}') from None
        text = body.get("text") if isinstance(body, dict) else None
        if not isinstance(text, str) or not text.strip() or len(text) > CHARACTERS:
            raise ValidationError(f'"text" must be a string of 1 to {CHARACTERS} characters: send {{"text": "..."}}')
        return text

    def forward(self, text: str) -> list[int]:
        return self.tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"]


class Classifier(Worker):
    """Token ids of what waits -> classes, padded to the longest of them, in the engine of LABKIT_ENGINE, or eager.

    An engine meets every shape once before the first request.
    """

    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        folder = os.environ["LABKIT_ENGINE"]
        self.engine = engines.load(folder) if folder else models.minilm_finetuned()
        for rows in range(1, int(os.environ["LABKIT_MAX_BATCH"]) + 1) if folder else ():
            for length in range(STEP, LONGEST + 1, STEP):
                ones = torch.ones(rows, length, dtype=torch.long)
                self.engine(input_ids=ones, attention_mask=ones)

    @torch.inference_mode()
    def forward(self, data: Any) -> Any:
        texts = data if self.max_batch_size > 1 else [data]  # mosec hands over a batch of one without its list
        ids = [torch.tensor(text) for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        padded = F.pad(padded, (0, -padded.shape[1] % STEP))
        mask = torch.arange(padded.shape[1]) < torch.tensor([[len(text)] for text in ids])
        result = self.engine(input_ids=padded, attention_mask=mask.long())
        scores, classes = getattr(result, "logits", result).softmax(-1).max(-1)
        answers = [
            {"label": REVIEW_CLASSES[label], "score": round(score, 4), "batch": len(texts)}
            for label, score in zip(classes.tolist(), scores.tolist(), strict=True)
        ]
        return answers if self.max_batch_size > 1 else answers[0]


def main() -> None:
    """What `Server` starts; mosec itself reads MOSEC_PORT, MOSEC_CAPACITY and others."""
    import mosec

    server = mosec.Server()
    server.append_worker(Reader)
    batch, delay_ms = int(os.environ["LABKIT_MAX_BATCH"]), int(os.environ["LABKIT_DELAY_MS"])
    server.append_worker(Classifier, max_batch_size=batch, max_wait_time=delay_ms)
    server.run()


class Server:
    """`with Server(folder) as server:` serves on `server.url`, and stops at the end of the block, Ctrl-C included.

    folder: of an engine of the fine-tuned MiniLM (`engines.prepare(..., folder=)`) whose batch and length vary; None:
        the model in eager torch. max_batch: texts computed together, at most; 1: no batching. delay_ms: how long a
        batch that is not full waits for more, from 1 up. capacity: requests in the server; more are answered with
        status 429 at once.
    log: what the server wrote, as text. Raises InputError where mosec is missing, LabError if it does not come up.
    """

    def __init__(
        self, folder: str | Path | None = None, *, max_batch: int = 16, delay_ms: int = 1, capacity: int = 64
    ) -> None:
        if Worker is object:
            raise InputError(f"The server needs mosec, which is not installed: {INSTALL}.")
        for value, name in ((max_batch, "max_batch"), (delay_ms, "delay_ms"), (capacity, "capacity")):
            check_whole(value, name)
        settings = {"LABKIT_MAX_BATCH": max_batch, "LABKIT_DELAY_MS": delay_ms, "MOSEC_CAPACITY": capacity}
        settings |= {"LABKIT_ENGINE": folder or "", "OMP_NUM_THREADS": torch.get_num_threads()}
        self._settings = {name: str(value) for name, value in settings.items()}

    def __enter__(self) -> "Server":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}/inference", tempfile.TemporaryFile()
        self._sockets = tempfile.TemporaryDirectory(prefix="labkit_")
        place = {"MOSEC_PORT": str(port), "MOSEC_ADDRESS": "127.0.0.1", "MOSEC_PATH": f"{self._sockets.name}/mosec"}
        environment = child_environment(**self._settings, **place, MOSEC_TIMEOUT="10000")
        command = [sys.executable, "-m", "labkit.deploy.server"]
        # In a group of its own: Ctrl-C goes to whoever runs the block, and its end stops the server in order.
        self._process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._sockets.cleanup()

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _wait_until_it_answers(self, seconds: float = 120) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and self._process.poll() is None:
            if open_loop(self.url, [b'{"text": "good"}'], rate=1e3, n=1, timeout_s=10).answered:
                return
            time.sleep(0.2)
        last = self.log.strip().splitlines()[-1:] or ["it wrote nothing"]
        raise LabError(f"The server does not answer; the end of its log: {last[0][:300]}")


# --- load -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Load:
    """What became of n requests. status: HTTP's, 0 where no answer came in time. latency_s: from the scheduled moment
    to the whole answer, or to giving up. answers: their bodies. All [n], in the order of sending.
    """

    seconds: float  # from the first scheduled moment to the last answer
    status: Sequence[int]
    latency_s: Times
    answers: Sequence[bytes]

    @property
    def answered(self) -> int:
        """Requests with a result."""
        return self.count(200)

    def count(self, status: int) -> int:
        """Requests with this status; 429: shed, 0: lost."""
        return Counter(self.status)[status]

    def percentile(self, q: float) -> float:
        """The q-th percentile (0 to 100) of the latencies of the answered requests, in seconds.

        InputError where fewer than ten requests lie beyond it: such a figure is chance (MLPerf's LoadGen refuses too).
        """
        latencies, least = self.latency_s[np.equal(self.status, 200)], math.ceil(10 / (1 - q / 100) - 1e-9)
        if len(latencies) < least:
            raise InputError(
                f"A p{q:g} needs {least} answered requests, and there are {len(latencies)}: send more, or take a "
                "smaller percentile."
            )
        return float(np.percentile(latencies, q))


def open_loop(
    url: str, bodies: Sequence[bytes], *, rate: float, n: int, seed: int = 0, timeout_s: float = CLIENT_S
) -> Load:
    """Sends n requests, `rate` a second on average at Poisson moments, whatever comes back; see `Load`.

    bodies: taken in turn. It ends at the last moment plus timeout_s at the latest.
    """
    moments = poisson_arrivals(rate, n, seed)

    async def run() -> Load:
        client, start = Client(url), time.perf_counter()

        async def request(i: int) -> tuple[int, bytes, float]:
            await asyncio.sleep(start + moments[i] - time.perf_counter())
            status, answer = await client.post(bodies[i % len(bodies)], timeout_s)
            return status, answer, time.perf_counter() - start

        return await _gather(client, request, n, moments)

    return _in_a_loop(run())


def closed_loop(url: str, bodies: Sequence[bytes], *, clients: int, n: int) -> Load:
    """n requests from clients that send again when they have their answer: answered / seconds is the capacity."""

    async def run() -> Load:
        client, start, places, moments = Client(url), time.perf_counter(), asyncio.Semaphore(clients), np.zeros(n)

        async def request(i: int) -> tuple[int, bytes, float]:
            async with places:
                moments[i] = time.perf_counter() - start
                status, answer = await client.post(bodies[i % len(bodies)], CLIENT_S)
                return status, answer, time.perf_counter() - start

        return await _gather(client, request, n, moments)

    return _in_a_loop(run())


@dataclass(frozen=True)
class Verdict:
    """Of MLPerf's LoadGen on a server. valid: p99 within the bound, enough queries behind it, none refused; reasons:
    its own words where it is not. p99_s: from the scheduled moment, over `queries`, of which `refused` were no 200.
    """

    rate: float
    valid: bool
    reasons: tuple[str, ...]
    p99_s: float
    queries: int
    refused: int


def loadgen(url: str, bodies: Sequence[bytes], *, rate: float, bound_s: float = 0.05, seconds: float = 15.0) -> Verdict:
    """MLPerf's LoadGen (Reddi et al. 2020) as the client, scenario Server: Poisson arrivals, `rate` a second.

    bound_s: that its p99 may take. seconds: of arrivals at the least; four times that at the most. LoadGen knows no
    refused request: one makes the run invalid here. InputError where it is missing.
    """
    try:
        import mlperf_loadgen as lg
    except ImportError:
        raise InputError(f"The judge is mlcommons-loadgen, which is not installed: {INSTALL}.") from None
    loop, statuses, client = asyncio.new_event_loop(), [], Client(url)

    async def answer(sample: Any) -> None:
        statuses.append((await client.post(bodies[sample.index], 30))[0])
        lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0)])

    def issue(samples: Sequence[Any]) -> None:
        for sample in samples:
            asyncio.run_coroutine_threadsafe(answer(sample), loop)

    settings, log = lg.TestSettings(), lg.LogSettings()
    settings.scenario, settings.mode = lg.TestScenario.Server, lg.TestMode.PerformanceOnly
    settings.server_target_qps, settings.server_target_latency_ns = rate, int(1e9 * bound_s)
    settings.server_target_latency_percentile, settings.min_query_count = 0.99, 1
    settings.min_duration_ms, settings.max_duration_ms = int(1e3 * seconds), int(4e3 * seconds)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with tempfile.TemporaryDirectory() as folder:
        log.log_output = lg.LogOutputSettings()
        log.log_output.outdir = folder
        sut = lg.ConstructSUT(issue, lambda: None)
        library = lg.ConstructQSL(len(bodies), len(bodies), lambda _: None, lambda _: None)
        lg.StartTestWithLogSettings(sut, library, settings, log)
        lg.DestroyQSL(library)
        lg.DestroySUT(sut)
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text().splitlines()
    loop.call_soon_threadsafe(client.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    values = {name.strip(): value.strip() for name, _, value in (line.partition(" : ") for line in summary)}
    stars = (line.strip(" *.,") for line in summary if line.lstrip().startswith("*"))
    reasons = tuple(line for line in stars if "successful" not in line)
    refused = sum(status != 200 for status in statuses)
    valid = values["Result is"] == "VALID" and not refused
    p99_s = int(values["99.00 percentile latency (ns)"]) / 1e9
    return Verdict(rate, valid, reasons, p99_s, len(statuses), refused)


async def _gather(
    client: "Client", request: Callable[[int], Awaitable[tuple[int, bytes, float]]], n: int, moments: Times
) -> Load:
    try:
        status, answers, ends = zip(*await asyncio.gather(*map(request, range(n))), strict=True)
    finally:
        client.close()
    return Load(max(ends) - moments[0], status, np.array(ends) - moments, answers)


def _in_a_loop(work: Coroutine[Any, Any, Load]) -> Load:
    """In a thread: a notebook's has a running loop already."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


class Client:
    """HTTP/1.1 on connections that are used again."""

    def __init__(self, url: str) -> None:
        host, self.path = url.removeprefix("http://").split("/", 1)
        self.host, port = host.split(":")
        self.port, self.idle = int(port), []

    async def post(self, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Status and body; (0, b"") where there is no whole answer in time."""
        try:
            return await asyncio.wait_for(self._post(body), timeout_s)
        except (TimeoutError, OSError, EOFError, ValueError, IndexError):
            return 0, b""

    async def _post(self, body: bytes) -> tuple[int, bytes]:
        reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, self.port)
        try:
            head = f"POST /{self.path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            answer = await reader.readexactly(int(headers.get("content-length", 0)))
        except BaseException:
            writer.close()
            raise
        self.idle.append((reader, writer))
        return int(status.split()[1]), answer

    def close(self) -> None:
        for _, writer in self.idle:
            writer.close()


if __name__ == "__main__":
    main()
