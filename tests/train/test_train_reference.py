"""The same training by transformers' own Trainer: same model, same order, Adafactor, linear, no accumulation, fp32."""

import pytest
from training_runs import SEQUENCE, make_data, make_model, make_run, torch, train_here
from transformers import AutoModelForCausalLM
from transformers.trainer import Trainer
from transformers.training_args import TrainingArguments

from launcher import metrics
from launcher.train.batches import NO_TARGET, Samples
from launcher.train.order import permutation

pytestmark = pytest.mark.train

BATCH, STEPS, SAMPLES = 8, 50, 120


class OurOrder(torch.utils.data.Sampler):
    """Epoch after epoch, the permutations of ``launcher.train.order``."""

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        self.epoch += 1
        return iter(permutation(42, self.epoch, SAMPLES).tolist())


class Reference(Trainer):
    losses: list[float]

    def _get_train_sampler(self, *_):
        return OurOrder()

    def training_step(self, *arguments, **named):
        loss = super().training_step(*arguments, **named)
        self.losses.append(float(loss))
        return loss


def padded(samples, index):
    tokens = samples.tokens_and_targets(index)[0].tolist()
    pads = SEQUENCE - len(tokens)
    # the first token is nobody's target: transformers 5 divides by the number of labels, not of targets
    return {
        "input_ids": torch.tensor(tokens + [0] * pads),
        "attention_mask": torch.tensor([1] * len(tokens) + [0] * pads),
        "labels": torch.tensor([NO_TARGET, *tokens[1:], *[NO_TARGET] * pads]),
    }


@pytest.mark.parametrize("model_type", ["starcoder2", "gpt_bigcode"])
def test_50_step_losses_are_those_of_the_trainer(tmp_path, model_type):
    model, data = make_model(tmp_path / "model", model_type), make_data(tmp_path / "data", SAMPLES)
    samples = Samples(data / "train")
    arguments = TrainingArguments(
        str(tmp_path / "reference"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=3e-3,
        optim="adafactor",
        lr_scheduler_type="linear",
        warmup_steps=5,
        weight_decay=0.1,
        max_grad_norm=1.0,
        seed=42,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    rows = [padded(samples, index) for index in range(SAMPLES)]
    reference = Reference(AutoModelForCausalLM.from_pretrained(model), arguments, train_dataset=rows)
    reference.losses = []
    reference.train()
    rates = [entry["learning_rate"] for entry in reference.state.log_history if "learning_rate" in entry]

    training = {"epochs": STEPS * BATCH / SAMPLES, "effective_batch": BATCH, "micro_batch": BATCH, "optimizer": "adafactor", "warmup": 5}
    run = make_run(tmp_path / "run", model, data, training=training, checkpoint={"every": "never"})
    assert train_here(run) == 0
    ours = metrics.read(run.metrics_file, "train")
    assert len(ours) == len(reference.losses) == STEPS
    assert max(abs(record["loss"] - loss) for record, loss in zip(ours, reference.losses, strict=True)) < 1e-5
    assert reference.losses[-1] < reference.losses[0] - 0.5, "it learns"
    # the Trainer logs the rate of the next step (transformers 4) or of this one
    assert [record["learning_rate"] for record in ours][1:] == pytest.approx(rates[:-1]) or [
        record["learning_rate"] for record in ours
    ] == pytest.approx(rates)
    final = dict(AutoModelForCausalLM.from_pretrained(run.model).named_parameters())
    for name, parameter in reference.model.named_parameters():
        torch.testing.assert_close(final[name], parameter, rtol=0, atol=2e-5)
