"""The demo as a service: its API, many visitors at a time, and what it refuses. The server runs in its own process."""

from __future__ import annotations

import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from demo_server import SAMPLES, serving
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from gradio_client.utils import Status
from PIL import Image

from lvlm_fix import LVLM
from lvlm_fix.demo import app, bounds
from lvlm_fix.demo.picture_input import NO_UPLOAD
from lvlm_fix.methods import parse

QUESTION = "Describe the image."
SETTINGS = ("none", "vtc_cls(keep=0.5)", "damro(alpha=2.0)", "zipvl(evict=True)", "var")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("demo")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url, verbose=False)


@pytest.fixture(scope="module")
def alone():
    """Answers of the library, without a server: (sample, methods) -> text."""
    lvlm = LVLM()
    known: dict[tuple[str, str], str] = {}

    def ask(sample: str, fix: str) -> str:
        if (sample, fix) not in known:
            known[sample, fix] = lvlm.ask(SAMPLES / f"{sample}.png", QUESTION, parse(fix)).text
        return known[sample, fix]

    return ask


def kitchen():
    return handle_file(str(SAMPLES / "kitchen.png"))


def refusal(client: Client, *arguments, api_name: str = "/answer") -> str:
    with pytest.raises(AppError) as refused:
        client.predict(*arguments, api_name=api_name)
    return str(refused.value)


def until_queued(job) -> None:
    """Wait until the server has a job; on a busy machine its picture may take a while to arrive."""
    while job.status().code in (Status.STARTING, Status.JOINING_QUEUE, Status.SENDING_DATA):
        time.sleep(0.02)


def test_the_server_is_up_in_seconds(server):
    assert server.seconds < 120  # a few seconds on a machine of one's own; CI's is shared


@pytest.mark.parametrize("fix", SETTINGS[:3])
def test_answer_is_that_of_the_library(client, alone, fix):
    said = client.predict(kitchen(), QUESTION, fix, 64, api_name="/answer")

    assert said["text"] == alone("kitchen", fix)
    assert said["tokens"] > 5 and said["seconds"] > 0 and said["peak_memory_bytes"] > 10**7
    assert said["tokens_per_second"] == pytest.approx(said["tokens"] / said["seconds"])
    assert list(said["report"]) == [one.name for one in parse(fix)]


def test_compare_marks_what_is_not_in_the_picture(client, alone):
    safari = handle_file(str(SAMPLES / "safari.png"))

    both = client.predict(safari, QUESTION, "vtc_cls(keep=0.5)", 64, api_name="/compare")

    assert both["plain"]["text"] == alone("safari", "none")
    assert both["fixed"]["text"] == alone("safari", "vtc_cls(keep=0.5)")
    (mention,) = both["plain"]["hallucinated"]
    assert mention["object"] == "elephant"
    assert both["plain"]["text"][mention["start"] : mention["end"]] == "elephant"


def test_the_truth_of_a_strange_picture_is_not_claimed(client, tmp_path):
    Image.new("RGB", (80, 80), "teal").save(tmp_path / "teal.png")
    said = client.predict(handle_file(str(tmp_path / "teal.png")), QUESTION, "none", 8, api_name="/answer")
    assert said["hallucinated"] is None


def test_probe_asks_about_every_category_and_sorts_by_disagreement(client):
    rows = client.predict(kitchen(), "damro", api_name="/probe")

    assert len(rows) == len({row["category"] for row in rows}) == 66
    gaps = [abs(row["plain"] - row["fixed"]) for row in rows]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0
    assert all(0 <= row[which] <= 1 for row in rows for which in ("plain", "fixed"))
    present = {row["category"] for row in rows if row["present"]}
    assert present == {"knife", "apple", "wine glass", "bowl"}
    told = {row["category"]: row["plain"] for row in rows}
    assert min(told[name] for name in present) > 0.5 > told["elephant"]


def test_concurrent_visitors_get_exactly_what_each_asked_for(server, alone):
    """Plain and fixed, mixed: were methods attached for one seen by another, some text would differ."""
    asked = [(sample, fix) for sample in ("kitchen", "safari", "street") for fix in SETTINGS]

    def visit(job):
        sample, fix = job
        visitor = Client(server.url, verbose=False)
        return visitor.predict(
            handle_file(str(SAMPLES / f"{sample}.png")), QUESTION, fix, 64, api_name="/answer"
        )

    with ThreadPoolExecutor(8) as visitors:
        said = list(visitors.map(visit, asked))

    assert [one["text"] for one in said] == [alone(*job) for job in asked]
    assert [list(one["report"]) for one in said] == [[m.name for m in parse(fix)] for _, fix in asked]
    assert len({alone("safari", fix) for fix in SETTINGS}) > 1  # or mixing could not be seen


