"Images and folders with names that a shell, a spreadsheet, a web page or a file system may misinterpret."

import os
import shutil

import pandas as pd
from inputs import case

NAMES = {
    'longest': 'n' * 250 + '.jpg',
    'not text': os.fsdecode(b'\xff\xfe\x80.jpg'),
    'newline': 'a\nb.jpg',
    'return': 'a\rb.jpg',
    'tab': '\ta.jpg',
    'dash': '-x.jpg',
    'option': '--help.jpg',
    'formula': '=cmd()|x.jpg',
    'plus': '+1.jpg',
    'at': '@SUM(1).jpg',
    'quotes': '"\'"".jpg',
    'one quote': "'a.jpg",
    'quoted formula': "'=1.jpg",
    'emoji': '🌷🏳️‍🌈.jpg',
    'right to left': 'a\u202egpj.jpg',
    'zero width': 'a\u200b.jpg',
    'space before': ' a.jpg',
    'space after': 'a.jpg .jpg',
    'dot after': 'a..jpg',
    'like above': '...jpg',
    'two dots': '..a.jpg',
    'comma': 'a,b;c\td.jpg',
    'html': '<script>alert(1)<&.jpg',
    'percent': '%s%n%d{0}{x}.jpg',
    'backslash': 'a\\b.jpg',
    'dollar': '$(id)`id`.jpg',
    'star': '*.jpg',
    'hash': '#.jpg',
    'colon': 'C:x.jpg',
    'escape': '\x1b[31m.jpg',
    'bell': '\x07.jpg',
    'upper': 'A.JPG',
    'decomposed': 'a\u0308.jpg',
    'nan': 'nan.jpg',
    'number': '1e5.jpg',
    'null': 'NULL.jpg',
    'device': 'CON.jpg',
    'comment': '#a.jpg',
    'separator': 'a\u2028b.jpg',
    'tilde': '~.jpg',
}
SAFE = {k: v for k, v in NAMES.items() if k not in ('longest',)}
CLASSES = {
    'formula': '=cmd()',
    'semicolon': 'bolt;red',
    'newline': 'a\nb',
    'option': '--out',
    'space': ' ',
    'dot after': 'rose.',
    'emoji': '🌷',
    'probability': 'p_x',
    'error': 'error',
    'image': 'image',
    'prediction': 'prediction',
    'not text': os.fsdecode(b'\xff\xfe'),
    'nan': 'nan',
    'long': 'c' * 200,
    'html': '<b>&',
    'true': 'True',
    'number': '007',
    'decision': 'decision',
    'dict': '{"a": 1}',
    'dollar': '$x^{2',
    'twin': 'DAISY',
}


@case('names', NAMES)
def image_name(at, name):
    "A good image with an odd name, found in a folder and in the table again."
    shutil.copy(at.flower, at.data / name)
    return at.predict()


@case('names', {k: NAMES[k] for k in ('dash', 'option', 'formula', 'not text', 'newline', 'emoji', 'at', 'tilde')})
def image_name_alone(at, name):
    "A good image with an odd name, passed alone as a relative path, with the table printed."
    shutil.copy(at.flower, at.work / name)
    command = at.predict('./' + name, images=[at.work / name], data=None)
    command.words = [w for w in command.words if w not in ('--out', command.outs[0])]
    command.outs = []
    return command


@case('names')
def twins_by_case(at):
    "Two images whose names differ in capitals only."
    for name in ('a.jpg', 'A.jpg', 'a.JPG'):
        shutil.copy(at.flower, at.data / name)
    return at.predict()


@case('names')
def many_names_at_once(at):
    "All odd names in one folder of a class, for training."
    at.copy_flowers()
    for name in SAFE.values():
        shutil.copy(at.flower, at.data / 'daisy' / name)
    return at.train()


@case('names')
def many_names_prepared(at):
    "All odd names in one folder, prepared."
    for i, name in enumerate(v for k, v in SAFE.items() if k != 'upper'):
        shutil.copy(at.fundus / 'images' / sorted(os.listdir(at.fundus / 'images'))[i % 20], at.data / name)
    return at.preprocess()


@case('names')
def names_in_labels(at):
    "Odd names in the labels of an evaluation."
    (at.data / 'images').mkdir()
    names = [v for k, v in SAFE.items() if k not in ('not text', 'space before', 'space after', 'return')]
    for i, name in enumerate(names):
        shutil.copy(sorted((at.fundus / 'images').iterdir())[i % 24], at.data / 'images' / name)
    pd.DataFrame({'image': names, 'grade': [i % 5 for i in range(len(names))]}).to_csv(
        at.data / 'labels.csv', index=False
    )
    return at.evaluate(named=('labels.csv', *names))


@case('names', CLASSES)
def class_name(at, name):
    "A class folder with an odd name."
    at.copy_flowers()
    (at.data / 'roses').rename(at.data / name)
    return at.train(images=18, culprit=(name, 'class', 'folder'), also=no_table)


def no_table(outcome):
    "Check that an error about a folder does not speak of a table."
    return ['an error about a CSV file, though there is none'] if 'CSV file in UTF-8' in outcome.err else []


@case('names')
def class_of_spaces(at):
    "Two class folders that differ by a space at the end."
    at.copy_flowers()
    (at.data / 'roses').rename(at.data / 'daisy ')
    return at.train(named=('daisy', 'class'))


@case(
    'names',
    {
        'daisy and DAISY': ('daisy', 'DAISY'),
        'composed': ('ä', 'a\u0308'),
        'numbers': ('1', '01'),
        'lookalike': ('rose', 'rоse'),
    },
)
def class_twins(at, names):
    "Two class folders that look alike."
    at.copy_flowers()
    (at.data / 'daisy').rename(at.data / '0')
    (at.data / 'roses').rename(at.data / names[1])
    (at.data / '0').rename(at.data / names[0])
    return at.train(images=18, named=(*names, 'class'))


@case('names')
def a_name_of_200000_characters(at):
    "A name in labels.csv that no file can have."
    at.copy_fundus()
    with open(at.data / 'labels.csv', 'a', encoding='utf-8') as f:
        f.write('n' * 200_000 + '.jpg,1,p,left\n')
    return at.train('--task', 'dr', images=24, named=('labels.csv', 'nnn'))


@case('names')
def a_folder_of_ten_thousand_other_files(at):
    "One image among ten thousand files that are not images."
    shutil.copy(at.flower, at.data / 'good.jpg')
    for i in range(10_000 if os.environ.get('DR_TRANSFER_HOSTILE') == 'all' else 1_000):
        (at.data / f'{i}.txt').touch()
    return at.predict()


@case(
    'names',
    {
        'folder named csv': 'x.csv',
        'folder named jpg': 'x.jpg',
        'hidden': '.x',
        'formula': '=x',
        'not text': os.fsdecode(b'\xff'),
    },
)
def data_name(at, name):
    "The data folder itself has an odd name."
    data = shutil.copytree(at.flowers, at.home / name)
    return at.train(data=data, images=18)
