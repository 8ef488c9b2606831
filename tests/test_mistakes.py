"Make each of the six mistakes of the source texts on purpose, and compare the result with that of the library."

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.model_selection import train_test_split

from dr_transfer.core import build_learner
from dr_transfer.data.augment import AUGMENTATIONS
from dr_transfer.data.fundus import read_image
from dr_transfer.data.leaks import LeakError, split_data
from dr_transfer.data.split import split_table
from dr_transfer.data.table import label_table
from dr_transfer.data.tasks import GRADE, REFERABLE, TASKS, encode_target, get_task, task_dataloaders
from dr_transfer.inference.saved_model import ImageModel
from dr_transfer.models.backbones import create_body
from dr_transfer.models.network import create_head
from dr_transfer.models.registry import find_backbone
from dr_transfer.models.stages import layer_groups
from dr_transfer.synthetic.flowers import make_flowers
from dr_transfer.training.plans import PLANS

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    arch='test_resnet', weights='random', size=64, bs=8, runtime='plain', num_workers=0, device=torch.device('cpu')
)


@pytest.fixture(scope='module')
def flowers(tmp_path_factory):
    folder = tmp_path_factory.mktemp('flowers')
    make_flowers(folder, n=40, size=48, seed=0)
    return folder


def test_mistake_1_label_codes_belong_to_their_images(flowers, tmp_path):
    """FLW shuffles a table and joins codes by a new index. Here the table is shuffled with a seed, saved, read,
    split, encoded and divided into batches.
    """
    shuffled = tmp_path / 'shuffled.csv'
    t = label_table(flowers).sample(frac=1, random_state=42)
    codes = pd.Series(pd.factorize(t.label)[0])
    wrong = t.assign(code=codes)  # as the text has it: joined by index
    assert (wrong.code.map(dict(enumerate(pd.unique(t.label)))) == wrong.label).mean() < 0.6, (
        'otherwise the test shows nothing'
    )

    t[['image', 'label']].to_csv(shuffled, index=False)
    for table in (
        label_table(flowers, shuffled),
        label_table(pd.read_csv(shuffled)),
        t,
    ):
        assert [Path(i).parent.name for i in table.image] == table.label.tolist()
        task = get_task('flowers', 48, 'none')
        target = get_task('flowers').target()
        dls = task_dataloaders(split_table(encode_target(table, target), seed=1), task, target, bs=8)
        for ds in (dls.train_ds, dls.valid_ds):
            assert [dls.vocab[int(y)] for _, y in ds] == [Path(i).parent.name for i in ds.items.image]


class Watch(torch.nn.Module):
    "Store the batch that a network gets"

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        self.batch = x.detach().clone()
        return self.net(x)


@pytest.mark.parametrize('arch', ['test_resnet', 'efficientnet_lite0', 'torchvision.alexnet'])
def test_mistake_2_rgb_with_the_statistics_of_the_backbone(tmp_path, arch):
    """FLW passes BGR, with the preprocessing of another network. Here the input of the network is checked in training
    and in prediction.
    """
    set_path = tmp_path / 'set'
    colour = np.array([250, 120, 10])
    spec = find_backbone(arch)
    for c in 'ab':
        (set_path / c).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.full((64, 64, 3), colour - [i, 0, 0], np.uint8)).save(set_path / c / f'{i}.png')
    learn = build_learner(set_path, **{**SMALL, 'arch': arch}, augment='none', allow_leaks=True)
    want = (colour / 255 - spec.mean) / spec.std
    bgr = (colour[::-1] / 255 - spec.mean) / spec.std
    other = (colour / 255 - 0.4) / 0.3
    assert min(abs(want - bgr).max(), abs(want - other).max()) > 0.2, 'otherwise the test shows nothing'
    for dl in (learn.dls.valid, learn.dls.train):
        x = dl.one_batch()[0]
        assert np.allclose(x[:, 1:].mean((0, 2, 3)), want[1:], atol=1e-4)
        assert abs(x[:, 0].mean() - want[0]) < 6 / 255 / spec.std[0]
    stages = create_body(arch, 'random')
    watch = Watch(torch.nn.Sequential(stages, create_head('linear', stages.n_out, 2)))
    ImageModel(
        watch,
        {
            'arch': arch,
            'stage': 'last',
            'n_stages': 1,
            'head': {},
            'task': '',
            'target': '',
            'classes': ['a', 'b'],
            'size': 64,
            'reader': 'photo',
            'fit': 'crop',
            'views': 'none',
            'mean': spec.mean,
            'std': spec.std,
        },
    ).probs([set_path / 'a' / '0.png'])
    assert np.allclose(watch.batch[0].mean((1, 2)), want, atol=1e-4)  # the rest of the batch is padding
    assert find_backbone('efficientnet_lite0').mean != find_backbone('torchvision.alexnet').mean


