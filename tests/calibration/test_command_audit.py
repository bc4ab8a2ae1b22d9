"""`caop-fast audit` as a user meets it: output, files, exit status, errors, and what it must not need."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys

import pytest

from caop_fast.calibration import command


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="caop-fast")
    command.add_parser(parser.add_subparsers(dest="command", required=True))
    return parser.parse_args(["audit", *words])


def run(*words: str) -> int:
    return command.run(parse(*map(str, words), "--resamples", "50"))


@pytest.fixture
def files(tmp_path):
    def write(name: str, stated: float, right_every: int, **extra) -> str:
        path = tmp_path / name
        path.write_text(
            "".join(
                json.dumps(
                    {
                        "id": i // 2,
                        "response": f"x Confidence: {stated:.2f}",
                        "correct": int(i % right_every == 0),
                        **extra,
                    }
                )
                + "\n"
                for i in range(200)
            )
        )
        return str(path)

    return write("before.jsonl", 0.95, 2), write("after.jsonl", 0.5, 2)


def test_table_names_arms_numbers_and_verdicts(files, capsys) -> None:
    assert run(*files) == 0
    out = capsys.readouterr().out
    assert "before: Overconfident: it states 95.0 % on average and is right 50.0 % of the time" in out
    assert "after: Calibrated" in out
    assert "difference from before" in out


def test_json_is_the_report_alone(files, capsys) -> None:
    assert (
        run(*files, "--json", "--bins", 5, "--edges", "exact", "--level", 0.9, "--seed", 3, "--baseline", "after") == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in report["models"]] == ["before", "after"]
    assert [report[k] for k in ("n_bins", "edges", "level", "n_resamples", "seed", "baseline")] == [
        5,
        "exact",
        0.9,
        50,
        3,
        "after",
    ]
    assert report["models"][0]["metrics"]["ece"] == pytest.approx(0.45)


def test_out_writes_the_folder_and_says_so(files, capsys, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "r"
    assert run(*files, "--out", out) == 0
    printed = capsys.readouterr().out
    assert sorted(os.listdir(out)) == ["audit.html", "audit.json", "reliability.png", "reliability.svg"]
    assert all(f"wrote {out / name}" in printed for name in os.listdir(out))


def test_gate_decides_the_exit_status(files, capsys) -> None:
    before, after = files
    assert run(after, "--max-ece", 0.1) == 0
    assert run(before, "--max-ece", 0.1) == 1
    assert "limit broken: before: ECE is 0.4500, above --max-ece 0.1" in capsys.readouterr().err
    assert run(before, after, "--max-ece", 0.1, "--gate", "after") == 0
    assert run(before, after, "--max-ece", 0.1, "--gate", "before") == 1
    assert run(after, "--min-auroc", 0.6) == 1


def test_fields_can_be_renamed(tmp_path, capsys) -> None:
    path = tmp_path / "x.jsonl"
    records = [{"said": 0.5, "ok": i % 2, "q": i, "who": "m1"} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, records)))
    names = ["--confidence-field", "said", "--correct-field", "ok", "--id-field", "q", "--model-field", "who"]
    assert run(path, *names, "--json") == 0
    entry = json.loads(capsys.readouterr().out)["models"][0]
    assert (entry["name"], entry["n_prompts"], entry["metrics"]["n"]) == ("m1", 20, 20)
    assert run(path) == 2


def test_lenient_is_passed_on(tmp_path, capsys) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"response": "Confidence: 85", "correct": 1}\n')
    for words, unread in (((), 1), (("--lenient",), 0)):
        assert run(path, "--json", *words) == 0
        assert json.loads(capsys.readouterr().out)["models"][0]["metrics"]["n_unparsed"] == unread


def test_bare_percentages_hint_at_lenient(tmp_path, capsys) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"response": "Confidence: 85", "correct": 1}\n{"response": "Confidence: 1.5", "correct": 1}\n')
    assert run(path) == 0
    assert "1 of the unread answers state a bare number above 10" in capsys.readouterr().out
    assert run(path, "--lenient") == 0
    assert "a bare number above 10" not in capsys.readouterr().out


def test_standard_input(monkeypatch, capsys) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b'{"confidence": 0.5, "correct": 1}\n'))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run("-", "--json") == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["name"] == "stdin"


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (None, (), "No such file"),
        ("{}\n", (), "x.jsonl:1: no field 'correct'"),
        ('{"confidence": 0.5, "correct": 1}\n', ("--baseline", "zz"), "baseline 'zz' is not one of the models: x"),
        (
            '{"confidence": 0.5, "correct": 1}\n',
            ("--gate", "zz", "--max-ece", "1"),
            "files; there are: x",
        ),
        ('{"confidence": 0.5, "correct": 1}\n', ("--gate", "x"), "--gate needs a limit"),
        ('{"confidence": 0.5, "correct": 1}\n', ("--out", "x.jsonl"), "x.jsonl"),
    ],
)
def test_unusable_input_is_status_2_with_a_reason_and_no_traceback(
    tmp_path, monkeypatch, capsys, content, words, message
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    assert run("x.jsonl", *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("caop-fast audit: error: ")
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "words",
    [
        ("--max-ece", "nan"),
        ("--max-ece", "1.1"),
        ("--min-auroc", "-0.1"),
        ("--bins", "0"),
        ("--resamples", "9.5"),
        ("--level", "1"),
        ("--edges", "odd"),
        ("--seed", "-1"),
    ],
)
def test_bad_option_values_are_refused(words, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("x", *words)
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_help_teaches_the_tool(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("examples:", "exit status", "prompt_id", "before.jsonl after.jsonl", "--max-ece", "85%", "AUROC"):
        assert word in text


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
from caop_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def blocked_run(blocked: set[str], *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    code = BLOCKED.format(blocked=blocked)
    return subprocess.run(
        [sys.executable, "-c", code, "audit", *words, "--resamples", "20"],
        capture_output=True,
        timeout=120,
        env={**os.environ, **(env or {})},
    )


HEAVY = {"torch", "triton", "transformers", "scipy", "tokenizers", "tqdm", "caop_kernels"}


def test_works_where_torch_and_matplotlib_are_absent(files, tmp_path) -> None:
    done = blocked_run(HEAVY | {"matplotlib"}, *files, "--out", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "r")) == ["audit.html", "audit.json"]
    assert "pip install caop-fast[audit]" in (tmp_path / "r" / "audit.html").read_text()
    assert b"pip install caop-fast[audit]" in done.stdout


def test_pictures_need_matplotlib_alone(files, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    done = blocked_run(HEAVY, *files, "--out", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    assert "reliability.png" in os.listdir(tmp_path / "r")


def test_prints_on_a_terminal_that_knows_only_ascii(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"confidence": 0.5, "correct": 1, "arm": "\\ud800\\u6771\\u001b[31m"}\n')
    done = blocked_run(HEAVY, str(path), env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout


@pytest.mark.parametrize("option", ["--confidence-field", "--response-field", "--id-field", "--model-field"])
def test_a_named_field_that_no_line_has_is_refused(tmp_path, capsys, option) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"confidence": 0.5, "correct": 1}\n{"confidence": 0.25, "correct": 0}\n')
    assert run(path, option, "nope") == 2
    message = capsys.readouterr().err
    assert f"{option} 'nope'" in message
    assert "confidence, correct" in message


def test_a_reader_that_went_away_is_no_broken_limit(tmp_path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"confidence": 0.5, "correct": 1}\n{"confidence": 0.25, "correct": 0}\n' * 50)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "caop_fast.cli", "audit", str(path), "--resamples", "10"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr
