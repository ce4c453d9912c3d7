"""Private names of peft and transformers: what each is taken for.

A release that changes one fails here, by name. Those of torch are in tests/posterior/test_torch_private.py.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear
from torch import nn

import monteclora
from monteclora import MonteCLoRATrainer
from monteclora.adapters.layers import DrawnLayer, DrawnLinear
from monteclora.adapters.model import MonteCLoRAModel
from monteclora.adapters.peft_private import cast_input, monteclora_loss
from monteclora.adapters.transformers_private import checkpoint_function, earlier_names, set_checkpoint_function
from monteclora.adapters.tuner import MonteCLoRATuner
from monteclora.posterior import AdapterPosterior
from monteclora.posterior.torch_private import MovableModule
from tests.models import TARGETS, llama, perceptron


def plain() -> tuple[nn.Module, Linear]:
    model = peft.get_peft_model(perceptron(), LoraConfig(r=2, target_modules=TARGETS[perceptron]))
    return model, model.base_model.model.first


def test_a_lora_layer_casts_its_input_where_that_is_not_switched_off() -> None:
    model, layer = plain()
    x = torch.ones(2, dtype=torch.bfloat16)
    assert cast_input(layer, x, torch.float32).dtype == torch.float32
    with disable_input_dtype_casting(model):
        assert cast_input(layer, x, torch.float32) is x


def test_the_loss_of_pefts_own_monteclora() -> None:
    model, _ = plain()
    assert monteclora_loss(model.base_model) == 0.0  # peft's, of a model without such an adapter
    signature = inspect.signature(LoraModel._get_monteclora_loss)
    assert [name for name, p in signature.parameters.items() if p.default is p.empty] == ["self"]


def test_the_checkpointing_function_of_blocks() -> None:
    model = llama()
    block = model.model.layers[0]
    assert checkpoint_function(block) is None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    function = checkpoint_function(block)
    set_checkpoint_function(block, lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs))
    model.train()(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert calls == [1]


def test_the_map_from_earlier_names_is_the_one_that_peft_reads() -> None:
    model = llama()
    model._checkpoint_conversion_mapping = {"old": "new"}
    assert earlier_names(model) == {"old": "new"}
    assert '"_checkpoint_conversion_mapping"' in inspect.getsource(PeftModel.from_pretrained)


# where a private name of these libraries may stand, and nowhere else in the package
FILES = {
    "posterior/torch_private.py",
    "adapters/peft_private.py",
    "adapters/transformers_private.py",
}


def private_names(tree: ast.Module) -> Iterator[str]:
    """Names with one leading underscore that a module takes from elsewhere: attributes, imports, and overrides."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    stored = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
    defined |= {ast.unparse(target).removeprefix("self.") for target in stored}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in defined
            names = [] if own else [node.attr]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            names = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names] if node.module != "__future__" else []
        else:
            names = []
        yield from (name for name in names if name.startswith("_") and not name.startswith("__"))


def test_no_other_file_uses_a_private_name_of_a_library() -> None:
    root = Path(monteclora.__file__).parent
    trees = {file.relative_to(root).as_posix(): ast.parse(file.read_text()) for file in root.rglob("*.py")}
    # of Python itself, and a private method of the same class
    known = {"_exit", "_fields", "_represent_str"}
    found = {name: sorted({*private_names(tree)} - known) for name, tree in trees.items()}
    assert {name for name, used in found.items() if used} == FILES, {k: v for k, v in found.items() if v}


def test_no_class_overrides_a_private_method_of_a_library() -> None:
    ours = (DrawnLayer, DrawnLinear, MonteCLoRAModel, MonteCLoRATuner, AdapterPosterior, MonteCLoRATrainer)
    for own in ours:
        mine = [cls for cls in own.__mro__ if cls.__module__.startswith("monteclora") and cls is not MovableModule]
        others = [cls for cls in own.__mro__ if not cls.__module__.startswith("monteclora")]
        names = {name for cls in mine for name in vars(cls) if name.startswith("_") and not name.startswith("__")}
        assert not {name for name in names - {"_abc_impl"} if any(name in vars(cls) for cls in others)}, own
