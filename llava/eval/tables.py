"""Tables as files: reads tab-separated text, and writes a workbook that Excel, pandas and openpyxl read."""

import csv
import io
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from llava.errors import DataError, counted
from llava.eval.entries import Entry, read_text

_EXPECTED = "tab-separated columns, named in the first line"
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # not allowed in XML
_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_TYPES = "http://schemas.openxmlformats.org/package/2006/content-types"
_FIXED = {
    "[Content_Types].xml": f'<Types xmlns="{_TYPES}">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Override PartName="/xl/workbook.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>'
    '<Override PartName="/xl/worksheets/sheet1.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{_RELATIONS}">'
    f'<Relationship Id="rId1" Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{_OFFICE}">'
    '<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_RELATIONS}">'
    f'<Relationship Id="rId1" Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}
_YEAR = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can have, so that equal tables give equal bytes


def read_table(path: Path, columns: Sequence[str]) -> list[Entry]:
    """Returns the rows of a tab-separated file, in which a cell may be quoted, as objects of texts by column name.

    columns: names that the first line must have. Raises DataError.
    """
    limit = csv.field_size_limit(sys.maxsize)  # of the process: pictures are longer than the default
    reader = csv.reader(io.StringIO(read_text(path, _EXPECTED), newline=""), delimiter="\t", strict=True)
    try:
        names = next(reader, [])
        if missing := [name for name in columns if name not in names]:
            raise DataError(
                f"{path}, line 1: lacks the names of the columns {', '.join(missing)}; expected {_EXPECTED}"
            )
        return [_row(f"{path}, line {reader.line_num}", names, cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; expected {_EXPECTED}") from None
    finally:
        csv.field_size_limit(limit)


def _row(where: str, names: Sequence[str], cells: Sequence[str]) -> Entry:
    if len(cells) != len(names):
        raise DataError(f"{where}: has {counted(len(cells), 'cell')}; expected {len(names)}, as in line 1")
    return Entry(where, dict(zip(names, cells, strict=True)))


def workbook(rows: Sequence[Sequence[str | int]]) -> bytes:
    """Returns an .xlsx file with one sheet. Characters that XML does not allow become spaces."""
    lines = "".join(f'<row r="{i}">{_cells(row, i)}</row>' for i, row in enumerate(rows, start=1))
    sheet = f'<worksheet xmlns="{_MAIN}"><sheetData>{lines}</sheetData></worksheet>'
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in {**_FIXED, "xl/worksheets/sheet1.xml": sheet}.items():
            file.writestr(zipfile.ZipInfo(name, _YEAR), f'<?xml version="1.0" encoding="UTF-8"?>\n{text}')
    return out.getvalue()


def _cells(row: Sequence[str | int], number: int) -> str:
    return "".join(_cell(value, f"{_letters(i)}{number}") for i, value in enumerate(row) if value != "")


def _cell(value: str | int, at: str) -> str:
    if isinstance(value, int):
        return f'<c r="{at}"><v>{value}</v></c>'
    text = escape(_CONTROL.sub(" ", value))
    return f'<c r="{at}" t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


def _letters(column: int) -> str:
    """Returns the name of a column: A to Z, AA, AB, …"""
    first, last = divmod(column, 26)
    return (_letters(first - 1) if first else "") + chr(ord("A") + last)
