"""A headless Chromium driven over its DevTools protocol: opens pages, runs scripts in them, notes requests and errors.

One websocket and a dozen lines of protocol stand in for a driver package of a hundred megabytes.
"""

import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `requests` and `errors` gather what the pages asked for and complained about since they were cleared."""

    def __init__(self, folder: Path, program: str) -> None:
        command = [
            program, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-first-run",
            "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
        ]  # fmt: skip
        if os.geteuid() == 0:
            command.append("--no-sandbox")
        self.process = subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self.port = self._port(folder / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://localhost:{self.port}/json/list") as answer:
                tab = next(one for one in json.load(answer) if one["type"] == "page")
            trusted = {"suppress_origin": True, "skip_utf8_validation": True}  # it would check each byte in Python
            self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=30, **trusted)
        except BaseException:
            self.close()
            raise
        self.numbers, self.events = itertools.count(1), []
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _port(self, file: Path) -> int:
        until = time.monotonic() + 30
        while not (file.exists() and file.read_text()):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("Chromium did not start")
            time.sleep(0.05)
        return int(file.read_text().split()[0])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv())).get("id") != number:
            self._note(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        name, what = message["method"], message["params"]
        self.events.append(name)
        if name == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.errors.append(what["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif name == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.errors.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
        elif name == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in what["args"]))

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url: str) -> None:
        """Load a page and wait until it and its scripts are done."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self.events:
            self._note(json.loads(self.socket.recv()))
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    def run(self, script: str) -> Any:
        """The value of a script's last expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def nameless(self) -> list[str]:
        """Buttons and links that a screen reader could only call "button" or "link"."""
        page = self.call("DOM.getDocument", depth=0)["root"]["nodeId"]
        nameless = []
        for role in ("button", "link"):
            nodes = self.call("Accessibility.queryAXTree", nodeId=page, role=role)["nodes"]
            names = [node.get("name", {}).get("value", "") for node in nodes if not node["ignored"]]
            nameless += [role for name in names if not name.strip()]
        return nameless

    def close(self) -> None:
        if hasattr(self, "socket"):
            self.socket.close()
        self.process.terminate()
        self.process.wait(10)
