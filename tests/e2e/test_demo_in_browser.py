"""The page in a real browser, on the embedded base: generate, compare, teach, and a file that is none."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from demo.processes import REPOSITORY
from tests.whole_loras import write_run_lora

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
TIMEOUT = 300
"""Of each wait: a compilation beside other work."""
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1366,900"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with one run on the embedded base, whose LoRA is large enough to be seen."""
    runs = tmp_path_factory.mktemp("page") / "runs"
    run = runs / "dog"
    run.mkdir(parents=True)
    base = REPOSITORY / "checkpoints" / "tiny-shapes"
    (run / "config.yaml").write_text(
        f"pretrained_model_name_or_path: {base}\ninstance_data_dir: x\ninstance_prompt: a photo of a red star\n"
    )
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    normal = np.random.default_rng(0).standard_normal
    from dreambooth_ms.formats.files.open import read_tensors

    weight = read_tensors(base / "unet" / "diffusion_pytorch_model.safetensors")[0][f"{layer}.weight"]
    factors = {layer: (normal((2, weight.shape[1]), np.float32), normal((weight.shape[0], 2), np.float32))}
    write_run_lora(run, {"unet": factors}, 3)
    return runs


@pytest.fixture(scope="module")
def address(runs):
    """A server of the page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["streamlit", "run", "demo/sampling.py", "--server.port", str(port), "--server.headless", "true"]
    server = subprocess.Popen(
        [sys.executable, "-m", *command, "--", "--runs", str(runs)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{address}/_stcore/health"), "the server")
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, driven by selenium."""
    missing = [path for path in (CHROMIUM, DRIVER) if not shutil.which(path)]
    if missing:
        reason = f"{' and '.join(missing)} missing; install with apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=2).status == 200
    except OSError:
        return False


def wait_for(condition, what, seconds=TIMEOUT):
    """The condition's value once it is true. Elements that the page replaces meanwhile are looked for again."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while True:
        try:
            value = condition()
        except (WebDriverException, AttributeError):
            value = None
        if value:
            return value
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


class Page:
    """What a person does on it."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)

    def wait_for(self, condition, what):
        try:
            return wait_for(condition, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; the page says:\n{self.texts()}") from None

    def texts(self):
        return self.browser.find_element("tag name", "body").text

    def has(self, text):
        self.wait_for(lambda: text in self.texts(), text)

    def button(self, label):
        def find():
            buttons = self.browser.find_elements("css selector", ".stMain button, .stMain label[data-baseweb=radio]")
            named = [one for one in buttons if label in one.text.split("\n")]
            return named[-1] if named and named[-1].is_enabled() and named[-1].is_displayed() else None

        return self.wait_for(find, f"the button {label}")

    def press(self, label):
        self.wait_for(lambda: self.button(label).click() or True, f"the button {label}")

    def go_to(self, title, where="header"):
        def find():
            links = self.browser.find_elements("css selector", f"{where} a")
            return next((link for link in links if title in link.text.split("\n")), None)

        self.wait_for(lambda: find().click() or True, f"the page {title}")

    @contextmanager
    def on_a_phone(self):
        size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield
        self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def write(self, label, text):
        from selenium.webdriver.common.keys import Keys

        def field():
            return self.browser.find_element("css selector", f"[aria-label='{label}']")

        def type_it():
            field().send_keys(Keys.CONTROL, "a")
            field().send_keys(Keys.BACKSPACE, text, Keys.TAB)
            return field().get_attribute("value") == text

        self.wait_for(type_it, label)

    def switch(self, label):
        self.wait_for(lambda: self.toggle(label).find_element("xpath", "./ancestor::label").click() or True, label)

    def toggle(self, label):
        return self.browser.find_element("css selector", f"input[aria-label='{label}']")

    def upload(self, path):
        field = ".stMain input[type=file]"
        self.wait_for(lambda: self.browser.find_element("css selector", field), "the upload").send_keys(str(path))

    def pictures(self):
        """The pixels' digests of all pictures on the page."""
        return [one.get_attribute("src") for one in self.browser.find_elements("css selector", ".stMain img")]


def test_generate_compare_teach_and_generate_with_the_result(browser, address, runs, tmp_path):
    page = Page(browser, address)
    page.has("runs/dog")
    page.write("Steps", "8")
    page.press("Generate")
    page.button("Cancel")
    browser.refresh()
    page.button("Cancel")
    page.button("PNG")
    page.has("Without it, same seed")
    with_it, without = page.wait_for(lambda: len(page.pictures()) == 2 and page.pictures(), "two pictures")
    assert with_it != without

    browser.refresh()
    page.wait_for(lambda: page.pictures() == [with_it, without], "the pictures from before")
    with page.on_a_phone():
        page.go_to("Teach", ".stMain")
        page.has("Photographs of the subject")
    page.go_to("Generate")
    page.button("PNG")

    page.go_to("Teach")
    page.has("Photographs of the subject")
    (tmp_path / "subject.png").write_bytes(b"MZ not a picture")
    page.press("Upload")
    page.upload(tmp_path / "subject.png")
    page.has("subject.png: not a picture of a known format")
    assert "Traceback" not in page.texts()

    page.press("From a folder")
    page.has("5 photographs")
    page.switch("Keep the class as it is")
    page.write("Steps", "3")
    page.write("Generate during training", "")
    page.write("Name", "taught")
    page.press("Teach")
    page.button("Stop")
    page.press("Generate with it")
    page.has("runs/taught")
    assert (runs / "taught" / "pytorch_lora_weights.safetensors").is_file()
    assert Path(runs / "taught" / "history.jsonl").read_text().count("\n") == 3
