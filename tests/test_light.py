"Test the reading of images as they are and with their light corrected."

from dataclasses import replace

import numpy as np
import pytest
import torch

from dr_transfer.core import build_learner, classifier_learner, fit, predict_probs
from dr_transfer.data.fundus import READERS, corrects_light, plain_reader, read_image
from dr_transfer.data.tasks import TASKS, get_task
from dr_transfer.data.views import LOCAL, VIEWS, correct_light, stack_images, view_name
from dr_transfer.features.classifiers import FeatureClassifier
from dr_transfer.features.extraction import extract_features, image_features
from dr_transfer.inference.saved_model import image_model
from dr_transfer.models.backbones import create_body
from dr_transfer.models.network import make_body
from dr_transfer.synthetic.fundus import draw_fundus
from dr_transfer.training.callbacks import RandomLight
from dr_transfer.training.plans import Phase, Plan

STEPS = Plan('steps', (Phase(frozen=-1, epochs=1, lr=1e-2),))
BODY = Plan('body', (Phase(frozen=0, epochs=1, lr=1e-4),))


def eyes(n=4, size=96):
    "Synthetic photographs as uint8 (n, 3, size, size)"
    images = []
    for seed in range(n):
        drawn, *_ = draw_fundus(grade=3, seed=seed, size=size)
        image = read_image(drawn, size, 'fundus', 'pad')
        images.append(image)
    return stack_images(images)


def mean_difference(a, b):
    difference = a.float() - b.float()
    return difference.abs().mean()


def normalized(x):
    return x.float() / 127.5 - 1


def test_the_correction_resembles_that_of_the_reader():
    image = draw_fundus(grade=3, seed=1, size=192)[0]
    plain = read_image(image, 192, 'fundus', 'pad')
    x = stack_images([plain])
    flat = read_image(image, 192, 'fundus_flat', 'pad')
    want = stack_images([flat])
    got = correct_light(x)
    both = [values.numpy().ravel().astype(float) for values in (got, want)]
    correlation = np.corrcoef(*both)
    assert correlation[0, 1] > 0.8


def test_another_light_makes_hardly_a_difference():
    x = eyes()
    across = torch.linspace(0.75, 1, x.shape[-1])
    dim = (x * across).round().to(torch.uint8)
    before = mean_difference(x, dim)
    corrected = correct_light(x)
    corrected_dim = correct_light(dim)
    after = mean_difference(corrected, corrected_dim)
    assert after < 0.2 * before


def test_the_surround_is_grey_and_the_contrast_the_same():
    x = normalized(eyes())
    out = correct_light(x)
    black = (x < -0.99).all(1, keepdim=True).expand_as(x)
    assert black.float().mean() > 0.1
    assert (out[black] == 0).all()
    assert out.abs().max() <= 1
    inside = out[~black]
    assert 0.15 < inside.std() < 0.3


@pytest.mark.parametrize('shape', [(1, 3, 8, 8), (2, 3, 40, 57), (3, 64, 64), (2, 2, 3, 30, 30)])
def test_any_shape(shape):
    x = torch.rand(shape) * 2 - 1
    out = correct_light(x)
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_an_image_does_not_depend_on_its_batch():
    x = normalized(eyes())
    together = correct_light(x)
    alone = torch.cat([correct_light(image[None]) for image in x])
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize('value', [0, 128, 255])
def test_an_image_of_one_value_is_grey(value):
    out = correct_light(torch.full((1, 3, 20, 20), value, dtype=torch.uint8))
    assert (out == 128).all()


@pytest.mark.parametrize('name', VIEWS)
def test_all_views_of_a_batch_are_those_of_the_functions(name):
    x = normalized(eyes(2, 48))
    views = VIEWS[name]
    functions = list(views)
    all_views = list(views.of(x))
    assert len(functions) == len(views)
    assert len(all_views) == len(views)
    for view, of_all in zip(functions, all_views):
        alone = view(x)
        assert torch.equal(alone, of_all)
    with pytest.raises(IndexError):
        views[len(views)]


def test_a_name_belongs_to_one_view():
    "Features are stored under the name of the view"
    x = normalized(eyes(1, 48))
    results = {}
    for name, views in VIEWS.items():
        for i, out in enumerate(views.of(x)):
            of_name = results.setdefault(view_name(name, i), [])
            of_name.append(out)
    for first, *others in results.values():
        for out in others:
            assert torch.equal(out, first)
    assert len(results['none']) == len(VIEWS)


def test_readers_with_both_lights():
    twice = [name for name in READERS if corrects_light(name)]
    assert twice == ['fundus_and_local']
    image = draw_fundus(grade=2, seed=0, size=80)[0]
    for name in twice:
        plain = plain_reader(name)
        assert plain in READERS
        given = read_image(image, 64, name, 'pad')
        want = read_image(image, 64, plain, 'pad')
        assert np.array_equal(given, want)


