"""`lvlm-fix report`: one page that says what the results say, shows where settings disagree, and needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_pages import Node, answered, edit_json, parse

from lvlm_fix import LVLM, VTCCLS
from lvlm_fix.cli import main
from lvlm_fix.evals import tasks
from lvlm_fix.evals.clipscore import ClipScoredChair
from lvlm_fix.evals.mme import mme
from lvlm_fix.evals.records import DataError, read_json
from lvlm_fix.evals.report import write_report
from lvlm_fix.evals.report_categories import categories
from lvlm_fix.evals.report_gallery import disagreements
from lvlm_fix.evals.report_pictures import thumbnails
from lvlm_fix.evals.report_plots import HEIGHT, WIDTH, Point, scatter, setting_name
from lvlm_fix.evals.report_runs import find_runs, read_run
from lvlm_fix.evals.runner import run
from lvlm_fix.evals.settings import Decoding
from lvlm_fix.evals.statistics import CONFIDENCE

PICTURES = 24
HOSTILE = '</dd></main><script>alert("1")</script><img src=x onerror=alert(1)> & a fork'
HOSTILE_NAME = '"><b onmouseover=alert(1)>&amp;.png'
SETTINGS = ("none", "vtc_cls(keep=72)", "damro")


def picture(number: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)).resize(size)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Pictures that all show a dog, every other one a cup too, in two question files and COCO annotations."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "images").mkdir()
    names = [HOSTILE_NAME if number == 0 else f"{number:03}.png" for number in range(PICTURES)]
    for number, name in enumerate(names):
        picture(number, (900, 600) if number < 3 else (60, 40)).save(folder / "images" / name, format="PNG")
    instances = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "cup"}],
        "annotations": [
            {"image_id": number, "category_id": kind}
            for number in range(PICTURES)
            for kind in (0, 1)[: 1 + number % 2]
        ],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    for split, absent in (("random", "fork"), ("popular", "person")):
        questions = [
            {
                "question_id": 2 * number + k,
                "image": name,
                "text": f"Is there a {what} in the image?",
                "label": label,
            }
            for number, name in enumerate(names)
            for k, (what, label) in enumerate((("dog", "yes"), (absent, "no")))
        ]
        lines = "".join(json.dumps(one) + "\n" for one in questions)
        (folder / f"pope_{split}.json").write_text(lines)
    return folder


def captions(item, seed: int) -> str:
    """The plain model's: a fork that is not there in every picture."""
    return HOSTILE if item.id == "0" else "A dog, a fork and a fork."


def damro_captions(item, seed: int) -> str:
    """In half of the pictures the fork alone."""
    if item.id == "5":
        return "Cups on a bench and a bird."
    return "A fork." if int(item.id) >= PICTURES // 2 else captions(item, seed)


@pytest.fixture(scope="module")
def chair_run(scenes, tmp_path_factory) -> Path:
    task = tasks.chair(scenes / "images", scenes / "instances.json")
    out = tmp_path_factory.mktemp("runs") / "chair"
    answers = dict(
        zip(
            SETTINGS,
            (
                captions,
                lambda item, seed: captions(item, seed) if item.id in ("1", "2") else "A dog.",
                damro_captions,
            ),
            strict=True,
        )
    )
    return answered(out, task, answers, images=scenes / "images")


@pytest.fixture(scope="module")
def pope_run(scenes, tmp_path_factory) -> Path:
    task = tasks.pope(
        questions=[scenes / "pope_random.json", scenes / "pope_popular.json"], images=scenes / "images"
    )
    out = tmp_path_factory.mktemp("runs") / "pope"

    def plain(item, seed: int) -> str:
        return "Yes, there is. I see it."

    def damro(item, seed: int) -> str:
        return "No." if "fork" in item.question and item.image > "001.png" else plain(item, seed)

    return answered(out, task, {"none": plain, "damro": damro}, images=scenes / "images")


