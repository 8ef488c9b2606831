"Was the network pretrained on the images that test it? By names of sets and of files, in checks, reports and commands."

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dr_transfer.data.known_sets import KNOWN_SETS, seen_sets, seen_words
from dr_transfer.data.leaks import leak_report
from dr_transfer.evaluation import compare as compare_module
from dr_transfer.evaluation.report import Evaluation, evaluate_model
from dr_transfer.evaluation.report_page import report_html
from dr_transfer.inference.card import ModelCard
from dr_transfer.metrics.classes import Classes, Positive
from dr_transfer.models.registry import BACKBONES, find_backbone
from dr_transfer.utils.files import TransferWarning

WORDS = 'this network was pretrained on IDRiD: the figure is not external'
TWO = Classes(('no', 'referable'), Positive('referable', ('referable',)))


@pytest.mark.parametrize(
    'name, files',
    [
        ('IDRiD', ['IDRiD_001.jpg', 'IDRiD_41.tif']),
        ('Messidor', ['20051020_43808_0100_PP.tif', '20060523_48477_0100_PP.png']),
        ('EyePACS', ['10003_left.jpeg', '10_right.jpeg']),
        ('APTOS', ['000c1434d8d7.png', 'ffec9a18a3ce.png']),
        ('DDR', ['007-0004-000.jpg']),
        ('AIROGS', ['TRAIN000001.jpg', 'DEV00001a.jpg'][:1]),
        ('ImageNet-1k', ['n01440764_10026.JPEG', 'ILSVRC2012_val_00000001.JPEG']),
    ],
)
def test_names_of_files(name, files):
    every = tuple(k.name for k in KNOWN_SETS)
    assert name in seen_sets(every, files)
    assert set(seen_sets(every, files)) - {name} <= {'ODIR'}
    assert name not in seen_sets(tuple(n for n in every if n != name), files)


@pytest.mark.parametrize(
    'file', ['a.jpg', '123456789012.jpg', 'left.jpg', 'IDRiD.jpg', 'xIDRiD_1.jpg', '2005_PP.jpg', 'image_left.png']
)
def test_other_names_of_files(file):
    assert not seen_sets(tuple(k.name for k in KNOWN_SETS), [file])


@pytest.mark.parametrize(
    'images, data, found',
    [
        (['x/IDRiD/test/a.jpg'], '', ['IDRiD']),
        (['x/a.jpg'], 'my_idrid_copy', ['IDRiD']),
        (['messidor-2/images/a.jpg'], '', ['Messidor']),
        (['x/a.jpg'], 'DDR_test', ['DDR']),
        (['x/a.jpg'], 'address', []),
        (['x/a.jpg'], 'clinic', []),
        (['idrid/1/2/3/4/a.jpg'], '', []),  # only the nearest folders
    ],
)
def test_names_of_folders(images, data, found):
    assert list(seen_sets(('IDRiD', 'Messidor', 'DDR'), images, data)) == found


def test_a_few_files_of_another_set():
    "One of a hundred is enough, because its metric is not external; one of a thousand may be chance"
    some = [f'{i}x.jpg' for i in range(99)]
    assert seen_sets(('IDRiD',), [*some, 'IDRiD_1.jpg'])
    assert not seen_sets(('IDRiD',), [*some * 10, 'IDRiD_1.jpg'])
    assert seen_words(('IDRiD',), []) == ''


def test_every_example_is_recognised_and_sets_of_the_registry_are_known():
    for k in KNOWN_SETS:
        assert k.name in seen_sets((k.name,), [f'{k.example}.png'])
    public = {name for b in BACKBONES.values() for name in b.pretrained_on}
    assert {'IDRiD', 'EyePACS', 'APTOS', 'DDR', 'AIROGS', 'ODIR', 'ImageNet-1k'} <= public
    assert {k.name for k in KNOWN_SETS} - {'Messidor'} <= public


# ---------------------------------------------------------------- where it is said


@pytest.fixture
def photographs(tmp_path):
    "Six noise images with the names of IDRiD"
    folder = tmp_path / 'clinic'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f'IDRiD_{i:03}.png')
    images = sorted(map(str, folder.iterdir()))
    labels = ['no', 'referable'] * 3
    return pd.DataFrame({'image': images, 'label': labels, 'target': labels, 'group': None, 'split': None})


