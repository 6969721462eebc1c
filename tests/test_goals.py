"""The goals a GPU run is read by: what is asked of which row, with results that are made up."""

import pytest

from benchmarks import cases, goals, models, results, sam, suite, tables, training
from benchmarks.settings import Settings

EVERYTHING = Settings("cuda", {"gemm_tflop_s": 790.0, "copy_gb_s": 4300.0})


def row(op, case, direction="forward", **values):
    return results.new_row(case, op, direction, "bf16", [8]) | values


def verdicts(rows, title):
    chosen = [goal for goal in goals.GOALS if goal.title == title]
    assert chosen, title
    return {one.case: one.verdict for one in goals.findings(rows, chosen)}


def test_every_goal_asks_something_of_a_whole_run():
    """No goal names a case, pass or part that a GPU's run does not have."""
    rows = [task.row for part in suite.PARTS for task in suite.tasks(part, EVERYTHING)]
    for goal in goals.GOALS:
        for case in goal.cases:
            alone = goals.Goal(goal.title, goal.op, goal.direction, (case,), goal.value, goal.least, goal.most)
            assert any(goals._asks(alone, row) for row in rows), (goal.title, case)


def test_without_results_nothing_is_measured():
    found = list(goals.findings([]))
    assert {one.verdict for one in found} == {"not measured"}
    assert {one.goal.title for one in found} == {goal.title for goal in goals.GOALS}
    assert all(line.endswith("| not measured |") for line in goals.table([])[2:])


@pytest.mark.parametrize(("peer", "verdict"), [(1.16, "met"), (1.14, "missed")])
def test_ratio_to_the_fastest_peer(peer, verdict):
    title = "attention, d = 64, N = 197 to 1370"
    rows = [row("attention", "ViT-B/16 224", ours_ms=1.0, peers={"eager": 9.0, "sdpa_cudnn": peer})]
    found = verdicts(rows, title)
    assert found.pop("ViT-B/16 224") == verdict
    assert set(found.values()) == {"not measured"}
    (line,) = [line for line in goals.table(rows) if line.startswith(f"| {title} ")]
    assert line.startswith(f"| {title} | ≥ 1.15 | ")
    assert line.endswith(f" | {peer:.4g}, ViT-B/16 224 | {verdict} (3 not measured) |")


def test_the_kernel_is_not_what_dispatch_chose():
    rows = [row("attention", "SAM-B global, no bias", ours_ms=1.0, kernel_ms=1.25, peers={"sdpa": 1.0})]
    assert verdicts(rows, "attention, d = 64, N = 4096, dispatched") == {"SAM-B global, no bias": "met"}
    assert verdicts(rows, "attention, d = 64, N = 4096, the kernel") == {"SAM-B global, no bias": "missed"}
    rows[0]["kernel_ms"] = 1.05
    assert verdicts(rows, "attention, d = 64, N = 4096, the kernel") == {"SAM-B global, no bias": "met"}


def test_what_is_level_within_its_quartiles_is_not_missed():
    """Where dispatch serves the vendor's kernel, the ratio is noise around 1; another row that is slower is named."""
    level = row("linear", "a", ours_ms=1.0, peers={"eager": 0.99}, paired_ratio=0.99, ratio_quartiles=[0.98, 1.01])
    slower = row("linear", "b", ours_ms=1.0, peers={"eager": 0.995}, paired_ratio=0.995, ratio_quartiles=[0.993, 0.998])
    title = "linears, dispatched"
    assert verdicts([level, slower], title) == {"a, forward": "met, within its quartiles", "b, forward": "missed"}
    for rows, says in (
        ([level], "0.99, a, forward | met, within its quartiles |"),
        ([level, slower], "0.995, b, forward | missed |"),
    ):
        (line,) = [line for line in goals.table(rows) if line.startswith(f"| {title} ")]
        assert line.endswith(f" | {says}")
    named = slower | {"case": "SAM-H fc1", "ratio_quartiles": [0.9, 1.2]}
    assert verdicts([named], "fc1 + GELU")["SAM-H fc1"] == "missed"  # a lead that is asked for is asked of the median