def test_mistake_3_colour_fundus_images_and_not_angiography(fundus_data):
    """DR states fluorescein angiography, which is grey. The library mentions it only where the mistake is described,
    and colour is kept at each step.
    """
    pages = {
        p: '\n'.join(''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'])
        for p in (ROOT / 'nbs').rglob('*.ipynb')
        if '.ipynb_checkpoints' not in p.parts
    }
    pages |= {
        p: p.read_text(encoding='utf-8')
        for p in (ROOT / 'README.md', ROOT / 'settings.ini', *(ROOT / 'dr_transfer').rglob('*.py'))
    }
    assert len(pages) > 140, 'otherwise nothing is read'
    named_in = {p.name for p, text in pages.items() if re.search('angiogra', text, re.I)}
    assert named_in <= {'20_tasks.ipynb', 'checklist.ipynb'}
    assert '*colour fundus photographs*' in pages[ROOT / 'nbs' / 'data' / '20_tasks.ipynb']
    task = TASKS['dr']
    for a in task.augment.split('+'):
        assert AUGMENTATIONS[a].keeps_color
    assert not AUGMENTATIONS['colour_jitter'].keeps_color
    image = label_table(fundus_data).image[0]
    pixels = np.asarray(read_image(image, 48, task.reader, task.fit), int)
    assert (pixels[..., 0] - pixels[..., 2])[pixels.max(2) > 60].mean() > 30  # red, and not grey


def test_mistake_4_five_grades_or_two_classes_have_names(fundus_data):
    """DR states "4 labels" and "binary layer" in one paragraph. Here there are five grades or referable, by name,
    and the head has as many outputs.
    """
    assert (GRADE.classes, REFERABLE.classes) == (tuple('01234'), ('no', 'referable'))
    assert [t.name for t in TASKS['dr'].targets] == ['referable', 'grade']
    for target, n in (('grade', 5), ('referable', 2), (None, 2)):
        learn = build_learner(fundus_data, 'dr', target=target, allow_leaks=True, **SMALL)
        assert learn.dls.c == learn.model[1][-1].out_features == len(learn.dls.vocab) == n
        assert learn.record.target == (target or 'referable')
    few = pd.DataFrame({'image': list('abc'), 'label': ['0', '1', '4']})
    assert encode_target(few, REFERABLE).target.tolist() == [
        'no',
        'no',
        'referable',
    ]  # grade 1 is not referable in any set
    with pytest.raises(ValueError, match="unknown target of task 'dr' 'binary'"):
        get_task('dr').target('binary')
    with pytest.raises(ValueError, match='unknown grade'):
        encode_target(few.assign(label=['0', '1', '5']), GRADE)


@pytest.mark.parametrize('arch', ['test_resnet', 'test_vit', 'torchvision.alexnet', 'efficientnet_lite0'])
def test_mistake_5_the_first_two_groups_are_the_nearest_to_the_input(arch):
    """DR states "the top two layers" and means the two nearest to the input. Here
    the groups nearest to the input are frozen.
    """
    body = create_body(arch, 'random')
    called = []
    where = {id(p): i for i, ps in enumerate(layer_groups(body).values()) for p in ps}
    hooks = [
        m.register_forward_pre_hook(
            lambda m, _: called.extend(where[id(p)] for p in m.parameters(recurse=False) if id(p) in where)
        )
        for m in body.modules()
    ]
    with torch.no_grad():
        body(torch.randn(1, 3, body.spec.size, body.spec.size))
    for h in hooks:
        h.remove()
    first = [called.index(i) for i in range(max(called) + 1)]
    assert first == sorted(first)
    assert len(first) >= 3  # the groups in order from the input
    phase = PLANS['all_but_stem'].phases[-1]
    n = len(layer_groups(body)) + 1
    assert phase.frozen == 2
    assert phase.first_trained(n) == 2
    assert PLANS['all_but_stem'].phases[-1].rates(n)[2:] == sorted(phase.rates(n)[2:])


@pytest.mark.parametrize('what', ['flowers', 'fundus_data'])
def test_mistake_6_no_patient_and_no_photographer_in_two_subsets(request, what):
    "FLW splits at random; DR has two eyes of a patient, flowers many of a photographer."
    t = label_table(request.getfixturevalue(what))
    assert t.group.notna().all()
    assert t.group.value_counts().max() > 1
    a, b = train_test_split(t, test_size=0.2, random_state=42)
    assert set(a.group) & set(b.group), 'otherwise the test shows nothing'
    task = TASKS['dr' if what == 'fundus_data' else 'flowers']
    for seed in range(5):
        s = split_data(request.getfixturevalue(what), task, task.target(), seed=seed)
        train, valid = (set(s.group[s.split == k]) for k in ('train', 'valid'))
        assert train
        assert valid
        assert not train & valid
    random = t.assign(split=np.where(t.index.isin(b.index), 'valid', 'train'))  # such a given split is an error
    with pytest.raises((LeakError, ValueError), match='two subsets'):
        split_data(random, task, task.target())