def test_the_task_names_the_views():
    dr = get_task('dr')
    assert corrects_light(dr.reader)
    assert dr.augment == 'quarter_turns'
    assert dr.views == dr.stored_views == 'quarter_turns+local'
    one = replace(dr, reader='fundus')
    assert not corrects_light(one.reader)
    assert one.views == 'quarter_turns'
    endless = replace(dr, augment='random_crop')
    assert endless.views is None
    assert endless.stored_views == 'none+local'
    others = [task.reader for name, task in TASKS.items() if name != 'dr']
    assert not any(map(corrects_light, others))


# ---------------------------------------------------------------- features


def test_views_that_are_stored_already_are_not_computed_again(fundus_data, tmp_path):
    body = make_body(create_body('test_resnet', 'random'), 48, 'plain')
    images = sorted((fundus_data / 'images').iterdir())[:5]
    read = dict(size=48, fit='pad', folder=tmp_path, bs=5)
    extract_features(images, body, reader='fundus', views='quarter_turns', **read)
    computed = []
    body.stages[0].register_forward_hook(lambda module, x, out: computed.append(len(out)))
    both = extract_features(images, body, reader='fundus_and_local', views='quarter_turns+local', **read)
    assert both.views == 8
    assert sum(computed[1:]) == 4 * 5  # the first finds the number of channels
    again = extract_features(images, body, reader='fundus', views='quarter_turns', **read)
    assert np.array_equal(both.numpy()[:, :4], again.numpy())


def test_a_classifier_of_both_lights_as_a_learner(fundus_data, weights):
    learn = build_learner(fundus_data, 'dr', 'test_resnet', weights, size=64, runtime='plain')
    images = learn.table.image.tolist()
    read = dict(size=64, reader='fundus_and_local', fit='pad', views='quarter_turns' + LOCAL)
    features = image_features(images, 'test_resnet', weights, 'plain', **read)
    classifier = FeatureClassifier('logistic').fit(features, learn.table.target, learn.table.group)
    made = classifier_learner(classifier, fundus_data, 'dr', weights=weights, runtime='plain')
    assert made.task.reader == 'fundus_and_local'
    np.testing.assert_allclose(predict_probs(made, images), classifier.predict_proba(features), atol=1e-4)


# ---------------------------------------------------------------- learners


@pytest.fixture
def build(fundus_data, weights):
    def make(**kwargs):
        how = dict(size=64, runtime='plain', bs=8, **kwargs)
        return build_learner(fundus_data, 'dr', 'test_resnet', weights, **how)

    return make


def test_batches_keep_the_colours_and_the_learner_corrects_half_of_them(build):
    learn = build()
    x, _ = learn.dls.one_batch()
    callback = learn.random_light
    torch.manual_seed(0)
    learn.xb = (x,)
    callback.before_batch()
    (given,) = learn.xb
    n_unchanged = 0
    for before, after in zip(x, given):
        unchanged = torch.equal(before, after)
        want = correct_light(before)
        corrected = torch.allclose(want, after, atol=1e-5)
        assert unchanged != corrected
        n_unchanged += unchanged
    assert n_unchanged > 0
    assert n_unchanged < len(x)


def test_only_tasks_with_both_lights_have_the_callback(fundus_data, weights):
    for reader, has in (('fundus', False), ('fundus_and_local', True)):
        task = replace(get_task('dr'), reader=reader)
        learn = build_learner(fundus_data, task, 'test_resnet', weights, size=64, runtime='plain')
        assert any(isinstance(callback, RandomLight) for callback in learn.cbs) == has


@pytest.mark.parametrize('plan', [STEPS, BODY], ids=lambda plan: plan.name)
def test_the_network_is_trained_on_both(build, monkeypatch, plan):
    given = []
    before = RandomLight.before_batch

    def spy(self):
        before(self)
        given.append(self.learn.training)

    monkeypatch.setattr(RandomLight, 'before_batch', spy)
    learn = build()
    fit(learn, plan, stored=False, say=str)
    assert given
    assert all(given)  # never in validation


def test_tta_and_the_saved_model_average_over_both(build):
    learn = build()
    fit(learn, 'head', say=str)
    images = learn.table.image[learn.table.split == 'valid'].tolist()
    with learn.no_bar():
        p = learn.tta()[0].numpy()
    np.testing.assert_allclose(p, predict_probs(learn, images), atol=1e-4)
    model = image_model(learn)
    assert model.card.views == 'quarter_turns+local'
    each = model.probs(images, average=False)
    assert each.shape[1] == 8
    mean = each.mean(1)
    np.testing.assert_allclose(mean, p, atol=1e-4)
    as_it_is = each[:, :4].mean(1)
    corrected = each[:, 4:].mean(1)
    difference = np.abs(as_it_is - corrected)
    assert difference.max() > 1e-3
