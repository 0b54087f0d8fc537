"""Chromium without a window, driven through its debugging protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request

import websocket

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
PATH = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    "One page. `call` a method of the protocol, or have an expression `value`d in the page."

    def __init__(self, folder, size=(1200, 1150), wait=60):
        flags = '--headless=new', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0'
        more = f'--user-data-dir={folder}', f'--window-size={size[0]},{size[1]}', 'about:blank'
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(
            [PATH, *flags, '--remote-allow-origins=*', '--force-color-profile=srgb', *more], **quiet
        )
        self.ids, self.wait = itertools.count(1), wait
        port = self.until(lambda: self._port(folder))
        pages = self.until(lambda: self._pages(port))
        self.socket = websocket.create_connection(
            pages[0]['webSocketDebuggerUrl'], timeout=wait, suppress_origin=True
        )

    def _port(self, folder):
        file = folder / 'DevToolsActivePort'
        lines = file.read_text().split() if file.exists() else ()
        return lines[0] if len(lines) > 1 else None

    def _pages(self, port):
        with urllib.request.urlopen(f'http://127.0.0.1:{port}/json/list', timeout=10) as answer:
            return [page for page in json.load(answer) if page['type'] == 'page']

    def until(self, condition):
        "The first true value of a condition; TimeoutError after `wait` seconds."
        end = time.monotonic() + self.wait
        while not (found := condition()):
            if time.monotonic() > end:
                raise TimeoutError(f'nothing after {self.wait} s')
            time.sleep(0.2)
        return found

    def call(self, method, **params):
        at = next(self.ids)
        self.socket.send(json.dumps(dict(id=at, method=method, params=params)))
        while (message := json.loads(self.socket.recv())).get('id') != at:
            pass
        assert 'error' not in message, message
        return message['result']

    def value(self, expression):
        found = self.call('Runtime.evaluate', expression=expression, returnByValue=True)
        assert 'exceptionDetails' not in found, found['exceptionDetails']
        return found['result'].get('value')

    def open(self, url, ready='true'):
        "Open an address and wait until a condition holds in the page."
        self.call('Page.navigate', url=url)
        self.until(lambda: self.value(f'location.href !== "about:blank" && ({ready})'))

    def press(self, key):
        for kind in 'keyDown', 'keyUp':
            self.call(
                'Input.dispatchKeyEvent',
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=CODES[key],
            )

    def picture(self):
        "A screenshot of the whole page, PNG."
        shot = self.call('Page.captureScreenshot', captureBeyondViewport=True)
        return base64.b64decode(shot['data'])

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


CODES = dict(ArrowRight=39, ArrowLeft=37, Tab=9, End=35, Home=36)
