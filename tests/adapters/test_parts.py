"""Parts of a model that are called on their own draw, as the whole does."""

from __future__ import annotations

import pytest
import torch

from monteclora import variational_loss
from tests.adapters.test_architectures import CASES, inputs, wrapped
from tests.models import batch_for, bert, gradients, posterior_of
from tests.models import wrapped as wrapped_model

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_features_of_text_and_images_draw_once_each_and_reach_rho() -> None:
    """The usual loop around CLIP never calls the whole model."""
    case = next(case for case in CASES if case.model == "CLIPModel")
    model, batch = wrapped(case).train(), inputs(case)
    clip, posterior = model.get_base_model(), posterior_of(model)
    loss = torch.zeros(())
    for count in (1, 2):
        text = clip.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        image = clip.get_image_features(pixel_values=batch["pixel_values"])
        assert posterior.draws == 2 * count
        loss = loss + sum(getattr(found, "pooler_output", found).square().sum() for found in (text, image))
    (loss + variational_loss(model)).backward()
    gradients(model)
    assert bool((posterior.rho.grad != 0).all())


def test_a_backbone_inside_a_classifier_draws_once() -> None:
    model = wrapped_model(bert, target_modules=["query", "classifier"], task_type=None)
    batch = batch_for(bert)
    del batch["labels"]
    for count in (1, 2):
        model.get_base_model().bert(**batch)
        assert posterior_of(model).draws == count