@pytest.fixture(scope="module")
def mme_run(random_llava, tmp_path_factory) -> Path:
    """MME in both layouts, asked of a model for the sake of true lines and a true manifest, sampled with two seeds."""
    folder = tmp_path_factory.mktemp("mme")
    for texts, pictures in (("color", "color"), ("count/questions_answers_YN", "count/images")):
        for place in (texts, pictures):
            (folder / place).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            picture(number).save(folder / pictures / f"{number}.jpg")
            lines = "Is there one dog?\tYes\nAre there two dogs?\tNo\n"
            (folder / texts / f"{number}.txt").write_text(lines)
    task = mme(folder, ["color", "count"])
    sampling = Decoding(max_new_tokens=2, do_sample=True, temperature=2.0, seeds=(3, 4))
    fix, out = (VTCCLS(keep=40, start_layer=0),), folder / "out"
    command = ["lvlm-fix", "eval", "mme", f"--data={folder}"]
    run(
        task,
        LVLM(*random_llava),
        [fix],
        out,
        decoding=sampling,
        batch_size=8,
        command=command,
        progress=False,
    )
    return out


@pytest.fixture(scope="module")
def page(chair_run, pope_run, mme_run, tmp_path_factory) -> Node:
    """One page about all three."""
    folder = tmp_path_factory.mktemp("all")
    for place in (chair_run, pope_run, mme_run):
        shutil.copytree(place, folder / place.parent.name / place.name)
        shutil.move(
            folder / place.parent.name / place.name, folder / f"{len(list(folder.iterdir()))}-{place.name}"
        )
        (folder / place.parent.name).rmdir()
    report = write_report(folder)
    assert report.path == folder / "report.html"
    return parse(report.path.read_text())


def test_elements_are_closed_and_ids_are_unique_and_known(page) -> None:
    nodes = list(page.all())
    ids = [node.attributes["id"] for node in nodes if "id" in node.attributes]
    assert len(ids) == len(set(ids)) > 10
    for node in nodes:
        for name in ("aria-labelledby", "aria-describedby"):
            assert node.attributes.get(name, ids[0]) in ids
        if node.attributes.get("href", "").startswith("#"):
            assert node.attributes["href"][1:] in ids


def test_landmarks_headings_and_names_are_in_order(page) -> None:
    assert page.one("html").attributes["lang"] == "en"
    assert [len(list(page.all(tag))) for tag in ("h1", "header", "nav", "main", "footer")] == [1] * 5
    assert len(list(page.one("main").all("section"))) == 3
    levels = [int(node.tag[1]) for node in page.all() if re.fullmatch("h[1-6]", node.tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))
    assert all(image.attributes["alt"] for image in page.all("img"))
    for table in page.all("table"):
        assert table.one("caption").text
        assert all(head.attributes["scope"] for head in table.all("th"))
    for plot in page.all("svg", "plot"):
        assert plot.attributes["role"] == "img" and plot.one("title").text and plot.one("desc").text
    decoration = [svg for svg in page.all("svg") if "plot" not in svg.classes]
    assert decoration and all(svg.attributes["aria-hidden"] == "true" for svg in decoration)


def test_nothing_is_asked_of_the_network(page) -> None:
    for node in page.all():
        assert node.tag not in ("script", "link", "iframe", "object")
        assert not any(name.startswith("on") or name in ("srcset", "style") for name in node.attributes)
        assert re.match(r"data:image/webp;base64,[A-Za-z0-9+/=]+$|$", node.attributes.get("src", ""))
        assert re.match(r"#|https://arxiv\.org/abs/\d{4}\.\d{5}$|$", node.attributes.get("href", ""))
    css = page.one("style").text
    assert "url(" not in css and "@import" not in css
    contents = [node.attributes.get("content", "") for node in page.all("meta")]
    assert any(content.startswith("default-src 'none'; img-src data:;") for content in contents)
    assert any("width=device-width" in content for content in contents)
    for needed in ("@media print", "prefers-color-scheme: dark", "overflow-x: auto", "break-inside: avoid"):
        assert needed in css


def rows_of(table: Node) -> dict[tuple[str, str], list[Node]]:
    """Cells by split and setting."""
    found, split = {}, ""
    for row in table.all("tr"):
        head = next(row.all("th"))
        if "group" in head.classes:
            split = head.text
        elif head.attributes["scope"] == "row":
            found[split, head.text] = list(row.all("td"))
    return found


