"""Micro batches: padding, flattened rows, blocks, dummies."""

import pytest
from training_runs import SEQUENCE, Dataset, make_data, torch

from launcher.errors import UsageError
from launcher.train.batches import NO_TARGET, Samples, collate

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return Samples(make_data(tmp_path_factory.mktemp("data"), 12) / "train")


def test_padding(samples):
    batch = collate(samples, [3, 0], "none", SEQUENCE)
    tokens = samples.tokens_and_targets(3)[0]
    length = len(tokens)
    assert batch.input_ids_BS.shape == batch.targets_BS.shape == batch.attention_mask_BS.shape == (2, SEQUENCE)
    assert batch.input_ids_BS[0, :length].tolist() == tokens.tolist()
    assert batch.targets_BS[0].tolist() == [*tokens[1:].tolist(), *[NO_TARGET] * (SEQUENCE - length + 1)]
    assert batch.attention_mask_BS[0].tolist() == [1] * length + [0] * (SEQUENCE - length)
    assert batch.num_tokens == 2 * SEQUENCE
    assert int((batch.targets_BS != NO_TARGET).sum()) == int(samples.num_targets[[3, 0]].sum())


def test_flatten_keeps_borders(samples):
    batch = collate(samples, [3, 0, 5], "flatten", SEQUENCE)
    lengths = [len(samples.tokens_and_targets(index)[0]) for index in (3, 0, 5)]
    assert batch.input_ids_BS.shape == (1, sum(lengths)) and batch.num_tokens == sum(lengths)
    assert batch.attention_mask_BS is None
    assert batch.position_ids_BS[0].tolist() == [position for length in lengths for position in range(length)]
    assert batch.documents_BS[0].tolist() == [number for number, length in enumerate(lengths) for _ in range(length)]
    last_of_each = torch.tensor(lengths).cumsum(0) - 1
    assert batch.targets_BS[0, last_of_each].tolist() == [NO_TARGET] * 3
    assert int((batch.targets_BS != NO_TARGET).sum()) == int(samples.num_targets[[3, 0, 5]].sum())


def test_blocks(tmp_path, samples):
    blocks = Samples(make_data(tmp_path, 4, full=True) / "train")
    batch = collate(blocks, [0, 1], "concatenate", SEQUENCE)
    assert batch.attention_mask_BS is None and batch.num_tokens == 2 * SEQUENCE
    assert int((batch.targets_BS != NO_TARGET).sum()) == 2 * (SEQUENCE - 1)
    with pytest.raises(UsageError, match="tokens, the preset's sequence_length is 24"):
        collate(samples, [0, 1], "concatenate", SEQUENCE)


def test_too_long_for_the_preset(samples):
    with pytest.raises(UsageError, match="the preset's sequence_length is 4"):
        collate(samples, range(12), "none", 4)


def test_a_dummy_has_no_targets(samples):
    for packing in ("none", "flatten", "concatenate"):
        batch = collate(samples, [], packing, SEQUENCE)
        assert batch.num_tokens == 0 and bool((batch.targets_BS == NO_TARGET).all())


def test_labels_say_what_is_a_target(tmp_path):
    rows = {"input_ids": [[5, 6, 7, 8]], "labels": [[NO_TARGET, NO_TARGET, 7, 8]], "num_targets": [2]}
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "labelled"))
    assert Samples(tmp_path / "labelled").tokens_and_targets(0)[1].tolist() == [NO_TARGET, 7, 8, NO_TARGET]


def test_a_wrong_number_of_targets_is_refused(tmp_path):
    Dataset.from_dict({"input_ids": [[5, 6, 7]], "num_targets": [3]}).save_to_disk(str(tmp_path / "wrong"))
    with pytest.raises(UsageError, match="sample 0 has 2 targets, its num_targets says 3"):
        Samples(tmp_path / "wrong").tokens_and_targets(0)
