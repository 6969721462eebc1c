"""Which launch config a shape gets: bounds, relatives of a GPU, its shared memory, tables of the user's own."""

import json

import pytest
import torch
from fastvit.kernels import _plans, _tuning

ROWS = [
    {"when": {"head_dim": 64, "queries": 128}, "config": {"BLOCK": 1}, "shared": 90000},
    {"when": {"head_dim": 64}, "config": {"BLOCK": 2}, "shared": 60000},
    {"when": {}, "config": {"BLOCK": 3}, "shared": 30000},
]


@pytest.fixture
def fresh():
    """Nothing that was looked up before or inside is remembered."""

    def forget():
        for remembered in (_tuning.committed, _tuning.table, _tuning.shared_memory, _tuning.config):
            remembered.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.parametrize(
    ("shape", "limit", "block"),
    [
        ({"head_dim": 64, "queries": 128}, None, 1),
        ({"head_dim": 64, "queries": 129}, None, 2),
        ({"head_dim": 65, "queries": 1}, None, 3),
        ({"head_dim": 64, "queries": 128}, 90000, 1),
        ({"head_dim": 64, "queries": 128}, 89999, 2),
        ({"head_dim": 64, "queries": 128}, 59999, 3),
    ],
)
def test_the_first_row_that_fits_is_taken(shape, limit, block):
    assert _tuning.first_fitting(ROWS, shape, limit)["config"] == {"BLOCK": block}


def test_nothing_fits_in_too_little_memory():
    assert _tuning.first_fitting(ROWS, {"head_dim": 64, "queries": 1}, 29999) is None


@pytest.mark.parametrize(
    ("target", "served_by"),
    [
        ("sm_90", "sm_90"),
        ("sm_87", "sm_80"),
        ("sm_86", "default"),
        ("sm_89", "default"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_110", "default"),
        ("sm_130", "default"),
        ("gfx950", "gfx942"),
        ("gfx1100", "default"),
        ("interpreter", "default"),
    ],
)
def test_a_gpu_without_a_table_has_its_relatives(target, served_by):
    assert _tuning.nearest(target) == served_by


def test_a_gpu_with_less_shared_memory_gets_the_next_row_that_fits(fresh, monkeypatch):
    shape = {"element_size": 2, "head_dim": 64, "queries": 4096, "bias": 0}
    table = json.loads((_tuning.TABLES / "sm_120.json").read_text())
    row = _tuning.first_fitting(table["ops"]["attention_forward"], shape, None)
    row["shared"] = 70000
    monkeypatch.setattr(_tuning, "committed", lambda target: table)
    assert _tuning.config("attention_forward", "sm_121", **shape) == row["config"]
    _tuning.config.cache_clear()
    monkeypatch.setattr(_tuning, "shared_memory", lambda target: 65536)
    taken = _tuning.config("attention_forward", "sm_121", **shape)
    rows = table["ops"]["attention_forward"]
    assert taken in [later["config"] for later in rows[rows.index(row) + 1 :]]


def test_shared_memory_is_the_present_gpus(fresh, monkeypatch):
    class Properties:
        major, minor, shared_memory_per_block_optin = 12, 1, 101376

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert _tuning.shared_memory("sm_121") == 101376
    assert _tuning.shared_memory("sm_90") is None


@pytest.mark.parametrize("target", [*_tuning.targets(), "default"])
def test_every_table_ends_in_a_row_for_everything(target):
    for op, rows in _tuning.committed(target)["ops"].items():
        assert rows[-1]["when"] == {}, op
        assert all(row.get("shared", 0) <= _tuning.committed(target)["shared_memory"] for row in rows), op


def _write(folder, target, ops):
    (folder / f"{target}.json").write_text(json.dumps({"target": target, "provenance": "a test", "ops": ops}))


def test_a_table_of_the_users_comes_first(fresh, monkeypatch, tmp_path):
    mine = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 4}
    _write(tmp_path, "sm_90", {"attention_forward": [{"when": {"head_dim": 64, "queries": 200}, "config": mine}]})
    monkeypatch.setenv("FASTVIT_TABLES", str(tmp_path))
    shape = {"element_size": 2, "head_dim": 64, "bias": 0}
    assert _tuning.config("attention_forward", "sm_90", queries=197, **shape) == mine
    committed = _tuning.first_fitting(_tuning.committed("sm_90")["ops"]["attention_forward"], shape | {"queries": 4096}, None)
    assert _tuning.config("attention_forward", "sm_90", queries=4096, **shape) == committed["config"]
    assert _tuning.table("sm_80") == _tuning.committed("sm_80")