def sections(page: Node, *folders: Path) -> list[tuple[Node, dict]]:
    return list(
        zip(
            page.one("main").all("section"), (read_json(one / "summary.json") for one in folders), strict=True
        )
    )


def test_every_number_of_the_summaries_is_in_the_tables(page, chair_run, pope_run, mme_run) -> None:
    for section, summary in sections(page, chair_run, pope_run, mme_run):
        factor = 100 if summary["task"] == "pope" else 1
        results, *_ = section.all("table")
        cells = rows_of(results)
        several = len(summary["settings"][0]["splits"]) > 1
        for setting in summary["settings"]:
            for split, metrics in setting["splits"].items():
                own = cells.pop((split if several else "", setting_name(setting["name"])))
                for cell, estimate in zip(own, metrics.values(), strict=True):
                    assert float(cell.one("data").attributes["value"]) == estimate["value"]
                    assert cell.one("data").text == f"{factor * estimate['value']:.1f}"
                    low, high = (factor * estimate[name] for name in ("low", "high"))
                    assert cell.one("small").text == f"{low:.1f} to {high:.1f}"
                    assert ("over seeds" in cell.text) == (len(summary["seeds"]) > 1)
        assert not cells and f"{CONFIDENCE:.0%} intervals" in results.one("caption").text


def test_every_test_against_plain_is_in_the_tables(page, chair_run, pope_run, mme_run) -> None:
    verdicts = set()
    for section, summary in sections(page, chair_run, pope_run, mme_run):
        cells = rows_of(list(section.all("table"))[1])
        several = len(summary["settings"][0]["splits"]) > 1
        metrics = next(iter(summary["settings"][0]["splits"].values()))
        for entry in summary["comparisons"]:
            own = cells[entry["split"] if several else "", entry["setting"]]
            cell = own[list(metrics).index(entry["metric"])]
            difference, p = (float(data.attributes["value"]) for data in cell.all("data"))
            assert (difference, p) == (entry["difference"], entry["p_holm"])
            assert cell.one("", "verdict").text == entry["verdict"]
            verdicts.add(entry["verdict"])
        assert sum(map(len, cells.values())) == len(summary["comparisons"])
        assert all(entry["test"] in section.text for entry in summary["comparisons"])
    assert {"better", "worse", "no significant difference"} <= verdicts


def test_speed_and_the_manifest_are_told(page, chair_run, pope_run, mme_run) -> None:
    for section, summary in sections(page, chair_run, pope_run, mme_run):
        cells = rows_of(list(section.all("table"))[2])
        for setting in summary["settings"]:
            own = cells["", setting_name(setting["name"])]
            values = [float(one.attributes["value"]) for cell in own for one in cell.all("data")]
            names = ("seconds_per_answer", "tokens_per_second", "compute_seconds", "peak_memory_bytes")
            assert values == [setting[name] for name in names]
    for section, folder in zip(page.one("main").all("section"), (chair_run, pope_run, mme_run), strict=True):
        manifest, told = read_json(folder / "manifest.json"), section.one("details").text
        for leaf in (
            manifest["model"]["sha256"], manifest["dtype"], manifest["device"], manifest["created"],
            manifest["prompts"]["example"], manifest["chat_template"], *manifest["versions"].values(),
            *manifest["data"].values(), *manifest["command"],
        ):  # fmt: skip
            assert leaf is None or leaf in told
        for method in (method for setting in manifest["settings"] for method in setting["methods"]):
            assert all(f"{name} {value}" in told for name, value in method.items())


@pytest.fixture(scope="module")
def clip_run(scenes, tmp_path_factory) -> Path:
    """Captions of which the short ones suit their pictures better, in the eyes of the model that ships."""
    task = ClipScoredChair.of(tasks.chair(scenes / "images", scenes / "instances.json"))

    def score(item, said: str) -> dict:
        return {
            "clipscore": round(0.5 + int(item.id) / 100 + (said == "A dog.") / 10, 6),
            "clipscore_truncated": item.id == "3" and said != "A dog.",
        }

    answers = {"none": captions, "damro": lambda item, seed: "A dog."}
    return answered(tmp_path_factory.mktemp("clip") / "CHAIR", task, answers, score=score)


