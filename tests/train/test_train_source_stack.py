"""What must also hold on the source's pins, run again there: ``pytest -m source_stack tests/train`` in such an environment."""

import pytest
from test_train_adapter import (  # noqa: F401
    models,
    test_a_resumed_adapter_is_the_uninterrupted_one_to_the_last_bit,
    test_kinds_are_what_they_are_called,
    test_modules_that_are_trained_whole,
)
from test_train_attention import (  # noqa: F401
    prepared,
    test_a_window_of_5_sees_5_positions,
    test_beyond_the_sliding_window,
    test_logits_and_gradients_are_those_of_the_documents_alone,
    test_the_operators_that_run_are_counted,
    test_training_stops_when_it_falls_back_from_the_plan,
    xformers_stand_in,
)
from test_train_beside import (  # noqa: F401
    test_the_loader_gives_what_collating_gives,
    test_training_goes_on_while_a_checkpoint_is_written,
)
from test_train_models import test_15b_over_six_80_gb_gpus, test_flattened_documents_do_not_see_each_other  # noqa: F401
from test_train_order import test_everything_but_biases_and_norms_decays, test_the_permutation_is_the_same_on_every_stack  # noqa: F401
from test_train_ranks import (  # noqa: F401
    test_25_samples_on_4_ranks_are_those_of_1_rank,
    test_a_signal_to_one_rank_stops_all_and_the_resumed_run_is_the_uninterrupted_one,
)
from test_train_reference import test_50_step_losses_are_those_of_the_trainer  # noqa: F401
from test_train_resume import (  # noqa: F401
    test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit,
    test_the_adapter_loads_on_its_base,
    test_the_final_model_loads_with_its_tokenizer,
)
from test_train_speed import (  # noqa: F401
    test_chunked_is_plain_in_loss_and_gradients,
    test_small_updates_arrive_that_rounding_to_nearest_loses,
)
from training_runs import torch
from transformers import __version__

pytestmark = [
    pytest.mark.source_stack,
    pytest.mark.skipif(
        (torch.__version__.split("+")[0], __version__) != ("2.3.0", "4.41.1"),
        reason=f"needs torch 2.3.0 and transformers 4.41.1, this is {torch.__version__} and {__version__}: make test-source-stack",
    ),
]