def test_a_users_table_may_be_older_than_a_knob(fresh, monkeypatch, tmp_path):
    older = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}
    _write(tmp_path, "sm_90", {"linear_fp8_quantized": [{"when": {}, "config": older}]})
    monkeypatch.setenv("FASTVIT_TABLES", str(tmp_path))
    assert _tuning.config("linear_fp8_quantized", "sm_90", rows=64, width=64, blocks=0) == older


def test_the_doctor_names_whose_rows_are_in_force(fresh, monkeypatch, tmp_path):
    from fastvit.cli import doctor

    committed = f"table default: {_tuning.committed('default')['provenance']}"
    assert doctor._tuning_of(torch.empty(0)) == committed
    _write(tmp_path, "interpreter", {})
    monkeypatch.setenv("FASTVIT_TABLES", str(tmp_path))
    assert doctor._tuning_of(torch.empty(0)) == f"{tmp_path / 'interpreter.json'}: a test; {committed}"


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ({"attention": []}, "no operator or entry 'attention'"),
        (
            {"attention_split": [{"when": {}, "config": {"PROGRAMS": 16, "MIN_KEYS": 16}}]},
            "a row of attention_split lacks num_warps",
        ),
        ({"attention_split": [{"when": {}, "config": {"PROGRAMS": "16", "MIN_KEYS": 16, "num_warps": 4}}]}, "are no integers"),
        ({"attention_split": [{"config": {"PROGRAMS": 16, "MIN_KEYS": 16, "num_warps": 4}}]}, "no operator or entry 'when'"),
        ({"attention_split": 4}, "not a tuning table"),
    ],
)
def test_a_table_that_is_none_is_refused_by_name(fresh, monkeypatch, tmp_path, ops, message):
    _write(tmp_path, "sm_90", ops)
    monkeypatch.setenv("FASTVIT_TABLES", str(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        _tuning.config("attention_split", "sm_90")
    assert str(tmp_path / "sm_90.json") in str(caught.value)


def test_a_folder_that_is_none_is_refused(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVIT_TABLES", str(tmp_path / "absent"))
    with pytest.raises(NotADirectoryError, match="FASTVIT_TABLES: got"):
        _tuning.config("attention_split", "sm_90")


def test_an_override_holds_inside_and_is_forgotten_outside(fresh):
    before = _tuning.config("attention_split", "sm_90")
    with _tuning.override("attention_split", {"PROGRAMS": 1}):
        assert _tuning.config("attention_split", "sm_90") == {"PROGRAMS": 1}
        assert _tuning.config("activation_backward", "sm_90") != {"PROGRAMS": 1}
    assert _tuning.config("attention_split", "sm_90") == before


def test_what_is_asked_for_is_collected_once_a_shape(fresh):
    _tuning.config("attention_split", "sm_90")
    with _tuning.asked() as found:
        for queries in (4, 8, 4):
            _tuning.config("attention_forward", "sm_90", element_size=2, head_dim=64, queries=queries, bias=0)
    assert [shape["queries"] for _, shape in found] == [4, 8]


def test_launches_are_not_repeated_from_plans_while_configs_are_measured(monkeypatch):
    monkeypatch.setattr(_plans, "_known", True)
    assert _plans.undisturbed()
    with _tuning.override("attention_split", {"PROGRAMS": 1}):
        assert not _plans.undisturbed()
    with _tuning.asked():
        assert not _plans.undisturbed()
    assert _plans.undisturbed()
