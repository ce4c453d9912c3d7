"""Files: a plain LoRA's, and a posterior beside it that restores the rest bitwise or says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import monteclora
from monteclora import variational_loss
from monteclora.adapters import storage
from monteclora.adapters.rescaling import posterior_scale, rescale_posterior, restore_posterior
from monteclora.adapters.storage import POSTERIOR_FILE, load_posterior
from monteclora.errors import CheckpointError, ConfigError
from tests.models import (
    TARGETS,
    TASKS,
    batch_for,
    bert,
    config_for,
    gpt2,
    llama,
    llama_classifier,
    perceptron,
    posterior_of,
    stir,
    t5,
    trainable,
    wrapped,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
WEIGHTS = "adapter_model.safetensors"


def trained(build: Callable[..., nn.Module] = llama, steps: int = 2, **options: Any) -> Any:
    model = wrapped(build, **options)
    train(model, build, range(steps))
    return model


def train(model: nn.Module, build: Callable[..., nn.Module], seeds: range) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    for seed in seeds:
        (model(**batch_for(build, seed=seed)).loss + variational_loss(model)).backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None


# -- what is in the files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "lora_x", "posteriors", "rho", "0"])
@pytest.mark.parametrize("build", [bert, gpt2, t5, llama_classifier])
def test_the_adapter_file_is_that_of_a_plain_lora(tmp_path: Path, build: Callable[..., nn.Module], name: str) -> None:
    ours = monteclora.get_peft_model(build(), config_for(build), adapter_name=name)
    stir(ours)
    plain = peft.get_peft_model(
        build(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[build], task_type=TASKS[build]), adapter_name=name
    )
    stir(plain)
    files = []
    for model, folder in ((ours, tmp_path / "ours"), (plain, tmp_path / "plain")):
        model.save_pretrained(folder)
        where = folder if name == "default" else folder / name
        files.append((load_file(where / WEIGHTS), json.loads((where / "adapter_config.json").read_text())))
    (tensors, document), (expected, expected_document) = files
    assert tensors.keys() == expected.keys()
    saved = ("lora_A.weight", "lora_B.weight", "classifier.weight", "classifier.bias", "score.weight")
    assert all(key.endswith(saved) for key in tensors)
    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {
        key: (t.shape, t.dtype) for key, t in expected.items()
    }
    assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
    for settings in (document, expected_document):
        settings["target_modules"] = sorted(settings["target_modules"])
    assert document == expected_document


def test_state_dicts_taken_with_pefts_own_function_hold_no_posterior() -> None:
    """Trainers under FSDP and DeepSpeed call it."""
    model = trained()
    for state in (None, model.state_dict()):
        keys = peft.get_peft_model_state_dict(model, state_dict=state)
        assert all(".lora_" in key for key in keys)


@pytest.mark.parametrize("build", [bert, llama, gpt2, t5, perceptron])
def test_peft_loads_the_folder_without_a_warning_and_gives_our_output(
    tmp_path: Path, build: Callable[..., nn.Module]
) -> None:
    model = wrapped(build, lora_dropout=0.1, rank_pattern={TARGETS[build][0]: 2})
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # transformers' own, of peft
        plain = PeftModel.from_pretrained(build(), tmp_path)
    assert type(plain).__module__.startswith("peft")
    model.eval()
    plain.eval()
    with torch.no_grad():
        if build is perceptron:
            x = torch.randn(3, 12)
            assert torch.equal(model(x), plain(x))
        else:
            assert torch.equal(model(**batch_for(build)).logits, plain(**batch_for(build)).logits)


def test_the_model_card_says_nothing_of_the_stage(tmp_path: Path) -> None:
    wrapped(llama).save_pretrained(tmp_path / "target-folder")
    assert "target-folder." not in (tmp_path / "target-folder" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target-folder"]
    assert sorted(path.name for path in (tmp_path / "target-folder").iterdir()) == [
        "README.md",
        "adapter_config.json",
        WEIGHTS,
        POSTERIOR_FILE,
    ]


# -- what comes back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"covariance": "full", "dirichlet": "laplace"},
        {"noise": "per_example", "regulariser": "sampled", "fidelity": "paper"},
        {"num_components": 1, "r": 1, "noise_seed": 2**40},
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [bert, llama])
def test_training_goes_on_bitwise(tmp_path: Path, build: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    model = trained(build, lora_dropout=0.1, **options)
    model.save_pretrained(tmp_path)
    resumed = monteclora.from_pretrained(build(), tmp_path, is_trainable=True).train()
    ours, stored = posterior_of(model), posterior_of(resumed)
    for name in ("rho", "eta", "scale"):
        assert torch.equal(getattr(ours, name), getattr(stored, name))
    assert (stored.seed, stored.draws, stored.enabled) == (ours.seed, 2, True)
    for twin in (model, resumed):
        torch.manual_seed(3)
        train(twin, build, range(2, 5))
    after = trainable(model)
    assert after.keys() == trainable(resumed).keys()
    assert all(torch.equal(value, after[name]) for name, value in trainable(resumed).items())


def test_a_loaded_adapter_is_for_inference_unless_asked(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    model = monteclora.from_pretrained(llama(), tmp_path)
    assert not model.training or not any(p.requires_grad for p in model.parameters())
    assert monteclora.predict(model, {"input_ids": batch_for(llama)["input_ids"]}, 4).epistemic.gt(0).all()


def test_a_switched_off_posterior_stays_off(tmp_path: Path) -> None:
    model = wrapped(llama)
    posterior_of(model).enabled = False
    model.save_pretrained(tmp_path)
    assert posterior_of(monteclora.from_pretrained(llama(), tmp_path)).enabled is False


def test_modules_to_save_and_several_adapters(tmp_path: Path) -> None:
    model = wrapped(bert, modules_to_save=["classifier"])
    model.add_adapter("second", config_for(bert, r=2, noise_seed=4, modules_to_save=None))
    stir(model, seed=3)
    model.save_pretrained(tmp_path)
    assert any("classifier" in key for key in load_file(tmp_path / WEIGHTS))
    loaded = monteclora.from_pretrained(bert(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    batch = batch_for(bert)
    for name in ("default", "second"):
        assert torch.equal(posterior_of(loaded, name).rho, posterior_of(model, name).rho)
        for twin in (model, loaded):
            twin.set_adapter(name)
            twin.eval()
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_selected_adapters_only(tmp_path: Path) -> None:
    model = wrapped(llama)
    model.add_adapter("second", config_for(llama, r=2))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "second"]
    assert (tmp_path / "second" / POSTERIOR_FILE).is_file()
    model.save_pretrained(tmp_path / "other", True, ["default"])
    assert not (tmp_path / "other" / "second").exists()


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path: Path) -> None:
    wrapped(llama).save_pretrained(tmp_path / "out", is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_loading_into_the_existing_adapter_keeps_it_trainable(tmp_path: Path) -> None:
    """The Trainer does so at resuming, and with the best checkpoint at the end."""
    best = trained(steps=3)
    best.save_pretrained(tmp_path)
    for options in ({"is_trainable": True}, {}):
        model = trained(steps=1)
        model.load_adapter(tmp_path, "default", **options)
        model.train()
        assert posterior_of(model).draws == 3
        assert posterior_of(model).rho.requires_grad
        assert all(torch.equal(value, trainable(model)[name]) for name, value in trainable(best).items())


def test_a_plain_adapter_loads_beside_a_drawn_one(tmp_path: Path) -> None:
    plain = peft.get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path)
    model = wrapped(llama)
    model.load_adapter(tmp_path, "plain")
    assert model.base_model.posterior("plain") is None
    # into the drawn adapter: its posterior is not that of another mean
    trained().save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / POSTERIOR_FILE).unlink()
    before = trainable(model)
    with pytest.raises(CheckpointError, match=r"ours has no posterior.safetensors, and adapter 'default' has"):
        model.load_adapter(tmp_path / "ours", "default")
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())


def test_subfolders(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "deep" / "adapter")
    loaded = monteclora.from_pretrained(llama(), tmp_path / "deep", subfolder="adapter")
    assert torch.equal(posterior_of(loaded).rho, posterior_of(model).rho)


# -- what goes wrong -----------------------------------------------------------------------------------------------


def refused(folder: Path, match: str, base: nn.Module | None = None) -> CheckpointError:
    base = llama() if base is None else base
    before, free = list(base.state_dict()), [p.requires_grad for p in base.parameters()]
    with pytest.raises(CheckpointError, match=match) as caught:
        monteclora.from_pretrained(base, folder)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert (list(base.state_dict()), [p.requires_grad for p in base.parameters()]) == (before, free)
    return caught.value


def test_a_plain_lora_folder_and_no_folder(tmp_path: Path) -> None:
    peft.get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "peft.PeftModel.from_pretrained" in refused(tmp_path, "plain LoRA").hint
    os.environ["HF_HUB_OFFLINE"] = "1"
    refused(tmp_path / "nowhere", "neither a folder nor")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    path = tmp_path / POSTERIOR_FILE
    whole = path.read_bytes()
    for length in [*range(24), *range(24, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            storage.load_posterior(path)
        assert caught.value.hint
    refused(tmp_path, "not a readable posterior")
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError):
        storage.load_posterior(path)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    path = tmp_path / POSTERIOR_FILE
    whole = path.read_bytes()
    original = storage.load_posterior(path)
    harmless = 0
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place * 5 % 8)
        path.write_bytes(bytes(flipped))
        try:
            found = storage.load_posterior(path)
        except CheckpointError:
            continue
        # white space of the header, for one: then what is read must be what was written
        harmless += 1
        assert (found.layers, found.fields, found.seed, found.draws) == (
            original.layers,
            original.fields,
            original.seed,
            original.draws,
        )
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in original.tensors.items())
    assert harmless < 15


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64, json.dumps({"rho": 1}).encode()])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    trained().save_pretrained(tmp_path)
    (tmp_path / POSTERIOR_FILE).write_bytes(content)
    refused(tmp_path, "not a readable posterior")


def test_a_safetensors_file_that_is_no_posterior(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    shutil.copy(tmp_path / WEIGHTS, tmp_path / POSTERIOR_FILE)
    refused(tmp_path, "not a readable posterior")


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Alter a sidecar and give it the checksum that belongs to it."""
    with safetensors.safe_open(path, framework="pt") as file:
        document = json.loads(json.loads(file.metadata()["monteclora"])["document"])
    tensors = load_file(path)
    change(document, tensors)
    text = json.dumps(document, sort_keys=True)
    envelope = json.dumps({"document": text, "sha256": storage._checksum(text, tensors)})
    save_file(tensors, path, metadata={"monteclora": envelope})


