"""`lvlm-fix` as a person types it: results on stdout, one sentence on stderr when it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import lvlm_fix
from lvlm_fix.cli import main
from lvlm_fix.evals.chair import mentioned
from lvlm_fix.loading import embedded_folder
from lvlm_fix.methods import METHODS

SAMPLES = embedded_folder().parent / "samples"
KITCHEN = SAMPLES / "kitchen.png"
HEAVY = {"torch", "transformers", "gradio", "open_clip", "triton", "PIL", "numpy"}


def typed(*words: object, command: tuple[str, ...] = (sys.executable, "-m", "lvlm_fix")):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "110"}
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """The entry point in this process, torch imported already: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lvlm-fix", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def assert_one_line(result: tuple[int, str, str], says: str) -> None:
    code, out, err = result
    assert (code, out) == (1, ""), err
    assert err.startswith("lvlm-fix: ") and err.count("\n") == 1 and says in err and "Traceback" not in err
    assert "[Errno" not in err


def assert_only_premises(err: str) -> None:
    """One line for each method of which the model card says that it cannot help here."""
    told = [
        re.match(r"lvlm-fix: do not expect (\w+) to help, its premise fails", line)
        for line in err.splitlines()
    ]
    assert [match and match[1] for match in told] == ["damro", "var", "zipvl"]


@pytest.fixture(scope="module")
def described() -> dict:
    done = typed("describe", KITCHEN, "--json")
    assert done.returncode == 0
    assert_only_premises(done.stderr)
    return json.loads(done.stdout)