class Stub:
    "A model with predictions of its own"

    def __init__(self, pretrained_on):
        self.classes = TWO
        self.about = {'arch': 'fundus_dr_mobilenet', 'reader': 'photo', 'pretrained_on': list(pretrained_on)}


@pytest.fixture
def stub_predictions(monkeypatch):
    def predicted(model, table):
        n = len(table)
        return table.assign(prediction='no', p_no=np.linspace(0.2, 0.8, n), p_referable=np.linspace(0.8, 0.2, n))

    monkeypatch.setattr('dr_transfer.evaluation.report._predicted', predicted)


def test_evaluate_and_the_report_warn(photographs, stub_predictions):
    with pytest.warns(TransferWarning, match=WORDS):
        e = evaluate_model(Stub(['EyePACS', 'IDRiD']), photographs, turns=0)
    assert '6 of 6 files have names such as IDRiD_001' in e.pretraining
    assert WORDS in report_html(e, n=20)


def test_no_warning_for_a_network_that_has_not_seen_them(photographs, stub_predictions, recwarn):
    e = evaluate_model(Stub(['ImageNet-1k']), photographs, turns=0)
    assert e.pretraining == ''
    assert 'not external' not in report_html(e, n=20)
    assert not [w for w in recwarn if issubclass(w.category, TransferWarning)]


def test_the_name_of_the_data_counts(photographs):
    t = photographs.assign(image=[f'{i}.png' for i in range(6)])
    about = {'arch': 'x', 'pretrained_on': ['IDRiD']}
    assert Evaluation(t, TWO, about).pretraining == ''
    assert Evaluation(t, TWO, about, 'idrid').pretraining.startswith(WORDS)
    assert Evaluation(t, TWO, {'arch': 'x'}, 'idrid').pretraining == ''  # a model of an earlier version


def test_the_leak_check_warns(photographs):
    assert WORDS in str(leak_report(photographs, pretrained_on=find_backbone('fundus_dr_mobilenet').pretrained_on))
    assert 'external' not in str(leak_report(photographs))


def test_compare_says_which_backbones_have_seen_the_images(photographs):
    lines = []
    plain, random = SimpleNamespace(weights=None), SimpleNamespace(weights='random')
    recipes = {'a': ('fundus_dr_mobilenet', plain), 'b': ('fundus_dr_mobilenet', plain), 'c': ('dinov2_small', plain)}
    compare_module._say_seen(recipes, None, photographs, lines.append)
    assert len(lines) == 1
    assert lines[0].startswith(f'fundus_dr_mobilenet: {WORDS}')
    compare_module._say_seen({'a': ('fundus_dr_mobilenet', random)}, None, photographs, lines.append)
    compare_module._say_seen(recipes, 'random', photographs, lines.append)
    assert len(lines) == 1


def test_a_saved_model_keeps_the_sets(run):
    from dr_transfer.inference.saved_model import load_model

    card = load_model(Path(run) / 'model', 'plain').card
    assert card.pretrained_on == ()  # test_resnet is not in the registry
    about = card.to_dict()
    assert 'pretrained_on' not in about
    again = ModelCard.from_dict({**about, 'pretrained_on': ['IDRiD']})
    assert again.pretrained_on == ('IDRiD',)
    assert again.to_dict()['pretrained_on'] == ['IDRiD']


def test_sisters_in_the_hub_are_known(tmp_path, monkeypatch):
    from dr_transfer.models import registry

    monkeypatch.setenv('DR_TRANSFER_WEIGHTS', str(tmp_path))
    for repo in ('ClementP/FundusDRGrading-tiny', 'other/tiny'):
        folder = tmp_path / repo.replace('/', '--')
        folder.mkdir()
        (folder / 'config.json').write_text('{"architecture": "test_resnet"}')
    assert 'IDRiD' in registry.find_backbone('hf_hub:ClementP/FundusDRGrading-tiny').pretrained_on
    assert registry.find_backbone('hf_hub:other/tiny').pretrained_on == ()
