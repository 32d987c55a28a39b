"""The playground in a real Chromium, before a real gateway and TorchServe."""

import json
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from gateway_server import GatewayProcess
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tools.serve.server import TorchServe

pytestmark = pytest.mark.e2e

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
)
WAIT_MS = 60_000
PAGE = Path(__file__).resolve().parents[2] / "tools" / "gateway" / "playground"


@pytest.fixture(scope="module")
def gateway(
    shapes_server: TorchServe, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(tmp_path_factory.mktemp("playground") / "gateway", repository, shapes_server)
    yield gateway.start()
    gateway.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"NO BROWSER: {CHROMIUM} is not there (apt-get install chromium), so the playground is not tested")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


def open_page(browser: Browser, gateway: GatewayProcess, **context: object) -> Page:
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(f"{gateway.url}/playground/")
    expect(page.locator("#problem")).to_contain_text("wants an API key")
    page.fill("#key", gateway.key)
    page.press("#key", "Enter")
    expect(page.locator("#model option")).to_have_text("shapes 1.0")
    page.said.clear()
    return page


@pytest.fixture
def page(browser: Browser, gateway: GatewayProcess) -> Iterator[Page]:
    page = open_page(browser, gateway)
    yield page
    page.context.close()


def status(page: Page) -> str:
    return page.inner_text("#status")


def pick(page: Page, name: str = "sample-1.jpg", boxes: int = 7) -> None:
    page.click(f"[data-sample='{name}']")
    expect(page.locator("#status")).to_have_text(f"shapes 1.0: {boxes} boxes.")


def shown(page: Page) -> list[dict]:
    return json.loads(page.text_content("#json"))["detections"]


def ask(gateway: GatewayProcess, picture: bytes, **options: object) -> list[dict]:
    form = {name: str(value) for name, value in options.items()}
    answer = httpx.post(
        f"{gateway.url}/detect", headers=gateway.headers, files={"file": picture}, data=form, timeout=60
    )
    return answer.raise_for_status().json()["detections"]


def test_sample_is_answered_as_the_server_does(page: Page, gateway: GatewayProcess) -> None:
    pick(page)
    assert shown(page) == ask(gateway, (PAGE / "sample-1.jpg").read_bytes())
    expect(page.locator("canvas")).to_have_attribute(
        "aria-label", "Picture with circle, circle, circle, ring, cross, star, cross"
    )
    expect(page.locator("dt")).to_have_text(
        ["decode", "preprocess", "inference", "postprocess", "queues and network", "all"]
    )
    # A corner of the purple circle's box has the colour of its class, Okabe and Ito's orange.
    x, y = shown(page)[1]["box"][:2]
    pixel = page.evaluate(
        "([x, y]) => { const c = document.querySelector('canvas'); const s = c.width / 640;"
        " return [...c.getContext('2d').getImageData(Math.round(x * s), Math.round((y + 60) * s), 1, 1).data] }",
        [x, y],
    )
    assert all(abs(seen - wanted) < 40 for seen, wanted in zip(pixel, (230, 159, 0, 255), strict=True))
    assert page.said == []


def test_the_chosen_picture_is_shown_while_the_server_is_asked(page: Page) -> None:
    held: list[Route] = []
    page.route("**/detect", lambda route: held.append(route))
    page.click("[data-sample='sample-1.jpg']")
    expect(page.locator("figcaption")).to_have_text("sample-1.jpg")
    expect(page.locator("canvas")).to_have_attribute("aria-label", "Picture, not answered yet")
    corner = page.evaluate("() => [...document.querySelector('canvas').getContext('2d').getImageData(3, 3, 1, 1).data]")
    with Image.open(PAGE / "sample-1.jpg") as image:
        assert all(abs(a - b) < 25 for a, b in zip(corner, image.getpixel((3, 3)), strict=False))
    expect(page.locator("#status")).to_have_text("Asking …")
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    expect(page.locator("#status")).to_have_text("shapes 1.0: 7 boxes.")
    expect(page.locator("figcaption")).to_have_text("shapes 1.0")


def test_sliders_act_at_once_as_the_server_would(page: Page, gateway: GatewayProcess) -> None:
    """Of boxes that the picture's border cuts, the server also knows what lies outside; they are not compared."""
    pick(page, "sample-3.jpg", 7)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    seen = {}
    for score, iou in ((0.9, 0.45), (0.02, 0.45), (0.02, 0.85), (0.05, 0.1)):
        page.fill("#score", str(score))
        page.fill("#iou", str(iou))
        seen[score, iou] = shown(page)
        assert status(page) == f"shapes 1.0: {len(shown(page))} boxes."
    page.focus("#score")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#score-shown") == "0.98"
    assert shown(page) == []
    assert asked == []
    assert len({len(boxes) for boxes in seen.values()}) == 4
    picture = (PAGE / "sample-3.jpg").read_bytes()
    for (score, iou), boxes in seen.items():
        assert inside(boxes) == inside(ask(gateway, picture, score_threshold=score, iou_threshold=iou))