def test_clipscore_has_its_place_in_every_part(clip_run, tmp_path) -> None:
    page = parse(write_report(clip_run, tmp_path / "page.html", 0).path.read_text())
    summary, late = read_json(clip_run / "summary.json"), read_json(clip_run / "manifest.json")["late"]
    damro = next(page.one("header").all("li")).text
    assert re.search(r"CLIPScore better \(\+.*, p", damro)
    results, against, _ = page.all("table")
    for table in (results, against):
        assert "CLIPScore×100, 250 at most, higher is better" in table.text
    estimate = summary["settings"][1]["splits"]["all"]["clipscore"]
    assert rows_of(results)["", "damro"][-1].one("data").text == f"{estimate['value']:.1f}"
    assert rows_of(against)["", "damro"][-1].one("", "verdict").text == "better"
    assert any("CLIPScore against seconds" in plot.one("title").text for plot in page.all("svg", "plot"))
    links = [node.attributes["href"] for node in page.one("section").all("a")]
    assert "https://arxiv.org/abs/2104.08718" in links and "2.5 times the cosine" in page.text
    assert "CLIPScore read only the beginning of some captions: 1 of plain." in page.text
    told = page.one("details").text
    assert late["clipscore"]["sha256"] in told and f"open_clip {late['clipscore']['open_clip']}" in told


def test_clipscore_of_an_unnamed_model_or_of_other_lines_is_refused(clip_run, tmp_path) -> None:
    unnamed, other = (Path(shutil.copytree(clip_run, tmp_path / name)) for name in ("unnamed", "other"))
    edit_json(unnamed / "manifest.json", lambda manifest: manifest.pop("late"))
    with pytest.raises(DataError, match=r"has a CLIPScore, and manifest\.json does not say of which model"):
        write_report(unnamed)
    change_row(other, 2, clipscore=0.9)
    with pytest.raises(DataError, match="says clipscore_total"):
        write_report(other)
    put(other, [re.sub(r'"clipscore.*?, ', "", line) for line in lines(other)])
    with pytest.raises(DataError, match="says clipscore_total"):
        write_report(other)


def test_the_rule_and_the_clocks_time_are_told(page, chair_run) -> None:
    chair, pope, _ = page.one("main").all("section")
    assert "Objects were found in the captions by the english rule: it also sees" in chair.text
    assert "rule" not in pope.one("p", "note").text
    assert "1 min 15 s for 1,234 results, on 2 processes" in " ".join(chair.one("details").text.split())


def test_headings_do_not_say_the_same_twice(chair_run, pope_run, tmp_path) -> None:
    shutil.copytree(chair_run, tmp_path / "chair")
    shutil.copytree(pope_run, tmp_path / "pope-first")
    page = parse(write_report(tmp_path, gallery_items=0).path.read_text())
    assert [node.text for node in page.all("h2")] == ["CHAIR", "POPE, pope-first"]


def test_the_first_lines_say_what_came_out(page) -> None:
    header = page.one("header")
    assert header.one("h1").text == "CHAIR, POPE and MME of tiny & new and a model without a name"
    first, second, *_ = (" ".join(item.text.split()) for item in header.all("li"))
    assert re.match(
        r"vtc_cls\(keep=72\) makes CHAIRs better \(−91\.7, p = 0\.01\) and CHAIRi better \(.*\); "
        r"no significant difference in recall\.$",
        first,
    )
    assert re.match(
        r"damro makes CHAIRi worse \(\+.*\) and recall worse \(−.*\); no significant difference in CHAIRs\.",
        second,
    )
    assert "answer" not in first + second  # a time without its spread is no result
    assert "shows no significant difference in score (color) and score (count)." in header.text
    assert "F1 (random) better" in header.text and "no significant difference in F1 (popular)" in header.text
    assert "sampling at temperature 2, 2 seeds" in header.text and "greedy decoding" in header.text


def test_what_a_model_or_a_file_says_stays_text(page) -> None:
    answers = [node.text for card in page.all("article") for node in card.all("dd")]
    pictures = [node.attributes["alt"] for node in page.all("img")]
    assert any(HOSTILE_NAME in alt for alt in pictures)
    assert HOSTILE in answers and not list(page.all("script"))


