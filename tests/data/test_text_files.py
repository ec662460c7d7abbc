"""Plain sources as people bring them: line ends, encodings, pages, arrays, tables that differ, folders of all kinds."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pretrain
from data.documents import documents
from pretrain.cli.main import main
from pretrain.data.encodings import likely_encoding
from pretrain.data.readers import Reading, read_file
from pretrain.data.sources import resolve_sources, unused_options
from pretrain.data.table_readers import delimiter_of
from pretrain.errors import DataError

GOOD = [f"document number {k} says hello,\nto the other {k * k} documents" for k in range(40)]


def texts(source: Any, **options: Any) -> list[str]:
    return [text for found in resolve_sources(source, **options)[0] for text in documents(found)]


def notes(source: Any, **options: Any) -> list[str]:
    (found,), _ = resolve_sources(source, **options)
    list(found.pieces())
    return found.notes


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_line_ends_and_byte_order_marks(tmp_path: Path, end: str, encoding: str) -> None:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_bytes(text.replace("\n", end).encode(encoding))
        return tmp_path / name

    assert texts(write("a.txt", "\n\n".join(GOOD)), separator="\n\n") == GOOD
    assert texts(tmp_path / "a.txt", separator="\r\n\r\n") == GOOD
    assert texts(write("b.txt", "one\ntwo é\n")) == ["one\ntwo é\n"]
    flat = [text.replace("\n", " ") for text in GOOD]
    rows = [json.dumps({"text": text}) for text in flat]
    assert texts(write("c.jsonl", "\n".join(rows) + "\n")) == flat
    assert texts(write("d.json", "[\n" + ",\n".join(rows) + "\n]\n")) == flat
    assert texts(write("e.csv", 'text,n\n"' + '",1\n"'.join(flat) + '",1\n')) == flat
    assert texts(write("f.tsv", "n\ttext\n" + "".join(f"1\t{text}\n" for text in flat))) == flat


@given(
    text=st.text(st.sampled_from("a\r\n\u2028\u2029\x85\x0b\x0c é"), max_size=30),
    size=st.integers(1, 7),
)
@example(text="a\r\n\r\nb\r\rc\n\nd", size=1)
@settings(max_examples=80, deadline=None)
def test_only_carriage_returns_are_changed(
    tmp_path_factory: pytest.TempPathFactory, text: str, size: int
) -> None:
    """Line separators of Unicode are characters of the text and end no line, document or row."""
    import pretrain.data.readers as readers

    folder = tmp_path_factory.mktemp("ends")
    (folder / "a.txt").write_bytes(text.encode())
    before, readers._BLOCK = readers._BLOCK, size
    try:
        parts = list(read_file(folder / "a.txt", Reading()))
    finally:
        readers._BLOCK = before
    assert "".join(part for part, _ in parts) == text.replace("\r\n", "\n").replace("\r", "\n")
    kept = text.replace("\r", "").replace("\n", "") + "x"
    (folder / "a.jsonl").write_text(json.dumps({"text": kept}, ensure_ascii=False) + "\n")
    (folder / "a.csv").write_text(f"text,n\n{kept},1\n{kept},2\n", newline="")
    (folder / "b.txt").write_text(f"{kept}\n\n{kept}", newline="")
    assert texts(folder / "a.jsonl") == [kept]
    assert texts(folder / "a.csv") == texts(folder / "b.txt", separator="\n\n") == [kept, kept]


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}\n')
    assert texts(tmp_path / "a.jsonl") == ["a? b 😀"]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Le café était fermé à Noël; “naïve” — où est-il? Über größe.\n"),
        ("cp1251", "Привет, как дела? Москва — столица России.\n"),
        ("koi8_r", "Привет, как дела? Москва столица России.\n"),
        ("shift_jis", "今日は天気がいいです。東京へ行きました。\n"),
        ("euc_jp", "今日は天気がいいです。東京へ行きました。\n"),
        ("euc_kr", "안녕하세요. 오늘은 날씨가 좋습니다.\n"),
        ("gb18030", "今天天气很好，我们去公园散步。他的书在这里。\n"),
        ("big5", "今天天氣很好，我們去公園散步。他的書在這裡。\n"),
    ],
)
def test_other_encodings_are_named_and_read(
    tmp_path: Path, encoding: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes((text * 3).encode(encoding))
    assert likely_encoding(file) == encoding
    with pytest.raises(
        DataError, match=rf"a\.txt:1:\d+ is not UTF-8: byte 0x.*encoding='{encoding}'"
    ):
        texts(file)
    assert main(["prepare", str(file), "--out", str(tmp_path / "out")]) == 2
    assert f"--encoding {encoding}" in capsys.readouterr().err
    assert texts(file, encoding=encoding) == [text * 3]
    table = tmp_path / "a.csv"
    table.write_bytes(f'id;text\n1;"{text}"\n'.encode(encoding))
    assert texts(table, encoding=encoding) == [text]
    data = pretrain.prepare(
        file,
        tmp_path / "out",
        encoding=encoding,
        tokenizer="char",
        row_length=32,
        valid=0,
        quiet=True,
    )
    row = data.train[0]
    assert text.startswith(data.tokenizer.decode(row["input_ids"][row["document_ids"] > 0])[:20])
    assert data.manifest["options"]["encoding"] == codecs.lookup(encoding).name


def test_wrong_encoding_option(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="encoding='utf-9' is no encoding"):
        texts(tmp_path / "a.txt", encoding="utf-9")
    with pytest.raises(DataError, match="encoding='hex' is no encoding"):
        texts(tmp_path / "a.txt", encoding="hex")
    (tmp_path / "b.txt").write_bytes(b"a\n\x81 b")
    with pytest.raises(DataError, match=r"b\.txt:2 is not cp1252"):
        texts(tmp_path / "b.txt", encoding="cp1252")
    with pytest.raises(DataError, match=r"b\.txt is not utf-16: .*start with BOM"):
        texts(tmp_path / "b.txt", encoding="utf-16")


@pytest.mark.parametrize("kind", ["files", "separator", "jsonl", "csv"])
def test_few_undecodable_documents_are_left_out_and_counted(tmp_path: Path, kind: str) -> None:
    bad, options = b"caf\xe9 au lait", {}
    data = [text.replace("\n", " ").encode() for text in GOOD] + [bad]
    if kind == "files":
        for k, item in enumerate(data):
            (tmp_path / f"{k:02}.txt").write_bytes(item)
    elif kind == "separator":
        (tmp_path / "a.txt").write_bytes(b"\n\n".join(data))
        options = {"separator": "\n\n"}
    elif kind == "jsonl":
        (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"text": "%s"}\n' % item for item in data))
    else:
        (tmp_path / "a.csv").write_bytes(
            b"text,n\n" + b"".join(b'"%s",1\n' % item for item in data)
        )
    kept = [text.replace("\n", " ") for text in GOOD]
    assert texts(tmp_path, **options) == kept
    (note,) = notes(tmp_path, **options)
    assert note.startswith("1 documents cannot be decoded and are left out: ") and "cp1252" in note
    data = pretrain.prepare(
        str(tmp_path),
        tmp_path.with_name(tmp_path.name + "-out"),
        tokenizer="char",
        valid=0,
        quiet=True,
        **options,
    )
    assert data.train.num_documents == len(kept) and note in data.manifest["notes"]
    for k in range(3):
        (tmp_path / f"x{k}.txt").write_bytes(b"tr\xe8s mauvais \xe9t\xe9")
    with pytest.raises(DataError, match=r"is not UTF-8.* 4 of 44 documents are like this"):
        texts(tmp_path, **options)


def test_long_document_that_is_undecodable_stops(tmp_path: Path) -> None:
    for separator in (None, "\n\n"):
        (tmp_path / "a.txt").write_bytes(b"text " * 500_000 + b"\xe9 " + b"text " * 10)
        for k in range(60):
            (tmp_path / f"b{k}.txt").write_text("fine")
        with pytest.raises(DataError, match=r"a\.txt:1:2500001 is not UTF-8"):
            texts(tmp_path, separator=separator)


def test_pages_of_html(tmp_path: Path) -> None:
    page = """<!DOCTYPE html><html><head><meta charset="iso-8859-1"><title>A &amp; B</title>
    <style>p { color: red }</style><script>if (a < b) { "x" }</script></head><body>
    <h1>Caf\u00e9</h1><p>One <b>bold</b>ly   set
    line.<br>Next</p><ul><li>first<li>second</ul><pre>  kept
      so</pre><script>evil()</script><!-- not seen --></body></html>"""
    (tmp_path / "a.html").write_bytes(page.encode("latin-1"))
    assert texts(tmp_path) == [
        "A & B\n\nCafé\n\nOne boldly set line.\nNext\n\nfirst\nsecond\n\nkept\nso"
    ]
    (tmp_path / "a.html").write_text("<p>open <b>tags & <unknown attr='")
    (text,) = texts(tmp_path / "a.html")  # how the rest is read differs between releases of Python
    assert text.startswith("open tags &")


@pytest.mark.parametrize(
    ("labels", "encoding", "text"),
    [
        ("iso-8859-1 latin1 US-ASCII iso_8859-1:1987 x-cp1252", "cp1252", "It’s “quoted” – 100 €"),
        ("iso-8859-9 latin5", "cp1254", "İğüş – €"),
        ("tis-620 iso-8859-11 windows-874", "cp874", "สวัสดี…"),
        ("gb2312 GBK gb_2312-80 gb18030", "gb18030", "你好 鎔基 朱镕基 㐀"),
        ("big5 cn-big5", "big5hkscs", "你好 ① 嘅"),
        ("shift_jis x-sjis windows-31j", "cp932", "①株式会社 ～髙橋"),
        ("euc-kr ks_c_5601-1987 windows-949", "cp949", "똠방각하"),
        ("utf-8 utf-16 UTF-16LE utf-32 cp037 no-such", "utf-8", "Héllo"),
        ("koi8-r koi8", "koi8-r", "Привет"),
    ],
)
def test_pages_are_read_in_the_encodings_of_browsers(
    tmp_path: Path, labels: str, encoding: str, text: str
) -> None:
    place = tmp_path / "a.html"
    for label in labels.split():
        for tag in (
            f'<meta charset="{label}">',
            f'<meta http-equiv="Content-Type" content="text/html; charset={label}">',
            f"<!-- <meta charset=cp037> --><script>'<meta charset=cp866>'</script>\n<META CHARSET = {label} >",
        ):
            place.write_bytes(f"<html><head>{tag}</head><p>{text}</p>".encode(encoding))
            assert texts(place) == [text], (label, tag)


def test_what_browsers_do_with_marks_and_undefined_bytes_of_pages(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(b"<meta charset=latin1><p>a\x81\x8d\x8f\x90\x9d\xe9")
    assert texts(tmp_path / "a.html") == ["a\x81\x8d\x8f\x90\x9dé"]
    (tmp_path / "a.txt").write_bytes(b"a\x81")
    with pytest.raises(DataError, match="is not cp1252"):
        texts(tmp_path / "a.txt", encoding="cp1252")
    (tmp_path / "b.html").write_bytes(b"<meta charset=windows-1253><p>\xd2")
    with pytest.raises(DataError, match="is not cp1253"):
        texts(tmp_path / "b.html")
    for mark in ("utf-8-sig", "utf-16"):
        (tmp_path / "c.html").write_bytes("<meta charset=cp1252><p>é€".encode(mark))
        assert texts(tmp_path / "c.html") == ["é€"]


@pytest.mark.parametrize(
    "value",
    [
        [{"text": "a"}, {"text": "b"}],
        ["a", "b"],
        {"data": [{"text": "a"}, {"text": "b"}]},
        {"text": ["a", "b"], "n": [1, 2]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_over_several_lines(tmp_path: Path, value: Any, indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
    assert texts(tmp_path / "a.json") == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", "{'text': 'a'}\n", "single quotes"),
        ("a.jsonl", '{"text": "a\tb"}\n', "control character"),
        ("a.jsonl", '{"text": "a"},\n{"text": "b"}\n', "a comma stands behind the object"),
        ("a.jsonl", '{"text": "a",}\n', "a comma stands before the end"),
        ("a.jsonl", '{"text": "a",\n"b": 1}\n', "goes on in the next line"),
        ("a.jsonl", '{text: "a"}\n', "without double quotes"),
        ("a.jsonl", '// texts\n{"text": "a"}\n', "a comment"),
        ("a.jsonl", '{"text": "a"} {"text": "b"}\n', "something follows the value"),
        ("a.txt", "PK\x03\x04", r"\.xlsx"),
        ("a.jsonl", "text,label\n", "row of a table"),
        ("a.json", '[{"text": "a"}, {"text": \n', "is not valid JSON"),
        ("a.json", '{\n"title": "a"\n}\n', "no column 'text'; columns present: 'title'"),
        ("a.csv", 'text,n\n"a"b,1\n', "not doubled"),
        ("a.csv", 'text,n\n"a,1\n', "never closed"),
        ("a.csv", "text,n\nab\rc,1\n", "line ends are mixed"),
    ],
)
def test_causes_that_a_user_can_see(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    with pytest.raises(DataError, match=told) as error:
        texts(tmp_path / name)
    assert name in str(error.value)


def test_delimiters(tmp_path: Path) -> None:
    for mark, name in ((";", "csv"), ("\t", "csv"), ("|", "csv"), (",", "tsv"), (";", "tsv")):
        file = tmp_path / f"a.{name}"
        file.write_text(f'"a, b"{mark}text\n"1,5"{mark}"x{mark}y"\n')
        assert delimiter_of(file, name) == mark
        assert texts(file) == [f"x{mark}y"]
    (tmp_path / "b.csv").write_text("a;b,text\n1;2,x\n")
    assert delimiter_of(tmp_path / "b.csv", "csv") == "," and texts(tmp_path / "b.csv") == ["x"]


def test_a_column_for_each_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "a.csv").write_text("body,text\nnews,no\n")
    (tmp_path / "b.jsonl").write_text('{"content": "web"}\n')
    (tmp_path / "c.tsv").write_text("text\tn\nplain\t1\n")
    columns = {"news/*.csv": "body", "b.jsonl": "content"}
    assert texts(tmp_path, text=columns) == ["web", "plain", "news"]
    out = str(tmp_path / "out")
    sources = [str(tmp_path / name) for name in ("news", "b.jsonl", "c.tsv")]
    assert (
        main(
            [
                "prepare",
                *sources,
                "--out",
                out,
                "--tokenizer",
                "char",
                "--text",
                json.dumps(columns),
            ]
        )
        == 0
    )
    data = pretrain.Prepared.open(out) if hasattr(pretrain, "Prepared") else None
    assert data is None or data.manifest["options"]["text"] == columns
    capsys.readouterr()
    assert main(["prepare", *sources, "--out", out, "--text", "{d.csv: body}"]) == 2
    assert "--text gives a column for 'd.csv', but no file" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"text gives a column for 'd\.csv'"):
        pretrain.prepare(tmp_path, out, text={"d.csv": "body"})
    with pytest.raises(DataError, match=r"must be the name of a column, or a mapping"):
        pretrain.prepare(tmp_path, out, text=["body"])


def test_what_is_passed_over_and_what_is_not_found_is_told(tmp_path: Path) -> None:
    for name in (
        "a.txt",
        "b.pdf",
        "c.PDF",
        "d.docx",
        "deep/e.png",
        "f.json",
        "README",
        ".hidden.pdf",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert notes(tmp_path, separator="\\n") == [
        f"6 files of {tmp_path} are no text and passed over: 2 .pdf, 1 .docx, 1 .json, 1 .png, 1 without a suffix",
        f"separator='\\\\n' occurs in no text file of {tmp_path}: each is one document; backslashes are ordinary "
        "characters (a shell writes $'\\n\\n')",
    ]
    assert notes(tmp_path / "a.txt") == []


def in_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(Path(name).name)


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    in_files(tmp_path, "elsewhere/b.txt", "elsewhere/c.pdf", "data/real/a.txt")
    (data / "link").symlink_to(tmp_path / "elsewhere")
    (data / "real" / "again").symlink_to(tmp_path / "elsewhere")
    (data / "real" / "loop").symlink_to(data)
    assert texts(data / "**") == ["b.txt", "c.pdf", "a.txt"]  # which matches every file by itself
    whole = ["b.txt", "a.txt"]  # by their paths, link/b.txt and real/a.txt
    for pattern in ("", "*", "**/*.txt", "*/*.txt"):
        assert texts(data / pattern) == whole, pattern
    assert notes(data) == [f"1 files of {data} are no text and passed over: 1 .pdf"]


def test_a_folder_that_a_pattern_matches_is_read_as_if_it_were_named(tmp_path: Path) -> None:
    in_files(tmp_path, "a.txt", "said", "sub/b.txt", "sub/deep/c.md", "sub/d.png", "z/.x")
    pattern = str(tmp_path / "[as]*")
    assert texts(pattern) == ["a.txt", "said", "b.txt", "c.md"]
    assert notes(pattern) == [f"1 files of {pattern} are no text and passed over: 1 .png"]
    assert texts(tmp_path / "s*") == ["said", "b.txt", "c.md"]
    assert texts(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt"]
    with pytest.raises(DataError, match=r"the folders of '.*z\*' hold no file that can be read"):
        texts(tmp_path / "z*")
    with pytest.raises(DataError, match=r"no file matches '.*y\*'"):
        texts(tmp_path / "y*")


def test_an_option_that_no_source_is_read_with_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_files(tmp_path, "a.txt", "b.md")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in GOOD))
    rows = [{"text": text} for text in GOOD]
    for source, unused in (
        (tmp_path / "a.txt", {"text"}),
        (tmp_path / "c.jsonl", {"separator"}),
        (tmp_path, set()),
        (rows, {"separator", "encoding"}),
        ("python", {"text", "separator", "encoding"}),
    ):
        found, _ = resolve_sources(source)
        sentences = unused_options(found, "body", "@@", "latin-1")
        assert {sentence.split("=")[0] for sentence in sentences} == unused, source
        assert unused_options(found, "text", None, None) == []
    made = pretrain.prepare(rows, separator="@@", tokenizer="char", row_length=32, quiet=True)
    told = "separator='@@' has no effect: no source is a plain text file"
    assert told in made.manifest["notes"]
    pretrain.train_tokenizer(rows, "char", separator="@@")
    assert told in capsys.readouterr().err
    assert any("'@@' occurs in no text file of" in note for note in notes(tmp_path, separator="@@"))