@pytest.mark.parametrize(("ms", "verdict"), [(1.24, "met"), (1.26, "missed")])
def test_a_bias_is_held_against_our_time_without_one(ms, verdict):
    rows = [row("attention", "SAM-H global", ours_ms=ms), row("attention", "SAM-H global, no bias", ours_ms=1.0)]
    title = "attention, SAM-H global, over our time without positions"
    assert verdicts(rows, title)["SAM-H global"] == verdict
    assert verdicts(rows[:1], title)["SAM-H global"] == "not measured"


def test_shares_of_the_copy_and_inductor():
    rows = [row("layer_norm", "ViT-B/16 224, batch 256", ours_ms=1.0, floor_ms=0.85, peers={"eager": 0.5, "compile": 1.1})]
    assert set(verdicts(rows, "LayerNorm forward, of copy bandwidth").values()) == {"missed"}
    assert set(verdicts(rows, "LayerNorm forward, over Inductor").values()) == {"met"}
    rows[0]["pass"] = "backward"
    assert set(verdicts(rows, "LayerNorm backward, of copy bandwidth").values()) == {"met"}


def test_whole_models():
    graphs = {"fastvit": "replay", "compile_graph": "replay", "eager": "events", "compile_max_autotune": "replay"}
    peers = {"eager": 0.8, "compile_graph": 0.35, "compile_max_autotune": 0.3}
    events = {"fastvit": 0.7, "eager": 0.8, "compile_graph": None, "compile_max_autotune": 0.3}
    one = row("model", "ViT-B/16 224, batch 1", ours_ms=0.2, peers=peers, timed=graphs, events_ms=events)
    many = row(
        "model", "ViT-B/16 224, batch 256", ours_ms=17.0, images_s=15058.0, peers={"compile": 17.5, "compile_max_autotune": 18.0}
    )
    rows = [one, many, row("sam", "SAM-H encoder, batch 8", images_s=90.0, ours_ms=89.0)]
    assert verdicts(rows, "ViT, batch 1, over compile as CUDA graphs")["ViT-B/16 224, batch 1"] == "met"
    assert verdicts(rows, "ViT, batch 1, over eager")["ViT-B/16 224, batch 1"] == "met"  # eager as called, ours replayed
    assert verdicts(rows, "ViT-B/16, batch 1") == {"ViT-B/16 224, batch 1": "met"}
    assert verdicts(rows, "ViT-B/16, batch 256") == {"ViT-B/16 224, batch 256": "met"}
    assert verdicts(rows, "ViT, batch 256, over max-autotune")["ViT-B/16 224, batch 256"] == "missed"
    assert verdicts(rows, "SAM-H encoder, batch 8") == {"SAM-H encoder, batch 8": "missed"}


def test_a_bare_replay_is_not_what_a_user_calls():
    ours = {"accelerated": 0.9, "accelerated_graph": 0.28, "accelerated_cuda_graphs": 0.31}
    one = row("model", "ViT-B/16 224, batch 1", ours_ms=0.28, peers={"eager": 0.9}, ours_variants=ours)
    assert verdicts([one], "ViT-B/16, batch 1") == {one["case"]: "missed"}
    assert verdicts([one], "ViT, batch 1, over eager")[one["case"]] == "missed"
    ours["accelerated_cuda_graphs"] = 0.29
    assert verdicts([one], "ViT-B/16, batch 1") == {one["case"]: "met"}
    assert verdicts([one], "ViT, batch 1, over eager")[one["case"]] == "met"


def test_compiling_an_accelerated_model_makes_it_no_slower():
    ours = {"accelerated": 1.0, "accelerated_compile": 1.01, "accelerated_graph": 0.5}
    one = row("model", "ViT-B/16 224, batch 1", ours_ms=0.5, peers={"compile": 1.0, "eager": 2.0}, ours_variants=ours)
    many = row("model", "ViT-B/16 224, batch 256", ours_ms=1.0, peers={"compile": 1.02}, ours_variants=ours)
    step = row("training", "ViT-B/16 224, batch 64", "step", ours_ms=0.9, peers={"sdpa": 1.0}, ours_variants={"accelerated": 0.9})
    rows = [one, many, step]
    over_original = "ViT-B/16, compiled, over the original compiled"
    assert verdicts(rows, over_original) == {one["case"]: "missed", many["case"]: "met"}
    assert set(verdicts(rows, "ViT-B/16, compiled, over not compiled").values()) == {"met"}
    assert set(verdicts(rows, "training step, compiled, over not compiled").values()) == {"not measured"}
    ours["accelerated_compile"] = 1.03
    assert set(verdicts(rows, "ViT-B/16, compiled, over not compiled").values()) == {"missed"}