def test_help_imports_nothing_heavy() -> None:
    done = typed("--help", command=(sys.executable, "-X", "importtime", "-m", "lvlm_fix"))
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported and not imported & HEAVY
    assert done.returncode == 0
    for word in ("describe", "methods", "score", "build", "eval", "--version"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("words", "defaults"),
    [
        (("eval", "chair"), ["embedded scenes", "the benchmark's", "the GPU, if there is one"]),
        (("tune",), ["what the paper tunes", "F1 of POPE, CHAIRi of CHAIR", "all three"]),
        (("describe",), ["each alone", "objects.json beside the picture"]),
        (("bench",), []),
    ],
)
def test_help_tells_defaults_that_are_written_in_brackets(entered, words, defaults) -> None:
    code, out, err = entered(*words, "-h")
    told = " ".join(re.sub("[│|]", " ", out).split())
    assert (code, err) == (0, "") and "[default: " in told
    for default in defaults:
        assert f"[default: {default}]" in told


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    script = f"import sys, lvlm_fix.cli; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_script_and_the_module_are_the_same() -> None:
    script = shutil.which("lvlm-fix", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("no lvlm-fix beside this Python")
    for words in (("--version",), ("describe", "--help"), ("describe", "nothing.png")):
        module, own = typed(*words), typed(*words, command=(script,))
        assert (own.returncode, own.stdout, own.stderr) == (module.returncode, module.stdout, module.stderr)


def test_version(entered) -> None:
    assert entered("--version") == (0, f"{lvlm_fix.__version__}\n", "")


def test_json_is_one_object_with_the_plain_answer_and_each_method(described: dict) -> None:
    assert described["picture"] == str(KITCHEN)
    assert described["question"] == "Describe the image."
    assert described["objects"] == json.loads((SAMPLES / "objects.json").read_text())["kitchen.png"]
    assert [answer["fix"] for answer in described["answers"]] == ["none", *METHODS]
    for answer in described["answers"]:
        assert answer["text"] and 0 < answer["tokens"] <= 64 and answer["seconds"] > 0
        assert list(answer["report"]) == ([] if answer["fix"] == "none" else [answer["fix"]])


def test_hallucinated_objects_are_marked_where_they_stand(described: dict) -> None:
    for answer in described["answers"]:
        mentions = mentioned(answer["text"], rule="english")
        wrong = [mention for mention in mentions if mention.category not in described["objects"]]
        marked = answer["hallucinated"]
        assert [(m["start"], m["end"], m["object"]) for m in marked] == [
            (m.start, m.end, m.category) for m in wrong
        ]
        assert all(answer["text"][m["start"] : m["end"]].lower() == m["word"] for m in marked)


def test_a_person_sees_plain_and_fixed_side_by_side(described: dict) -> None:
    done = typed("describe", KITCHEN, "--objects", "knife, apple")
    assert done.returncode == 0
    assert_only_premises(done.stderr)
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{KITCHEN}"[:40]) and "in the picture: knife, apple" in lines
    header = next(line for line in lines if "plain" in line)
    assert [cell.strip() for cell in re.split("[┃|]", header) if cell.strip()] == ["plain", *METHODS]
    body = [re.split("[│|]", line)[1:-1] for line in lines if re.match("[│|]", line)]
    columns = [" ".join(" ".join(cells).split()) for cells in zip(*body, strict=True)]
    for column, answer in zip(columns, described["answers"], strict=True):
        told, _, rest = column.rpartition(f" {answer['tokens']} tokens in ")
        assert told.replace("[", "").replace("]", "") == answer["text"] and rest
        named = {mention.category for mention in mentioned(answer["text"], rule="english")}
        assert {word.strip("[]") for word in re.findall(r"\[[^]]*\]", told)} == named - {"knife", "apple"}
    assert lines[-1] == "[word] is not in the picture"


def test_fix_objects_and_question_are_as_asked(entered) -> None:
    fixes = ("--fix", "damro(alpha=1.0),vtc_cls(keep=72)", "--fix", "vtc_cls")
    code, out, err = entered(
        "describe", KITCHEN, *fixes, "--objects", "", "--question", "What is in the image?", "--json"
    )
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed["objects"] == [] and printed["question"] == "What is in the image?"
    plain, both, one = printed["answers"]
    assert [answer["fix"] for answer in (plain, both, one)] == ["none", fixes[1], "vtc_cls"]
    assert set(both["report"]) == {"damro", "vtc_cls"} and len(both["report"]["vtc_cls"][0]["kept"]) == 72
    named = mentioned(plain["text"], rule="english")
    assert named and len(plain["hallucinated"]) == len(named)  # nothing is said to be in the picture


def test_a_picture_without_known_objects_has_no_marks(entered, tmp_path: Path) -> None:
    shutil.copy(KITCHEN, tmp_path / "mine.png")
    code, out, _ = entered("describe", tmp_path / "mine.png", "--fix", "vtc_cls", "--json")
    printed = json.loads(out)
    assert code == 0 and printed["objects"] is None
    assert all(answer["hallucinated"] == [] for answer in printed["answers"])


def test_brackets_and_colons_in_a_question_are_only_text(entered) -> None:
    code, out, err = entered("describe", KITCHEN, "--fix", "vtc_cls", "--question", "Is [/x] there :smile:?")
    assert (code, err) == (0, "") and "Is [/x] there :smile:?" in " ".join(out.split())


def test_the_longest_answer_is_as_asked(entered) -> None:
    _, out, _ = entered("describe", KITCHEN, "--max-new-tokens", 3, "--fix", "none", "--json")
    assert [answer["tokens"] for answer in json.loads(out)["answers"]] == [3, 3]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file"),
        (b"", "the file is empty"),
        (b"not a picture", "not in a picture format"),
        (KITCHEN.read_bytes()[:5000], "damaged or cut short"),
    ],
)
def test_a_bad_picture_is_told_in_one_line(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    done = typed("describe", path, "--json")
    assert_one_line((done.returncode, done.stdout, done.stderr), says)
    assert str(path) in done.stderr


def test_a_folder_is_no_picture(entered, tmp_path: Path) -> None:
    assert_one_line(entered("describe", tmp_path), "it is a folder")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--fix", "magic"), "unknown method 'magic': the methods are damro"),
        (("--fix", "damro(strength=2)"), "damro takes alpha, beta, topk"),
        (("--fix", "damro(alpha="), "cannot read methods"),
        (("--fix", "damro(alpha=x)"), "cannot read methods 'damro(alpha=x)': alpha is x; give a number"),
        (("--fix", "damro(alpha=1e999)"), "alpha is 1e309; give a number"),
        (("--fix", "damro(topk=2.5)"), "topk is 2.5; give a whole number"),
        (("--fix", "damro(gate='a')"), "gate is 'a'; give a number or None"),
        (("--fix", "damro(alpha=1,alpha=2)"), "cannot read methods"),
        (("--fix", "damro(**{})"), "damro takes alpha, beta, topk, gate: it has no values in **"),
        (("--fix", "zipvl(seed=99999999999999999999)"), "seed is 99999999999999999999; give a whole number"),
        (("--fix", "zipvl(evict=1)"), "evict is 1; give True or False"),
        (("--fix", "zipvl(scope=2)"), "scope is 2; give a word in quotes"),
        (("--fix", "vtc_cls(keep='a')"), "keep is 'a'; give a number"),
        (("--fix", "vtc_cls(keep=True)"), "keep is True; give a number"),
        (("--fix", "var(sink_dims=(1,'a'))"), "give whole numbers in parentheses, as (3, 5) or None"),
        (("--fix", "__import__('os')"), "cannot read methods"),
        (("--question", ""), "the question is empty: ask something"),
        (("--question", "What is <image>?"), "leave it out"),
        (("--model", "nothing-here"), "cannot load model nothing-here: there is no such folder"),
        (("--model", "nobody/no-such-model"), "cannot load model nobody/no-such-model: "),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(entered, words: tuple[str, ...], says: str) -> None:
    assert_one_line(entered("describe", KITCHEN, "--json", *words), says)


@pytest.mark.parametrize(
    "text", ['["knife"]', '{"p.png": 3}', '{"p.png": [{"name": "knife"}]}', "{", b"\xff\xfe"]
)
def test_an_unusable_list_of_objects_is_named(entered, tmp_path: Path, text: str | bytes) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "p.png")
    (tmp_path / "objects.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_one_line(entered("describe", tmp_path / "p.png"), str(tmp_path / "objects.json"))


@pytest.mark.parametrize(
    "words",
    [
        ("describe", KITCHEN, "--colour"),
        ("describe", KITCHEN, "--max-new-tokens", "0"),
        ("describe", KITCHEN, "--max-new-tokens", "many"),
        ("describe",),
        ("paint", KITCHEN),
    ],
)
def test_a_wrong_option_exits_with_2(entered, words: tuple[object, ...]) -> None:
    code, out, err = entered(*words)
    assert (code, out) == (2, "") and "Usage: lvlm-fix" in err and "Traceback" not in err


def test_methods_lists_each_method_with_its_settings(entered) -> None:
    code, out, err = entered("methods", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["name"] for row in rows] == list(METHODS)
    for row in rows:
        settings = ",".join(f"{key}={value!r}" for key, value in row["settings"].items())
        assert lvlm_fix.methods.parse(f"{row['name']}({settings})") == [METHODS[row["name"]]()]
        assert row["summary"] and row["paper"] and row["stages"]
        assert not {"name", "paper"} & set(row["settings"])
    code, out, err = entered("methods")
    assert (code, err) == (0, "") and all(name in out for name in METHODS)


def test_a_missing_file_of_answers_says_what_to_do(entered, tmp_path: Path) -> None:
    missing = tmp_path / "nothing.json"
    result = entered("score", "pope", "--questions", missing, "--answers", missing)
    assert_one_line(result, f"{missing}")
    assert "check the path" in result[2]
    result = entered("score", "pope", "--questions", tmp_path, "--answers", tmp_path)
    assert_one_line(result, f"cannot use {tmp_path}: is a directory")