def inside(boxes: list[dict]) -> list[dict]:
    return [found for found in boxes if min(found["box"]) > 0 and found["box"][2] < 640 and found["box"][3] < 480]


def test_class_filter_and_curl_line(page: Page, gateway: GatewayProcess) -> None:
    pick(page)
    page.get_by_role("checkbox", name="circle").uncheck()
    expect(page.locator("#status")).to_have_text("shapes 1.0: 4 boxes.")
    assert {found["label"] for found in shown(page)} == {"cross", "ring", "star"}
    line = page.text_content("#curl")
    assert gateway.key not in line
    ran = subprocess.run(
        ["sh", "-c", line], cwd=PAGE, env={"MARINA_KEY": gateway.key, "PATH": "/usr/bin:/bin"}, capture_output=True
    )
    assert json.loads(ran.stdout)["detections"] == shown(page)
    page.click("#none")
    expect(page.locator("#status")).to_have_text("shapes 1.0: 0 boxes.")
    page.click("#all")
    expect(page.locator("#status")).to_have_text("shapes 1.0: 7 boxes.")


def test_file_of_a_camera_lies_upright(page: Page, tmp_path: Path) -> None:
    with Image.open(PAGE / "sample-1.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.rotate(90, expand=True).save(tmp_path / 'it\'s "1".jpg', quality=95, exif=exif)
    with page.expect_file_chooser() as chooser:
        page.click("text=Choose a file")
    chooser.value.set_files(tmp_path / 'it\'s "1".jpg')
    expect(page.locator("#status")).to_have_text("shapes 1.0: 7 boxes.")
    answer = json.loads(page.text_content("#json"))
    assert (answer["width"], answer["height"]) == (640, 480)
    corner = page.evaluate("() => [...document.querySelector('canvas').getContext('2d').getImageData(3, 3, 1, 1).data]")
    with Image.open(PAGE / "sample-1.jpg") as image:
        assert all(abs(a - b) < 25 for a, b in zip(corner, image.getpixel((3, 3)), strict=False))
    assert "'file=@\"it'\\''s \\\"1\\\".jpg\"'" in page.text_content("#curl")


def test_pasted_and_dropped(page: Page) -> None:
    send = """async ([kind, name]) => {
      const blob = await (await fetch(name)).blob();
      const data = new DataTransfer();
      data.items.add(new File([blob], name, { type: "image/jpeg" }));
      const event = kind === "paste" ? new ClipboardEvent(kind, { clipboardData: data, bubbles: true })
        : new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
      document.getElementById("drop").dispatchEvent(event);
    }"""
    page.evaluate(send, ["paste", "sample-2.jpg"])
    expect(page.locator("#status")).to_have_text("shapes 1.0: 5 boxes.")
    page.evaluate(send, ["drop", "sample-1.jpg"])
    expect(page.locator("#status")).to_have_text("shapes 1.0: 7 boxes.")


def test_camera(page: Page) -> None:
    page.click("#camera")
    expect(page.locator("#camera-view")).to_be_visible()
    page.click("#shoot")
    expect(page.locator("#camera-view")).to_be_hidden()
    expect(page.locator("canvas")).to_have_count(1)
    assert page.evaluate("() => document.getElementById('video').srcObject") is None


def test_two_models_beside_each_other(page: Page) -> None:
    page.select_option("#other", label="shapes 1.0")
    page.click("[data-sample='sample-1.jpg']")
    expect(page.locator("#status")).to_have_text("shapes 1.0: 7 boxes. shapes 1.0: 7 boxes.")
    first, second = (page.locator("canvas").nth(index).bounding_box() for index in (0, 1))
    assert first["y"] == second["y"] and first["x"] + first["width"] <= second["x"]


def test_wrong_files(page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"})
    expect(page.locator("#problem")).to_contain_text("notes.txt is no picture (text/plain)")
    assert asked == []
    page.set_input_files("#file", {"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"hello"})
    expect(page.locator("#problem")).to_contain_text("The gateway refused this: the file is none of JPEG")
    picture = (PAGE / "sample-1.jpg").read_bytes()
    page.set_input_files("#file", {"name": "cut.jpg", "mimeType": "image/jpeg", "buffer": picture[:6000]})
    expect(page.locator("#problem")).to_contain_text("The gateway refused this: ")
    expect(page.locator("#problem")).not_to_contain_text("none of JPEG")
    expect(page.locator("#again")).to_be_hidden()
    expect(page.locator("dt")).to_have_count(0)
    expect(page.locator("#copies")).to_be_hidden()
    pick(page)
    expect(page.locator("#problem")).to_be_hidden()


def test_what_the_browser_cannot_show_still_gets_its_boxes(page: Page) -> None:
    body = BytesIO()
    with Image.open(PAGE / "sample-1.jpg") as image:
        image.save(body, "TIFF")
    page.set_input_files("#file", {"name": "x.tif", "mimeType": "image/tiff", "buffer": body.getvalue()})
    expect(page.locator("#status")).to_have_text("shapes 1.0: 7 boxes.")


def test_key_is_refused_then_taken_and_kept_in_the_tab_only(browser: Browser, gateway: GatewayProcess) -> None:
    page = open_page(browser, gateway)
    page.fill("#key", "wrong")
    page.click("text=Use >> nth=0")
    expect(page.locator("#problem")).to_contain_text("The gateway refused this API key")
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", gateway.key)
    page.keyboard.press("Enter")
    expect(page.locator("#problem")).to_be_hidden()
    pick(page)
    stored = page.evaluate("() => [Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
    assert stored == [[gateway.key], [], ""]
    page.context.close()


def test_dead_server_is_told_and_comes_back(page: Page, gateway: GatewayProcess) -> None:
    gateway.relay.cut()
    try:
        page.click("[data-sample='sample-1.jpg']")
        expect(page.locator("#problem")).to_contain_text("The model server does not answer now")
        expect(page.locator("#problem")).to_contain_text("asked again by itself. This page tries again in 2 s.")
    finally:
        gateway.relay.mend()
    expect(page.locator("#status")).to_have_text("shapes 1.0: 7 boxes.")
    expect(page.locator("#problem")).to_be_hidden()


def test_another_picture_ends_the_wait_for_a_busy_server(page: Page) -> None:
    asked: list[Route] = []

    def refuse(route: Route) -> None:
        asked.append(route)
        busy = {"code": 503, "type": "Busy", "message": "no more are taken"}
        route.fulfill(status=503, json=busy, headers={"Retry-After": "1"})

    page.route("**/detect", refuse)
    page.click("[data-sample='sample-1.jpg']")
    while len(asked) < 3:
        page.wait_for_timeout(20)
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"})
    expect(page.locator("#problem")).to_contain_text("notes.txt is no picture")
    seen = len(asked)
    page.wait_for_timeout(1500)
    assert len(asked) == seen
    assert page.is_visible("#problem")


def test_a_gateway_that_does_not_answer_is_asked_again_by_hand(page: Page) -> None:
    page.route("**/detect", lambda route: route.abort())
    page.click("[data-sample='sample-1.jpg']")
    expect(page.locator("#problem")).to_contain_text("The gateway does not answer.")
    page.unroute("**/detect")
    page.click("#again")
    expect(page.locator("#status")).to_have_text("shapes 1.0: 7 boxes.")


def test_all_by_keyboard(page: Page) -> None:
    page.locator("a").focus()
    visited = []
    for _ in range(11):
        page.keyboard.press("Tab")
        focused = page.evaluate("() => [document.activeElement.id, document.activeElement.innerText]")
        visited.append(focused[0] or focused[1] or "sample")
        # The file's own field is hidden; its label shows the focus.
        ring = "() => getComputedStyle(document.querySelector('.button:has(+ :focus)') ?? document.activeElement)"
        assert page.evaluate(f"{ring}.outlineStyle") == "solid"
    assert visited == ["key", "Use", "file", "camera", "sample", "sample", "sample", "score", "iou", "model", "other"]
    page.focus("[data-sample='sample-1.jpg']")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("shapes 1.0: 7 boxes.")
    named = "e => e.labels?.length || e.ariaLabel || e.textContent.trim() || e.querySelector('img')?.alt"
    for element in page.locator("input, select, button:visible, canvas").all():
        assert element.evaluate(named)


@pytest.mark.parametrize(
    "look", [{"color_scheme": "dark"}, {"viewport": {"width": 360, "height": 740}}], ids=["dark", "phone"]
)
def test_dark_and_small(look: dict, browser: Browser, gateway: GatewayProcess, tmp_path: Path) -> None:
    page = open_page(browser, gateway, **look)
    pick(page)
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    paper, ink = page.evaluate("() => ['backgroundColor', 'color'].map((n) => getComputedStyle(document.body)[n])")
    light = "color_scheme" not in look
    assert (brightness(paper) > brightness(ink)) is light
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.context.close()


def brightness(colour: str) -> int:
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))


def test_nothing_from_elsewhere(page: Page, gateway: GatewayProcess) -> None:
    answer = httpx.get(f"{gateway.url}/playground", follow_redirects=True)
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    pick(page)
    assert asked and all(url.startswith((gateway.url, "data:")) for url in asked)
    assert httpx.get(f"{gateway.url}/playground/..%2fpage.py").status_code == 404
    assert httpx.get(f"{gateway.url}/playground/page.py").status_code == 404