def test_the_gallery_holds_what_settings_disagree_on_and_marks_just_the_hallucinated_words(
    page, chair_run, pope_run
) -> None:
    chair, pope, _ = page.one("main").all("section")
    rows = read_run(chair_run).rows
    cards = list(chair.all("article"))
    assert len(cards) == len(disagreements(read_run(chair_run))) == PICTURES - 2
    for card in cards:
        image = re.match("Picture (.*?), which shows", card.one("img").attributes["alt"])[1]
        seen = {}
        for names, answer in zip(card.all("dt"), card.all("dd"), strict=True):
            for name in re.split(", | and ", names.one("span").text):
                seen[name] = (answer.text, [mark.text for mark in answer.all("mark")])
        wrong = []
        for setting, name in zip(SETTINGS, ("plain", *SETTINGS[1:]), strict=True):
            row = next(row for row in rows[setting].values() if row["image"] == image)
            assert seen[name] == (row["answer"], [mark["word"] for mark in row["hallucinated"]])
            wrong.append({mark["category"] for mark in row["hallucinated"]})
        assert any(one != wrong[0] for one in wrong)
        assert card.one("p", "truth").text.startswith("In the picture: ")
    for card in pope.all("article"):
        assert "fork" in card.one("h4").text and "Right answer: no." in card.text
        assert [mark.text for mark in card.all("mark")] == ["Yes, there is."]
        assert [tag.text for tag in card.all("", "tag")] == ["wrong yes", "right"]


def test_the_gallery_can_be_shortened_or_left_out(chair_run, tmp_path) -> None:
    for number in (0, 3):
        report = write_report(chair_run, tmp_path / "page.html", gallery_items=number)
        assert len(list(parse(report.path.read_text()).all("article"))) == report.shown[0] == number
    with pytest.raises(ValueError, match="201"):
        write_report(chair_run, tmp_path / "page.html", gallery_items=201)


def test_kinds_of_disagreement_take_turns(chair_run) -> None:
    items = disagreements(read_run(chair_run))
    directions = [tuple(np.sign(np.array(item.errors) - item.errors[0])) for item in items]
    assert len(set(directions[:2])) == 2 and len({item.image for item in items}) == len(items)


def test_splits_that_share_a_question_show_it_once(scenes, tmp_path) -> None:
    task = tasks.pope(questions=[scenes / "pope_random.json"], images=scenes / "images")
    out = answered(tmp_path, task, {"none": lambda item, seed: "Yes", "damro": lambda item, seed: "No"})
    every = len(disagreements(read_run(out)))
    for path in out.glob("results-*.jsonl"):
        first, second, *rest = map(json.loads, path.read_text().splitlines())
        second["same_as"] = first["id"]
        path.write_text("".join(json.dumps(row) + "\n" for row in (first, second, *rest)))
    assert len(disagreements(read_run(out))) == every - 1


def test_categories_are_counted_where_they_could_be_hallucinated(chair_run, pope_run, mme_run) -> None:
    found = {one.name: one for one in categories(read_run(chair_run))}
    assert found["fork"].wrong == (24, 2, 23) and found["fork"].chances == 24
    assert found["bench"].wrong == (0, 0, 1) and found["bench"].chances == 24
    assert set(found) == {"fork", "bench", "bird"}  # cups are in picture 5
    assert [(one.name, one.wrong, one.chances) for one in categories(read_run(pope_run))] == [
        ("person", (24, 24), 24),
        ("fork", (24, 2), 24),
    ]
    assert {one.name for one in categories(read_run(mme_run))} <= {"color", "count"}


def test_bars_are_as_long_as_their_numbers(page) -> None:
    for block in page.all("div", "categories"):
        rows = [row for row in block.all("li")]
        widths = np.array([float(row.one("rect").attributes["width"].rstrip("%")) for row in rows])
        shares = [re.search(r"([\d,]+) of ([\d,]+)", row.text).groups() for row in rows]
        rates = np.array([int(part) / int(whole) for part, whole in shares])
        assert np.allclose(widths, 100 * rates / rates.max(), atol=0.01)


