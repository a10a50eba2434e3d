"""Of tests with many variants a quick run does some: `make test` every k-th, `make test-all` all of them."""

from __future__ import annotations

from collections import defaultdict

import pytest

#: test -> k. The others are marked slow. (Tests whose axes covering.py thins are not here.)
EVERY = {
    "optim/test_bad_states.py::test_misfits_change_nothing": 3,
    "optim/test_quantizers.py::test_state_size": 4,
    "optim/test_quantizers.py::test_every_second_moment": 3,
    "optim/test_values.py::test_a_step_takes_a_few_chunks_of_memory": 3,
    "optim/test_values.py::test_zero_gradients_leave_zero_states": 4,
    "optim/test_values.py::test_a_bad_gradient_shows_in_the_moments": 4,
    "optim/test_parameters.py::test_arithmetic_is_in_float32_and_cast_once": 3,
    "optim/test_parameters.py::test_strides_change_nothing": 3,
    "optim/test_state_dict.py::test_copies_with_their_model": 3,
    "optim/test_state_dict.py::test_round_trip": 2,
    "test_oracle_agreement.py::test_adamw_equals_the_oracle": 2,
    "test_invariance.py::test_adamw_is_the_same_for_every_cut": 2,
    "cuda/test_kernels.py::test_adamw": 2,
    "cuda/test_kernels_factored.py::test_dtypes": 3,
    "cuda/test_kernels_memory.py::test_memory_of_ranks": 2,
    "cuda/test_kernels_memory.py::test_memory_of_a_step": 2,
    "cuda/test_kernels_optimizers.py::test_groups": 2,
    "cuda/test_kernels_optimizers.py::test_memory_off_boundaries": 3,
    "cuda/test_kernels_dispatch.py::test_other_specs_go_to_the_reference": 3,
    "cuda/test_capture.py::test_replays_are_steps": 3,
    "cuda/test_capture.py::test_adamw_s_scalars_are_the_host_s": 3,
    "checkpoint/test_dcp.py::test_state_dict_options": 3,
    "checkpoint/test_canonical.py::test_any_number_of_ranks_to_any_other": 2,
    "checkpoint/test_canonical.py::test_blocks_and_bytes_cut_between_ranks": 2,
    "checkpoint/test_bad.py::test_a_failing_rank": 2,
    "checkpoint/test_bad.py::test_spoilt_checkpoints": 2,
    "checkpoint/test_options.py::test_schedulers_go_on": 3,
    "fsdp/test_variants.py::test_every_way_to_shard_and_train": 2,
    "fsdp/test_invariance_fsdp2.py::test_dtensors_cut_anywhere": 3,
    "fsdp/test_fsdp1.py::test_across_engines_and_ranks": 2,
    "fsdp/test_exchange_fsdp2.py::test_imported_bits_do_not_depend_on_the_sharding": 2,
    "fsdp/test_gradients.py::test_not_finite_on_the_last_rank_is_seen_by_all": 2,
    "fsdp/test_gradients.py::test_an_invalid_gradient_fails_everywhere_and_changes_nothing": 2,
    "launch/test_engines.py::test_half_precisions": 3,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before pytest looks at what -m leaves out."""
    seen: dict[str, int] = defaultdict(int)
    for item in items:
        test = item.nodeid.removeprefix("tests/").partition("[")[0]
        every = EVERY.get(test)
        if every is None or item.get_closest_marker("slow"):
            continue
        if seen[test] % every:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1