def test_fp8_first_calls_and_launches():
    rows = [row("model", "ViT-L/16 224, batch 64, fp8", ours_ms=1.0, vs_bf16=1.5, cosine=0.9985)]
    rows += [row("linear", "fc1", "first_call", ours_ms=2900.0), row("linear", "fc1", "launch", ours_ms=0.021)]
    assert set(verdicts(rows, "FP8 over our bf16").values()) == {"met"}
    assert set(verdicts(rows, "FP8, cosine of the features").values()) == {"missed"}
    assert verdicts(rows, "first call, empty caches") == {"fc1": "met"}
    assert verdicts(rows, "launch, on the CPU") == {"fc1": "missed"}


def test_int8_is_shown_and_asked_nothing():
    rows = [row("model", "ViT-L/16 224, batch 64, int8", ours_ms=1.0, vs_bf16=0.7, cosine=0.9999)]
    assert not any(one.case == rows[0]["case"] for one in goals.findings(rows))
    rows.append(row("sam", "SAM-H encoder, batch 8, int8", ours_ms=1.0, vs_bf16=1.3, cosine=0.99995))
    *lines, count = goals.listed(rows)
    line = next(line for line in lines if line.startswith("INT8 over our bf16 "))
    assert line.split()[-3:] == ["–", "0.7", "information"]
    assert count.startswith("0 met, 0 missed, ")
    (line,) = [line for line in goals.table(rows) if line.startswith("| INT8, cosine of the features | – | ")]
    assert line.endswith(" | 0.9999, ViT-L/16 224, batch 64, int8 | information |")


@pytest.mark.parametrize(("gpu", "said"), [("NVIDIA H100 80GB HBM3", " (set for an H200)"), ("NVIDIA H200", ""), ("", "")])
def test_absolute_goals_say_what_gpu_they_were_set_for(gpu, said):
    rows = [row("model", "ViT-B/16 224, batch 256", ours_ms=17.0, images_s=15058.0, peers={"sdpa": 20.0})]
    lines = goals.table(rows, gpu)
    assert any(line.startswith(f"| ViT-B/16, batch 256{said} | ") for line in lines)
    assert any(line.startswith("| fc1 + GELU | ") for line in lines)
    assert any(line.startswith(f"ViT-B/16, batch 256{said}  ") for line in goals.listed(rows, gpu))


def test_what_failed_is_missed():
    rows = [row("training", "ViT-B/16 224, batch 64", "step", error="WrongResult: x")]
    title = "training step, over torch.compile"
    assert verdicts(rows, title) == {"ViT-B/16 224, batch 64": "missed: WrongResult: x"}
    (line,) = [line for line in goals.table(rows) if title in line]
    assert line.endswith("| – | missed |")


def test_printed_from_a_file(tmp_path, capsys):
    about = {"gpu": "H200", "commit": "0123456789", "date": "2026-01-31", "versions": {"torch": "2.13.0"}}
    rows = [row("linear", "ViT-B/16 224 fc1", ours_ms=1.0, peers={"eager": 1.06})]
    results.write(tmp_path / "x.json", about | {"rows": rows})
    assert tables.main(["--goals", str(tmp_path / "x.json")]) == 0
    printed = capsys.readouterr().out
    assert "fc1 + GELU" in printed
    assert "2 met, 0 missed" in printed
    assert "H200" in printed
    results.write(tmp_path / "x.json", about | {"gpu": "none", "rows": rows})
    assert tables.main(["--goals", str(tmp_path / "x.json")]) == 2
    assert tables.main(["--goals", str(tmp_path / "absent.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_names_that_goals_and_plans_go_by():
    assert {case.name for case in cases.ATTENTION} >= {*goals.LENGTHS_64, *goals.LENGTHS_80}
    assert [len(list(part.tasks(EVERYTHING))) for part in (models, sam, training)] == [23, 14, 2]