def test_a_cancelled_request_frees_the_model_and_the_next_visitor_is_served(server, client, alone):
    began = time.monotonic()
    first = client.predict(kitchen(), QUESTION, "none", 64, api_name="/answer")
    once = time.monotonic() - began

    visitors = [Client(server.url, verbose=False) for _ in range(6)]
    jobs = [one.submit(kitchen(), "damro", api_name="/probe") for one in visitors]
    for job in jobs:
        until_queued(job)
    for job in jobs:
        job.cancel()
    began = time.monotonic()
    said = client.predict(kitchen(), QUESTION, "none", 64, api_name="/answer")
    waited = time.monotonic() - began

    assert said["text"] == first["text"] == alone("kitchen", "none")
    # six probes of 132 questions would take many times one answer
    assert waited < 8 * once + 3


@pytest.mark.parametrize(
    ("question", "fix", "tokens", "told"),
    [
        ("", "none", 8, "the question is empty"),
        ("x" * (bounds.LONGEST_QUESTION + 1), "none", 8, "501 characters, and the limit is 500"),
        ("What is <image> here?", "none", 8, "the question holds <image>"),
        (QUESTION, "magic", 8, "unknown method 'magic': the methods are"),
        (QUESTION, "damro(alpha=-1)", 8, "alpha must be at least 0"),
        (QUESTION, "vtc_cls(keep=__import__('os'))", 8, "cannot read methods"),
        (QUESTION, "vtc_cls," * 60, 8, "the limit is 300"),
        (QUESTION, "vtc_cls,vtc_cls", 8, "given more than once"),
        (QUESTION, "none", 0, "a whole number from 1 to 256"),
        (QUESTION, "none", 10**9, "a whole number from 1 to 256"),
        (QUESTION, "none", 7.5, "a whole number from 1 to 256"),
        (QUESTION, "none", None, "a whole number from 1 to 256"),
    ],
)
def test_what_is_out_of_bounds_is_refused_in_one_sentence(client, question, fix, tokens, told):
    message = refusal(client, kitchen(), question, fix, tokens)
    assert told in message
    assert "\n" not in message and "Traceback" not in message and str(SAMPLES) not in message


def test_a_missing_picture_is_refused(client):
    assert "there is no picture" in refusal(client, None, QUESTION, "none", 8)