def test_plots_place_every_setting_and_tell_its_numbers(page, chair_run, pope_run, mme_run) -> None:
    for section, summary in sections(page, chair_run, pope_run, mme_run):
        plots = list(section.all("svg", "plot"))
        assert len(plots) >= 2
        assert any("seconds an answer" in plot.one("title").text for plot in plots)
        assert any("tokens a second" in plot.one("title").text for plot in plots)
        for plot in plots:
            assert len(list(plot.all("path", "interval"))) == len(summary["settings"])
            for setting in summary["settings"]:
                assert f"{setting_name(setting['name'])}: " in plot.one("desc").text


def test_a_point_stands_at_its_value() -> None:
    points = [Point("none", 0, 1.0, 10.0, 9.0, 11.0), Point("damro", 1, 3.0, 30.0, 28.0, 31.0)]
    plot = parse(scatter(points, "s", "percent", "t", "d", "n")).one("svg")
    ticks = {node.text: node.attributes for node in plot.all("text", "tick")}
    circle = plot.one("circle").attributes
    assert float(circle["cx"]) == pytest.approx(float(ticks["1"]["x"]), abs=0.01)
    assert float(circle["cy"]) == pytest.approx(float(ticks["10"]["y"]) - 4, abs=0.01)


def test_labels_leave_the_ends_of_intervals_to_be_seen() -> None:
    """As in a run of nine settings of about one speed: no label lies on another's interval's end."""
    names = ["none", "vtc_cls(keep=72)", "damro(alpha=0.5)", "var", "zipvl"]
    points = [
        Point(name, k, 0.1 + 0.02 * k, 10.0 + 2 * k, 9.0 + 2 * k, 11.0 + 2 * k)
        for k, name in enumerate(names)
    ]
    plot = parse(scatter(points, "x", "y", "title", "text", "name")).one("svg")
    ends = [
        (float(x), float(y))
        for path in plot.all("path", "interval")
        for x, y, end in [re.match(r"M([\d.]+) ([\d.]+)V([\d.]+)", path.attributes["d"]).groups()]
        for y in (y, end)
    ]
    assert len(ends) == 2 * len(names)
    for label in plot.all("text", "label"):
        width, x, y = 6.9 * len(label.text), float(label.attributes["x"]), float(label.attributes["y"])
        left = {"start": x, "end": x - width, "middle": x - width / 2}[label.classes[1]]
        assert not any(left - 6 < at < left + width + 6 and y - 13 < level < y + 6 for at, level in ends)


@pytest.mark.parametrize("number", [1, 2, 9])
def test_plots_stay_in_their_frame(number) -> None:
    names = [
        "none",
        "zipvl(tau=0.975,important_bits=4),damro(alpha=2.0)",
        *(f"var({k})" for k in range(number)),
    ]
    points = [Point(name, k, 0.02 + 0.001 * k, 5.0, 5.0, 5.0) for k, name in enumerate(names[:number])]
    plot = parse(scatter(points, "x", "y", "title", "text", "name")).one("svg")
    labels = list(plot.all("text", "label"))
    assert len(labels) == number
    for node in (*labels, *plot.all("circle")):
        x, y = (float(node.attributes.get(one) or node.attributes[f"c{one}"]) for one in "xy")
        assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT


def opened(image: Node) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image.attributes["src"].partition(",")[2])))


def test_pictures_are_made_small_and_are_the_ones_asked_about(page, scenes) -> None:
    for image in page.one("section").all("img"):
        name = re.match("Picture (.*?), which", image.attributes["alt"])[1]
        shown, asked = opened(image), Image.open(scenes / "images" / name)
        assert max(shown.size) <= 320 and shown.size == tuple(
            int(image.attributes[one]) for one in ("width", "height")
        )
        assert shown.width / shown.height == pytest.approx(1.5, abs=0.02)
        there, here = (np.asarray(one.convert("RGB").resize(shown.size), float) for one in (asked, shown))
        difference = here - there
        assert np.abs(difference).mean() < 12


