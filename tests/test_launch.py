"""What is kept between launches (``kernels/_plans.py``, ``fastvit/ops/_instant.py``) changes nothing but the time they take.

The scenarios run in a process of their own, without the interpreter: Triton binds and caches as on a GPU, compiling and the
launch itself are faked, and each launch is compared with the one that Triton makes by itself.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    *(f"repeats {name}" for name in ("layer_norm", "add_layer_norm", "linear + gelu", "mlp", "attention", "attention, mask")),
    *(f"repeats {name}" for name in ("image_attention, windows", "glu", "qk_norm_rope", "rotary_attention")),
    *(f"trains {name}" for name in ("layer_norm", "add_layer_norm", "linear + gelu", "mlp", "attention")),
    *(f"trains {name}" for name in ("image_attention, windows", "glu", "qk_norm_rope")),
    "a_block_trains",
    "a_block_of_images_trains",
    "a_block_trains_under_autocast",
    "a_block_trains_with_stochastic_depth",
    "blocks_infer",
    "blocks_infer_with_sums_and_norms_in_their_products",
    "eight_bits",
    "a_blocks_parameters_frozen_and_thawed",
    "a_block_lets_go_of_what_it_saved",
    "backward_is_given_what_forward_saved",
    "a_parameter_frozen_and_thawed",
    "gradients_add_up_over_steps",
    "tensors_changed_before_backward_are_refused",
    "what_is_saved_is_let_go",
    "a_second_derivative_is_refused",
    "hooks_on_saved_tensors_see_the_same_in_every_call",
    "checkpoints_recompute_from_recipes",
    "autocast_with_nothing_to_cast",
    "nothing_is_filled_with_zeros_for_backward",
    "compiled_graphs_repeat_operators_too",
    "alignment_is_part_of_the_signature",
    "one_tensor_in_two_places",
    "parameters_given_other_memory",
    "strides_and_sizes_are_part_of_the_signature",
    "eps_of_another_value_and_type",
    "the_stream_of_the_moment",
    "another_device",
    "launch_hooks_see_every_launch",
    "knobs_that_are_set",
    "an_unknown_triton",
    "small_grids_are_dependent_launches",
    "nothing_is_launched_under_record",
    "the_backend_of_the_moment",
    "gradients_wanted_later",
    "autocast_switched_on_later",
    "modes_see_the_operator",
    "tensors_negated_when_read",
    "bad_input_is_refused_after_good",
    "what_a_rule_leaves_to_the_vendor",
]


@functools.cache
def _results() -> dict[str, str | None]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "tests.launch_scenarios"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_every_scenario_is_listed():
    assert sorted(_results()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_launch_from_a_plan_is_the_launch_triton_makes(name):
    problem = _results()[name]
    assert problem is None, problem