@pytest.mark.parametrize("kind", ["text", "cut", "empty"])
def test_a_file_that_is_no_picture_is_refused_without_its_path(client, tmp_path, kind):
    whole = (SAMPLES / "kitchen.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(
        {"text": b"no picture", "cut": whole[: len(whole) // 2], "empty": b""}[kind]
    )

    message = refusal(client, handle_file(str(tmp_path / "bad.png")), QUESTION, "none", 8)

    assert "cannot read" in message
    assert "/" not in message and "\n" not in message


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(client, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # 50 KB that decode to 1.2 GB
    message = refusal(client, handle_file(str(tmp_path / "bomb.png")), QUESTION, "none", 8)
    assert "pixels" in message and "24,000,000" in message


def test_a_file_of_too_many_bytes_is_refused(server, client, tmp_path):
    shutil.copy(SAMPLES / "kitchen.png", tmp_path / "heavy.png")
    with (tmp_path / "heavy.png").open("ab") as file:
        file.write(b"\0" * (bounds.MOST_BYTES + 1))
    with pytest.raises(Exception, match=r"(?i)size|exceed|limit|413"):
        client.predict(handle_file(str(tmp_path / "heavy.png")), QUESTION, "none", 8, api_name="/answer")


FILE = {"_type": "gradio.FileData"}


@pytest.mark.parametrize(
    "meta",
    [{"meta": FILE}, {}, {"meta": {}}, {"meta": {"_type": "x"}}],
    ids=["file", "missing", "empty", "other"],
)
@pytest.mark.parametrize("place", ["private", "sample", "absent", "zero", "folder", "climbing"])
def test_a_path_on_the_server_is_not_read_as_a_picture(server, tmp_path, meta, place):
    """The body of a request may name any path; only what was uploaded counts, and nothing is told of the others."""
    shutil.copy(SAMPLES / "kitchen.png", tmp_path / "mine.png")
    path = {
        "private": tmp_path / "mine.png",
        "sample": SAMPLES / "kitchen.png",
        "absent": tmp_path / "absent.png",
        "zero": "/dev/zero",  # never ends
        "folder": tmp_path,
        "climbing": "../../../../dev/zero",
    }[place]

    told = server.answered("answer", {"path": str(path), **meta}, QUESTION, "none", 8)

    assert b"event: error" in told and b"event: complete" not in told
    if meta.get("meta") != FILE:  # Gradio itself refuses a path that is marked as a file's
        assert NO_UPLOAD.encode() in told
    assert b"knife" not in told and b"/" not in told.partition(b"event: error")[2]


@pytest.mark.parametrize("meta", [{"meta": FILE}, {}], ids=["file", "missing"])
def test_the_server_fetches_no_address(server, meta):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.2)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        told = server.answered("answer", {"path": address, "url": address, **meta}, QUESTION, "none", 8)
        with pytest.raises(TimeoutError):
            listener.accept()
    # before a name is looked up, and not only because this address is a private one
    assert b"event: error" in told and NO_UPLOAD.encode() in told


def test_no_picture_is_decoded_outside_the_queue(server):
    """Each may take a hundred MB: many at once would take the server's memory."""
    config = json.loads(server.get("/config")[1])
    kinds = {one["id"]: one["type"] for one in config["components"]}
    taking = [one for one in config["dependencies"] if any(kinds[i] == "image" for i in one["inputs"])]
    assert len(taking) >= 5 and all(one["queue"] for one in taking if one["backend_fn"])
    for route in ("run", "api"):  # nor past the queue
        body = json.dumps({"data": [None, QUESTION, "none", 1]}).encode()
        ask = urllib.request.Request(
            f"{server.url}/gradio_api/{route}/answer", body, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(ask, timeout=30)
        assert 400 <= refused.value.code < 500


def test_a_full_queue_refuses_in_one_sentence_and_recovers(server, client):
    busy = client.submit(kitchen(), "damro", api_name="/probe")
    until_queued(busy)
    # an empty question needs no model once it has its turn
    told = [server.call("answer", None, "", "none", 8) for _ in range(app.QUEUE + 4)]
    busy.cancel()

    assert [status for status, _ in told].count(200) <= app.QUEUE + 1
    status, body = told[-1]
    assert status == 503 and b"Queue is full" in body and b"Traceback" not in body
    said = client.predict(kitchen(), QUESTION, "none", 4, api_name="/answer")
    assert said["tokens"] == 4


def test_a_question_of_yes_or_no_is_judged(client):
    safari = handle_file(str(SAMPLES / "safari.png"))
    ask = "Is there an elephant in the image?"
    said = client.predict(safari, ask, "none", 8, api_name="/answer")
    lied = said["text"].lower().startswith("yes")
    assert bool(said["hallucinated"]) == lied
    assert said["verdict"].startswith("Wrong" if lied else "Right")
    if lied:
        assert said["hallucinated"][0]["object"] == "elephant"


@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file=", "/gradio_api/file/"])
def test_no_file_of_the_server_is_readable(server, route, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    package = SAMPLES.parent.parent
    paths = [
        str(tmp_path / "secret.txt"),
        str(server.log),
        "server.log",
        "/etc/passwd",
        "../../../../etc/passwd",
        str(SAMPLES / "kitchen.png"),
        str(package / "README.md"),
        str(package / "pyproject.toml"),
        str(package / "demo" / "page.css"),
        str(package / "assets" / "model" / "model.safetensors"),
    ]
    for path in paths:
        status, body = server.get(route + quote(path, safe="/"))
        assert status in (400, 403, 404), (path, status)
        assert body != b"secret" and b"root:" not in body


def test_only_the_three_endpoints_are_public(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert sorted(named) == ["/answer", "/compare", "/probe"]
    assert all(one["parameters"][0]["parameter_name"] == "picture" for one in named.values())
    assert "vtc_cls(keep=0.5)" in named["/answer"]["description"]


def test_no_telemetry(server):
    config = json.loads(server.get("/config")[1])
    assert config["analytics_enabled"] is False
    assert config["run_history"] is False
    assert server.get("/monitoring")[0] in (403, 404) or b"not enabled" in server.get("/monitoring")[1]


def test_nothing_went_wrong_on_the_server(server, client):
    """Refusals are told to the visitor; a traceback in the log is a fault of ours. The last test of this file."""
    client.predict(kitchen(), QUESTION, "none", 4, api_name="/answer")
    log = server.log.read_text()
    assert "a request failed" not in log
    # Gradio logs whole how it refused the paths above.
    assert log.count("Traceback") == log.count("InvalidPathError: Cannot move") > 0, log[-3000:]