def test_pictures_get_smaller_until_they_fit(scenes) -> None:
    paths = {str(number): scenes / "images" / f"{number:03}.png" for number in (1, 2)}
    wide, narrow = thumbnails(paths, 10**6), thumbnails(paths, 2_500)
    assert max(one.width for one in wide.values()) == 320 > max(one.width for one in narrow.values())
    assert sum(len(one.uri) for one in narrow.values()) <= 2_500


def test_moved_pictures_are_found_and_others_are_not_shown(scenes, chair_run, tmp_path) -> None:
    moved, out = tmp_path / "moved", tmp_path / "page.html"
    shutil.copytree(scenes / "images", moved)
    run_folder = shutil.copytree(chair_run, tmp_path / "run")
    edit_json(run_folder / "manifest.json", lambda manifest: manifest["command"].clear())
    with pytest.warns(UserWarning, match="pictures of .*run are not found"):
        write_report(run_folder, out)
    lost = parse(out.read_text())
    assert not list(lost.all("img")) and list(lost.all("article")) and "--images" in lost.one("main").text
    write_report(run_folder, out, images=[moved])
    assert list(parse(out.read_text()).all("img"))
    picture(99).save(moved / "007.png")
    with pytest.warns(UserWarning, match="not found as the model saw them"):
        write_report(run_folder, out, images=[moved])


def test_a_plain_run_alone_is_reported(scenes, tmp_path) -> None:
    task = tasks.chair(scenes / "images", scenes / "instances.json")
    out = answered(tmp_path, task, {"none": lambda item, seed: "A dog."})
    page = parse(write_report(out).path.read_text())
    assert "nothing is compared" in page.one("header").text and "No setting hallucinates" in page.text


def lines(folder: Path, name: str = "damro") -> list[str]:
    return (folder / f"results-{name}.jsonl").read_text().splitlines(keepends=True)


def put(folder: Path, rows: list[str], name: str = "damro") -> None:
    (folder / f"results-{name}.jsonl").write_text("".join(rows))


def change_row(folder: Path, number: int, **values: object) -> None:
    rows = lines(folder)
    rows[number - 1] = json.dumps(json.loads(rows[number - 1]) | values) + "\n"
    put(folder, rows)


