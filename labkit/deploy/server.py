"""A classifier of texts behind HTTP, and the load to measure a real server with.

The server is mosec (a front in Rust, workers in Python) in separate processes, on loopback, from `with Server(...)`
until the end of the block. The first worker reads requests singly, so a bad request spoils no batch; the second
computes the waiting requests, up to a batch, without waiting for more. Load is open: requests are sent at moments drawn
beforehand, however busy the server is, and latency counts from these moments. Clients that wait for an answer before
the next request would hide a queue (coordinated omission, Tene 2013).
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
from labkit.deploy import engines, worker
from labkit.deploy.simulation import Times, poisson_arrivals
from labkit.errors import InputError, LabError, check_whole
from labkit.files import child_environment, set_up_with

try:
    from mosec import Worker
    from mosec.errors import DecodingError, ValidationError
except ImportError:
    Worker = object

HOW_TO_INSTALL = set_up_with("serving")
LONGEST = 48  # tokens; what is beyond is cut off
STEP = 8  # tokens: texts are padded to a multiple, since engines prepare kernels for each new shape
CLIENT_S = 5.0  # seconds that a client waits for an answer
CHARACTERS = 10_000  # of the longest text that is not refused
# The process that starts the workers has only imported, so that on Linux a fork saves them to import again.
# On macOS a process may not be forked that has loaded the system's frameworks.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


# --- the server's processes -------------------------------------------------------------------------------------------


class Reader(Worker):
    """Worker from the bytes of a request to token ids; a bad request is answered with a sentence and status 400 or 422.

    A request is JSON, {"text": "..."}.
    """

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
    """Worker from the token ids of a batch to classes, in the engine of LABKIT_ENGINE, or in eager torch.

    Texts are padded to the longest of the batch. An engine meets every shape once before the first request.
    """

    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        folder = os.environ["LABKIT_ENGINE"]
        if not folder:
            self.engine = models.minilm_finetuned()
            return
        self.engine = engines.load(folder)
        for rows in range(1, int(os.environ["LABKIT_MAX_BATCH"]) + 1):
            for length in range(STEP, LONGEST + 1, STEP):
                ones = torch.ones(rows, length, dtype=torch.long)
                self.engine(input_ids=ones, attention_mask=ones)

    @torch.inference_mode()
    def forward(self, data: Any) -> Any:
        is_single = self.max_batch_size == 1  # mosec then hands over a text without a list
        texts = [data] if is_single else data
        ids, mask = _padded(texts)
        result = self.engine(input_ids=ids, attention_mask=mask)
        logits = getattr(result, "logits", result)
        scores, classes = logits.softmax(-1).max(-1)
        answers = []
        for label, score in zip(classes.tolist(), scores.tolist(), strict=True):
            answers.append({"label": REVIEW_CLASSES[label], "score": round(score, 4), "batch": len(texts)})
        return answers[0] if is_single else answers


def _padded(texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask [texts, tokens], padded to a multiple of STEP tokens."""
    rows = [torch.tensor(text) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids = F.pad(ids, (0, -ids.shape[1] % STEP))
    lengths = torch.tensor([[len(text)] for text in texts])
    mask = torch.arange(ids.shape[1]) < lengths
    return ids, mask.long()


def main() -> None:
    """Run the processes of `Server`; mosec reads MOSEC_PORT, MOSEC_CAPACITY and other settings from the environment."""
    import mosec

    server = mosec.Server()
    server.append_worker(Reader, start_method=START_METHOD)
    server.append_worker(
        Classifier,
        max_batch_size=int(os.environ["LABKIT_MAX_BATCH"]),
        max_wait_time=int(os.environ["LABKIT_DELAY_MS"]),
        start_method=START_METHOD,
    )
    server.run()


class Server:
    """A server in a `with` block: `with Server(folder) as server:` serves on `server.url` until the block ends.

    folder: folder of an engine of the fine-tuned MiniLM (`engines.prepare(..., folder=)`) with varying batch and
        length; None: the model in eager torch.
    max_batch: most texts computed together; 1: no batching.
    delay_ms: time that an unfilled batch waits for more texts, from 1 up.
    capacity: most requests in the server; further requests are answered with status 429 at once.
    log: text written by the server.
    The server also stops after an error or Ctrl-C. Raises InputError if mosec is missing, LabError if the server does
    not come up.
    """

    def __init__(
        self, folder: str | Path | None = None, *, max_batch: int = 16, delay_ms: int = 1, capacity: int = 64
    ) -> None:
        if Worker is object:
            raise InputError(f"The server needs mosec, which is not installed: {HOW_TO_INSTALL}.")
        check_whole(max_batch, "max_batch")
        check_whole(delay_ms, "delay_ms")
        check_whole(capacity, "capacity")
        settings = {
            "LABKIT_ENGINE": folder or "",
            "LABKIT_MAX_BATCH": max_batch,
            "LABKIT_DELAY_MS": delay_ms,
            "MOSEC_CAPACITY": capacity,
            "MOSEC_TIMEOUT": 10_000,  # milliseconds
            "OMP_NUM_THREADS": torch.get_num_threads(),
        }
        self._settings = {name: str(value) for name, value in settings.items()}

    def __enter__(self) -> "Server":
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}/inference"
        self._log = tempfile.TemporaryFile()
        self._sockets = tempfile.TemporaryDirectory(prefix="labkit_")
        place = {
            "MOSEC_PORT": str(port),
            "MOSEC_ADDRESS": "127.0.0.1",
            "MOSEC_PATH": f"{self._sockets.name}/mosec",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "labkit.deploy.server"],
            env=child_environment(**self._settings, **place),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C goes to whoever runs the block, and its end stops the server in order
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
            load = open_loop(self.url, [b'{"text": "good"}'], rate=1e3, n=1, timeout_s=10)
            if load.answered:
                return
            time.sleep(0.2)
        lines = self.log.strip().splitlines()
        last = lines[-1] if lines else "it wrote nothing"
        raise LabError(f"The server does not answer; the end of its log: {last[:300]}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --- load -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Load:
    """Outcome of n requests, [n] each in the order of sending.

    seconds: time from the first scheduled moment to the last answer.
    status: HTTP status; 0: no answer in time.
    latency_s: seconds from the scheduled moment to the whole answer, or until the client gave up.
    answers: bodies of the answers.
    """

    seconds: float
    status: Sequence[int]
    latency_s: Times
    answers: Sequence[bytes]

    @property
    def answered(self) -> int:
        """Number of requests with a result."""
        return self.count(200)

    def count(self, status: int) -> int:
        """Count the requests with a status; 429: refused by a full server, 0: lost."""
        return Counter(self.status)[status]

    def percentile(self, q: float) -> float:
        """Return the q-th percentile (0 to 100) of the latencies of the answered requests, in seconds.

        Raises InputError if fewer than ten requests lie beyond the percentile: such a figure is chance (MLPerf's
        LoadGen refuses as well).
        """
        latencies = self.latency_s[np.equal(self.status, 200)]
        beyond = 1 - q / 100  # share of requests
        least = math.ceil(10 / beyond - 1e-9)
        if len(latencies) < least:
            raise InputError(
                f"A p{q:g} needs {least} answered requests, and there are {len(latencies)}: send more, or take a "
                "smaller percentile."
            )
        return float(np.percentile(latencies, q))


def open_loop(
    url: str, bodies: Sequence[bytes], *, rate: float, n: int, seed: int = 0, timeout_s: float = CLIENT_S
) -> Load:
    """Send n requests at Poisson moments, however the server answers.

    bodies: bodies of the requests, taken in turn.
    rate: mean requests per second.
    seed: seed of the random moments.
    timeout_s: seconds that a client waits; the load ends `timeout_s` after the last moment at the latest.
    """
    moments = poisson_arrivals(rate, n, seed)

    async def run() -> Load:
        client = Client(url)
        start = time.perf_counter()

        async def request(i: int) -> Reply:
            await asyncio.sleep(start + moments[i] - time.perf_counter())
            status, answer = await client.post(bodies[i % len(bodies)], timeout_s)
            return status, answer, time.perf_counter() - start

        return await _gather(client, request, n, moments)

    return _in_a_loop(run())


def closed_loop(url: str, bodies: Sequence[bytes], *, clients: int, n: int) -> Load:
    """Send n requests from clients that send again as soon as they have an answer.

    bodies: bodies of the requests, taken in turn. The server's capacity is answered / seconds.
    """

    async def run() -> Load:
        client = Client(url)
        places = asyncio.Semaphore(clients)
        moments = np.zeros(n)
        start = time.perf_counter()

        async def request(i: int) -> Reply:
            async with places:
                moments[i] = time.perf_counter() - start
                status, answer = await client.post(bodies[i % len(bodies)], CLIENT_S)
                return status, answer, time.perf_counter() - start

        return await _gather(client, request, n, moments)

    return _in_a_loop(run())


Reply = tuple[int, bytes, float]  # status, body, and seconds from the start to the whole answer


async def _gather(client: "Client", request: Callable[[int], Awaitable[Reply]], n: int, moments: Times) -> Load:
    """Run n requests together. moments: scheduled, in seconds from the start, [n]."""
    try:
        replies = await asyncio.gather(*map(request, range(n)))
    finally:
        client.close()
    status, answers, ends = zip(*replies, strict=True)
    return Load(max(ends) - moments[0], status, np.array(ends) - moments, answers)


def _in_a_loop(work: Coroutine[Any, Any, Load]) -> Load:
    """Run a coroutine in a thread: a notebook's own thread has a running loop already. No collection pauses it."""
    with worker.objects_set_aside(), ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


# --- MLPerf's judge ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Verdict of MLPerf's LoadGen on a server.

    rate: requests per second.
    valid: True if p99 is within the bound, over enough queries, without a refused query.
    reasons: LoadGen's words for an invalid run.
    p99_s: seconds from the scheduled moment, over `queries`.
    refused: queries without an answer; of HTTP, with another status than 200.
    """

    rate: float
    valid: bool
    reasons: tuple[str, ...]
    p99_s: float
    queries: int
    refused: int


def loadgen(url: str, bodies: Sequence[bytes], *, rate: float, bound_s: float = 0.05, seconds: float = 15.0) -> Verdict:
    """Judge an HTTP server with MLPerf's LoadGen as the client; see `judge`.

    bodies: bodies of the requests.
    """
    client = Client(url)

    async def answer(index: int) -> bool:
        status, _ = await client.post(bodies[index], 30)
        return status == 200

    return judge(answer, len(bodies), rate=rate, bound_s=bound_s, seconds=seconds, end=client.close)


def judge(
    answer: Callable[[int], Awaitable[bool]],
    samples: int,
    *,
    rate: float,
    bound_s: float,
    seconds: float,
    end: Callable[[], None] = lambda: None,
) -> Verdict:
    """Judge a service with MLPerf's LoadGen (Reddi et al. 2020) as the client: scenario Server, Poisson arrivals.

    answer: coroutine function that asks the service for the answer to a sample, and returns False if it was refused.
        All calls run in an event loop of their own, whose other tasks are cancelled at the end.
    samples: number of different samples, 0 to samples - 1.
    rate: mean requests per second.
    bound_s: limit of the p99, in seconds.
    seconds: least time of arrivals; the most is four times as long.
    end: called in the event loop at the end.
    LoadGen knows no refused request: a refused request makes the run invalid here.
    Raises InputError if LoadGen is missing.
    """
    try:
        import mlperf_loadgen as lg
    except ImportError:
        raise InputError(f"The judge is mlcommons-loadgen, which is not installed: {HOW_TO_INSTALL}.") from None
    loop = asyncio.new_event_loop()
    answered: list[bool] = []

    async def respond(sample: Any) -> None:
        answered.append(await answer(sample.index))
        lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0)])

    def issue(queries: Sequence[Any]) -> None:
        for query in queries:
            asyncio.run_coroutine_threadsafe(respond(query), loop)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with worker.objects_set_aside():
        summary = _run_loadgen(lg, issue, samples, _loadgen_settings(lg, rate, bound_s, seconds))
    asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result()
    loop.call_soon_threadsafe(end)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    return _verdict(summary, rate, answered)


async def _cancel_all() -> None:
    """Cancel all other tasks of the running loop, and wait for their ends."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _loadgen_settings(lg: Any, rate: float, bound_s: float, seconds: float) -> Any:
    settings = lg.TestSettings()
    settings.scenario = lg.TestScenario.Server
    settings.mode = lg.TestMode.PerformanceOnly
    settings.server_target_qps = rate
    settings.server_target_latency_ns = int(1e9 * bound_s)
    settings.server_target_latency_percentile = 0.99
    settings.min_query_count = 1
    settings.min_duration_ms = int(1e3 * seconds)
    settings.max_duration_ms = int(4e3 * seconds)
    return settings


def _run_loadgen(lg: Any, issue: Callable[[Sequence[Any]], None], samples: int, settings: Any) -> list[str]:
    """Run LoadGen on `samples` different requests, and return the lines of its summary."""
    log = lg.LogSettings()
    log.log_output = lg.LogOutputSettings()
    with tempfile.TemporaryDirectory() as folder:
        log.log_output.outdir = folder
        sut = lg.ConstructSUT(issue, lambda: None)
        library = lg.ConstructQSL(samples, samples, lambda _: None, lambda _: None)
        lg.StartTestWithLogSettings(sut, library, settings, log)
        lg.DestroyQSL(library)
        lg.DestroySUT(sut)
        return (Path(folder) / "mlperf_log_summary.txt").read_text().splitlines()


def _verdict(summary: Sequence[str], rate: float, answered: Sequence[bool]) -> Verdict:
    """Read a summary: lines "name : value", and remarks that begin with a star."""
    values = {}
    reasons = []
    for line in summary:
        name, _, value = line.partition(" : ")
        values[name.strip()] = value.strip()
        if line.lstrip().startswith("*") and "successful" not in line:
            reasons.append(line.strip(" *.,"))
    refused = answered.count(False)
    is_valid = values["Result is"] == "VALID" and not refused
    p99_s = int(values["99.00 percentile latency (ns)"]) / 1e9
    return Verdict(rate, is_valid, tuple(reasons), p99_s, len(answered), refused)


# --- HTTP -------------------------------------------------------------------------------------------------------------


class Client:
    """HTTP/1.1 client on connections that are used again.

    url: address of the server, "http://host:port/path".
    """

    def __init__(self, url: str) -> None:
        address, self.path = url.removeprefix("http://").split("/", 1)
        self.host, port = address.split(":")
        self.port = int(port)
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Post a body, and return the answer's status and body; (0, b"") without a whole answer in time."""
        try:
            return await asyncio.wait_for(self._post(body), timeout_s)
        except (TimeoutError, OSError, EOFError, ValueError, IndexError):
            return 0, b""

    async def _post(self, body: bytes) -> tuple[int, bytes]:
        if self.idle:
            reader, writer = self.idle.pop()
        else:
            reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            head = f"POST /{self.path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            reply_head = await reader.readuntil(b"\r\n\r\n")
            status_line, *lines = reply_head.decode("latin-1").split("\r\n")
            length = _content_length(lines)
            answer = await reader.readexactly(length)
        except BaseException:
            writer.close()
            raise
        self.idle.append((reader, writer))
        return int(status_line.split()[1]), answer

    def close(self) -> None:
        for _, writer in self.idle:
            writer.close()


def _content_length(lines: Sequence[str]) -> int:
    """Read the length of the body from the lines of a head; 0 if no line says so."""
    for line in lines:
        name, _, value = line.partition(":")
        if name.lower() == "content-length":
            return int(value)
    return 0


if __name__ == "__main__":
    main()
