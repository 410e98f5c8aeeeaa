"""The page in a browser, opened from the disk: it draws itself, its controls work, nothing is fetched."""

import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from dmd_ds.report.page import write_page
from tests.report.made import PROMPTS, make_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed")


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One run's page and a comparison."""
    folder = tmp_path_factory.mktemp("page")
    run, other = make_run(folder / "run"), make_run(folder / "other", looks=(4,), seed=3)
    write_page([run], folder / "run.html")
    write_page([run, other], folder / "both.html")
    return folder


def open_page(browser, file, width: int = 1280) -> None:
    """Opens it; an AssertionError shows what the console said."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    )
    browser.get(file.as_uri())
    WebDriverWait(browser, 20).until(lambda page: page.find_elements(By.CSS_SELECTOR, "#recipe pre"))
    assert browser.get_log("browser") == []


def sources(browser, column: int) -> list[str]:
    """Of the videos in a column, by row."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.cells')].map((row) => row.children[arguments[0]].querySelector('video').src)", column
    )


def slide(browser, place: int) -> str:
    return browser.execute_script(
        "const s = document.getElementById('slider'); s.value = arguments[0]; s.dispatchEvent(new Event('input'));"
        "return document.getElementById('step').textContent", place
    )  # fmt: skip


def test_the_page_draws_itself_from_the_disk_and_the_slider_changes_the_students_videos(browser, pages):
    open_page(browser, pages / "run.html")
    titles = [title.text for title in browser.find_elements(By.CSS_SELECTOR, "h2")]
    assert titles == ["Summary", "Samples", "Curves", "Memory", "Warnings", "Machine", "Recipe"]
    assert browser.find_elements(By.CSS_SELECTOR, "svg .curve")
    seen = []
    for place, step in enumerate(("step 2", "step 4", "step 6")):
        assert slide(browser, place) == step
        seen.append(sources(browser, 2))
    assert len({video for videos in seen for video in videos}) == 3 * len(PROMPTS)
    assert slide(browser, 0) == "step 2" and sources(browser, 2) == seen[0]
    teacher = sources(browser, 0)
    assert slide(browser, 2) and sources(browser, 0) == teacher
    browser.find_element(By.XPATH, "//button[text()='Trained weights']").click()
    assert not set(sources(browser, 2)) & {video for videos in seen for video in videos}
    assert browser.get_log("browser") == []


def test_the_browser_plays_the_videos(browser, pages):
    open_page(browser, pages / "run.html")
    script = "return [...document.querySelectorAll('video')].map((v) => [v.videoWidth, v.error && v.error.message])"
    WebDriverWait(browser, 20).until(lambda page: all(width for width, _ in page.execute_script(script)))
    assert browser.execute_script(script) == [[32, None]] * 3 * len(PROMPTS)


def test_text_of_a_run_stays_text(browser, pages):
    open_page(browser, pages / "run.html")
    assert [row.text for row in browser.find_elements(By.CSS_SELECTOR, ".row h3")] == PROMPTS
    assert browser.execute_script("return window.broken === undefined")


def test_dragging_over_a_chart_zooms_all_of_them_and_pointing_says_the_number(browser, pages):
    open_page(browser, pages / "run.html")
    chart = browser.find_element(By.CSS_SELECTOR, ".chart svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    ActionChains(browser).move_to_element(chart).perform()
    assert "step 3" in browser.find_element(By.CSS_SELECTOR, ".tip:not([hidden])").text
    ActionChains(browser).move_to_element(chart).click_and_hold().move_by_offset(50, 0).release().perform()
    assert browser.execute_script("return view.steps[0] > 2 && view.steps[1] < 6")
    browser.find_element(By.XPATH, "//button[text()='All steps']").click()
    assert browser.execute_script("return view.steps") == [1, 6]


@pytest.mark.parametrize("page", ["run.html", "both.html"])
def test_nothing_is_wider_than_a_phone(browser, pages, page):
    open_page(browser, pages / page, width=390)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390


def test_of_several_runs_each_has_a_column_at_its_newest_look(browser, pages):
    open_page(browser, pages / "both.html")
    assert slide(browser, 2) == "step 6"
    captions = [caption.text for caption in browser.find_elements(By.CSS_SELECTOR, ".row:first-child figcaption")]
    assert captions == ["teacher", "undistilled", "run, step 6", "other, step 4"]
    assert len(set(sources(browser, 2) + sources(browser, 3))) == 2 * len(PROMPTS)