def test_equal_posteriors_are_equal_files(tmp_path: Path) -> None:
    model = trained()
    contents = set()
    for number in range(8):
        model.save_pretrained(tmp_path / str(number))
        contents.add((tmp_path / str(number) / POSTERIOR_FILE).read_bytes())
    assert len(contents) == 1


def test_the_two_entries_of_older_files_are_read(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    path = tmp_path / POSTERIOR_FILE
    with safetensors.safe_open(path, framework="pt") as file:
        envelope = json.loads(file.metadata()["monteclora"])
    save_file(load_file(path), path, metadata={"monteclora": envelope["document"], "sha256": envelope["sha256"]})
    assert torch.equal(storage.load_posterior(path).tensors["rho"], posterior_of(model).rho)


def test_a_later_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    rewrite(tmp_path / POSTERIOR_FILE, lambda document, tensors: document.update(format=3, novelty=True))
    assert "Upgrade" in refused(tmp_path, "has format 3, this version reads formats 1 to 2").hint


def test_fields_of_another_version(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    rewrite(tmp_path / POSTERIOR_FILE, lambda document, tensors: document["config"].update(novelty=1))
    refused(tmp_path, "another version")


def test_tensors_of_the_wrong_shape(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    rewrite(tmp_path / POSTERIOR_FILE, lambda document, tensors: tensors.update(eta=torch.zeros(2, 2)))
    refused(tmp_path, "eta is torch.float32 of shape")


@pytest.mark.parametrize(
    "other", [{"target_modules": ["q_proj", "v_proj"]}, {"r": 2}, {"rank_pattern": {"down_proj": 2}}], ids=str
)
def test_the_posterior_of_another_adapter(tmp_path: Path, other: dict[str, Any]) -> None:
    trained().save_pretrained(tmp_path / "one")
    trained(**other).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / POSTERIOR_FILE, tmp_path / "one" / POSTERIOR_FILE)
    refused(tmp_path / "one", r"one/posterior.safetensors is the posterior of another mean than .*one/adapter_model")
    # as in a file of the first format, which does not say to which mean it belongs
    rewrite(tmp_path / "one" / POSTERIOR_FILE, lambda document, _: document.pop("mean_sha256"))
    refused(tmp_path / "one", r"does not fit this model: layer '.*_proj' \(rank")
    # into an existing adapter, before anything is changed
    model = trained()
    before = trainable(model)
    with pytest.raises(CheckpointError, match="does not fit"):
        model.load_adapter(tmp_path / "one", "default")
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())
    # and as a second one, which then does not stay half-made
    with pytest.raises(CheckpointError, match="does not fit"):
        model.load_adapter(tmp_path / "one", "second")
    assert list(model.peft_config) == ["default"]
    train(model, llama, range(1))


def test_another_number_of_components(tmp_path: Path) -> None:
    trained(num_components=3).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"eta has shape \(6, 3\), expected \(6, 4\)") as caught:
        trained().load_adapter(tmp_path, "default")
    assert "num_components" in caught.value.hint


