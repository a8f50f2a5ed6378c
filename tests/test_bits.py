"""The recording of a checkout's bits: what it tells apart, and what it names when two differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.bits.entries import differences, digest, files, keys_and_values


def test_a_comparison_names_what_changed_what_went_and_what_came() -> None:
    before, after = {"same": "0", "changed": "1", "went": "2"}, {"same": "0", "changed": "3", "came": "4"}
    assert [line.split(":")[0] for line in differences(before, after)] == ["changed", "went", "came"]
    assert not differences(before, dict(before))


def test_one_bit_a_type_and_a_shape_are_differences() -> None:
    zeros = np.zeros((2, 2), np.float32)
    others = [np.array([[0, 0], [0, -0.0]], np.float32), zeros.astype(np.int32), zeros.reshape(4), zeros[:1]]
    assert len({digest(array) for array in (zeros, *others)}) == 5
    assert digest(zeros) == digest(np.zeros((2, 4), np.float32)[:, ::2])  # however it lies in memory


def test_a_document_keeps_its_keys_and_loses_its_times() -> None:
    first = {"n": 1, "seconds": 0.5, "backend": "engine 1.2.3, CPU", "rows": [{"passes": [3, 4]}]}
    entries = dict(keys_and_values(first))
    assert entries == dict(keys_and_values(first | {"seconds": 0.7, "backend": "engine 1.2.4, CPU"}))
    assert differences(entries, dict(keys_and_values({key: first[key] for key in ("n", "backend", "rows")})))
    assert differences(entries, dict(keys_and_values(first | {"rows": [{"passes": [3, 5]}]})))


def test_every_file_of_a_folder_is_an_entry(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "one.json").write_text("{}")
    before = dict(files(tmp_path))
    (tmp_path / "records" / "one.json").write_text("{} ")
    (tmp_path / "two.npy").write_bytes(b"2")
    assert len(differences(before, dict(files(tmp_path)))) == 2