DAMAGE = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json, so nobody knows of what"),
    "no JSON in the manifest": (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json, line 1"),
    "another manifest": (lambda f: (f / "manifest.json").write_text("{}"), r"manifest\.json: is no manifest"),
    "another benchmark": (
        lambda f: edit_json(f / "manifest.json", lambda m: m["task"].update(name="vqa")),
        "no manifest of pope, chair or mme",
    ),
    "no summary": (lambda f: (f / "summary.json").unlink(), r"unfinished, with no summary\.json"),
    "a summary without a part": (
        lambda f: edit_json(f / "summary.json", lambda s: s["settings"][1].pop("tokens_per_second")),
        r"summary\.json: is damaged \('tokens_per_second'\)",
    ),
    "a summary of other lines": (
        lambda f: edit_json(
            f / "summary.json", lambda s: s["settings"][1]["counts"]["all"].update(captions=7)
        ),
        r"summary\.json: says captions 7 of vtc_cls\(keep=72\), all, and the results lines say 24",
    ),
    "a summary of other settings": (
        lambda f: edit_json(f / "summary.json", lambda s: s["settings"][1].update(name="var")),
        "is of other settings",
    ),
    "a missing file": (
        lambda f: (f / "results-damro.jsonl").unlink(),
        r"unfinished, with no results-damro\.jsonl",
    ),
    "a missing line": (lambda f: put(f, lines(f)[:-1]), "unfinished, with 23 of 24 answers of damro"),
    "a torn line": (
        lambda f: put(f, [*lines(f)[:-1], lines(f)[-1][:30]]),
        r"unfinished, the last line of results-damro\.jsonl ends early; start its `lvlm-fix eval` command again",
    ),
    "a line that was cut inside": (
        lambda f: put(f, [lines(f)[0][:8] + "\n", *lines(f)[1:]]),
        r"damro\.jsonl, line 1: not valid JSON \(Unterminated string starting at column 8\)",
    ),
    "no answers": (
        lambda f: [path.unlink() for path in f.glob("results-*.jsonl")],
        "holds numbers without the answers that they were made of",
    ),
    "a line that is no object": (lambda f: put(f, ["[]\n", *lines(f)[1:]]), r"damro\.jsonl, line 1: holds"),
    "a line without its answer": (
        lambda f: put(f, [lines(f)[0].replace('"answer"', '"other"'), *lines(f)[1:]]),
        r'damro\.jsonl, line 1: has no "answer"',
    ),
    "a line twice": (
        lambda f: put(f, [*lines(f)[:-1], lines(f)[0]]),
        "line 24: answers .* for the second time",
    ),
    "a mark beyond the answer": (
        lambda f: change_row(f, 2, hallucinated=[{"word": "x", "category": "x", "start": 900, "end": 901}]),
        r"line 2: .*does not fit the answer",
    ),
    "a mark that is no mark": (lambda f: change_row(f, 3, hallucinated=[7]), "line 3: .*does not fit"),
    "another seed": (lambda f: change_row(f, 4, seed=9), "line 4: is of no seed .* mixed"),
    "another question": (lambda f: change_row(f, 5, question="What?"), "asks something else under .* mixed"),
    "lines of another setting": (
        lambda f: shutil.copy(f / "results-damro.jsonl", f / "results-var.jsonl"),
        r"results-var\.jsonl: is of no setting .* mixed",
    ),
    "lines that are not merged": (
        lambda f: (f / "results-damro.rank1.jsonl").write_text(""),
        r"unfinished, results-damro\.rank1\.jsonl is not merged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_whole_run_is_refused_and_no_page_is_left(chair_run, tmp_path, damage) -> None:
    do, message = DAMAGE[damage]
    folder = Path(shutil.copytree(chair_run, tmp_path / "run"))
    do(folder)
    with pytest.raises(DataError, match=message) as refusal:
        write_report(tmp_path)
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)
    assert not list(tmp_path.rglob("*.html"))


def test_a_name_that_leads_out_of_the_folder_is_not_followed(scenes, chair_run, tmp_path) -> None:
    folder = Path(shutil.copytree(chair_run, tmp_path / "run"))
    for path in folder.glob("results-*.jsonl"):
        path.write_text(path.read_text().replace("001.png", "../images/001.png"))
    with pytest.warns(UserWarning, match="not found"):
        assert "<img" not in write_report(folder).path.read_text()


def test_unknown_folders_and_places_are_named(chair_run, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no results"):
        find_runs(tmp_path)
    with pytest.raises(OSError, match="make it first"):
        write_report(chair_run, tmp_path / "nowhere" / "page.html")
    with pytest.raises(OSError, match="is a folder"):
        write_report(chair_run, tmp_path)
    with pytest.raises(ValueError, match=r"ends in \.html"):
        write_report(chair_run, chair_run / "summary.json")


def test_the_page_is_the_same_every_time_and_small(chair_run, tmp_path) -> None:
    first, again = (write_report(chair_run, tmp_path / f"{k}.html").path.read_bytes() for k in "ab")
    assert first == again and len(first) < 5_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


@pytest.fixture
def entered(monkeypatch, capfd):
    """The command as typed, in this process: (exit code, stdout, stderr)."""

    def enter(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lvlm-fix", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return enter


def test_the_command_as_typed(entered, chair_run, tmp_path) -> None:
    page = tmp_path / "page.html"
    code, out, err = entered("report", chair_run, "-o", page, "--gallery", 2)
    assert (code, err) == (0, "") and page.read_text().count("<article") == 2
    assert out.splitlines() == [
        "chair: 3 settings on 24 images; they disagree on 22 items, 2 are shown",
        f"report in {page}",
    ]
    code, out, _ = entered("report", chair_run, "--output", page, "--json")
    told = json.loads(out)
    assert code == 0 and told["bytes"] == page.stat().st_size and told["report"] == str(page)
    assert told["runs"][0]["settings"] == list(SETTINGS) and told["runs"][0]["disagreements"] == 22


def test_the_command_refuses_in_one_line(entered, tmp_path) -> None:
    code, out, err = entered("report", tmp_path / "nowhere")
    assert (code, out) == (1, "") and err.startswith("lvlm-fix: there is no folder") and err.count("\n") == 1