def test_a_damaged_posterior_is_noticed_before_the_weights_are_loaded(tmp_path: Path) -> None:
    trained(steps=3).save_pretrained(tmp_path)
    whole = (tmp_path / POSTERIOR_FILE).read_bytes()
    (tmp_path / POSTERIOR_FILE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    model = trained(steps=1)
    before = trainable(model)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())


# -- interrupted saves ---------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("moment", ["weights", "configuration", "posterior", "flush"])
def test_an_interrupted_save_leaves_the_old_files_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "adapter")
    before = contents(tmp_path)
    train(model, llama, range(2, 3))

    def interrupt(*_: Any, **__: Any) -> None:
        raise Interrupted

    target = {
        "weights": "peft.peft_model.safe_save_file",
        "configuration": "peft.LoraConfig.save_pretrained",
        "posterior": "monteclora.adapters.storage.save",
        "flush": "os.fsync",
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(target, interrupt)
        with pytest.raises(Interrupted):
            model.save_pretrained(tmp_path / "adapter")
    assert contents(tmp_path) == before, "old files whole, and nothing left beside them"
    resumed = monteclora.from_pretrained(llama(), tmp_path / "adapter", is_trainable=True).train()
    train(resumed, llama, range(2, 3))
    assert all(torch.equal(value, trainable(resumed)[name]) for name, value in trainable(model).items())


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file") as caught:
        wrapped(llama).save_pretrained(tmp_path / "file")
    assert caught.value.hint
    assert (tmp_path / "file").read_text() == "mine"


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    wrapped(llama).save_pretrained(tmp_path)
    wrapped(llama).save_pretrained(str(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


# -- a calibrated scale, and a posterior that diverged -----------------------------------------------------------------


def test_a_calibration_is_forgotten_when_the_posterior_is_trained_on(tmp_path: Path) -> None:
    """Its scales of training are then those that it was calibrated to."""
    trained().save_pretrained(tmp_path)
    rescale_posterior(tmp_path, 0.5, {"criterion": "by hand"})
    model = monteclora.from_pretrained(llama(), tmp_path, is_trainable=True)
    model.eval()
    with torch.no_grad(), monteclora.posterior_sampling(model):
        model(**batch_for(llama))
    model.save_pretrained(tmp_path / "predicted")
    assert posterior_scale(tmp_path / "predicted")["factor"] == 0.5
    train(model.train(), llama, range(1))
    model.save_pretrained(tmp_path / "on")
    assert posterior_scale(tmp_path / "on")["factor"] == 1.0
    assert not restore_posterior(tmp_path / "on")
    halved = load_posterior(tmp_path / "on" / "posterior.safetensors").tensors["scale"]
    assert torch.equal(halved, posterior_of(model).scale)
    assert restore_posterior(tmp_path)
    assert torch.equal(0.5 * load_posterior(tmp_path / "posterior.safetensors").tensors["scale"], halved)


def test_a_posterior_calibrated_to_nothing_is_not_trained_on(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    rescale_posterior(tmp_path, 0.0, {})
    model = monteclora.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    with pytest.raises(ConfigError, match="trained without noise") as caught:
        model(**batch_for(llama))
    assert "--undo" in caught.value.hint
    model.eval()(**batch_for(llama))


@pytest.mark.parametrize(
    "damage", [{"trained_scale": "much"}, {"trained_scale": ["much"] * 6}, {"factor": None}, {"trained_scale": [1.0]}]
)
def test_a_damaged_calibration(tmp_path: Path, damage: dict[str, Any]) -> None:
    trained().save_pretrained(tmp_path)
    rescale_posterior(tmp_path, 0.5, {})
    rewrite(tmp_path / "posterior.safetensors", lambda fields, tensors: fields["calibration"].update(damage))
    for use in (load_posterior, lambda path: restore_posterior(path.parent)):
        with pytest.raises(CheckpointError, match="calibration does not fit") as caught:
            use(tmp_path / "posterior.safetensors")
        assert caught.value.hint


def test_a_posterior_at_its_bound_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    assert not caplog.records
    with torch.no_grad():
        posterior_of(model).rho[3] = -21.0
    model.save_pretrained(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "rho of the posterior has reached its bound of 20 and is held at it: lower the learning rate"
    ]


def test_a_posterior_far_wider_than_its_prior_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trained()
    with torch.no_grad():
        posterior_of(model).rho[:2] = 5.0  # exp(5) is 148
    model.save_pretrained(tmp_path)
    rows = len(posterior_of(model).rho)
    assert [record.getMessage() for record in caplog.records] == [
        f"the posterior is over 100 times as wide as its prior in 2 of {rows} rows: lower the learning rate"
    ]
