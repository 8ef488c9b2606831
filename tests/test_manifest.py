"Test manifests, URIs on a server that fails and on a real S3 server, shards, parts and merge."

import io
import json
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from helpers import cli, error_line, good, table
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dr_transfer.data.content import content_key
from dr_transfer.data.image_statistics import image_statistics
from dr_transfer.data.images import image_header, read_rgb
from dr_transfer.data.manifest import Counts, Shard, fetched_groups, find_shard, listed, open_manifest, shard_rows
from dr_transfer.data.source import ImageError
from dr_transfer.inference.merged import find_parts, merge_parts
from dr_transfer.inference.parts import Work, parts_folder, read_about, write_part, write_rows
from dr_transfer.inference.saved_model import ImageModel, load_model, save_model
from dr_transfer.metrics.calibration import apply_temperature
from dr_transfer.utils import uris

pa = pytest.importorskip('pyarrow', reason='needs the extra scale')
pq = pytest.importorskip('pyarrow.parquet')
pytestmark = pytest.mark.usefixtures('with_shared_cache')


@pytest.fixture(scope='module')
def images(tmp_path_factory, fundus_data):
    "Forty images, also as an archive, and their names."
    folder = tmp_path_factory.mktemp('many')
    shutil.copytree(fundus_data / 'images', folder / 'images')
    names = sorted(f'images/{p.name}' for p in (folder / 'images').iterdir())
    with zipfile.ZipFile(folder / 'all.zip', 'w') as z:
        for name in names:
            z.write(folder / name, name)
    return folder, names


def manifest(file, names, **columns):
    "Write a manifest, and return its path."
    t = pd.DataFrame({'image': names, **columns})
    t.to_csv(file, index=False) if file.suffix == '.csv' else t.to_parquet(file, index=False)
    return file


def cells(file):
    "A table as text, without the names of the images."
    return pd.read_csv(file, dtype=str, keep_default_na=False).drop(columns='image')


@pytest.fixture
def quick(monkeypatch):
    "Short waits and time limits."
    monkeypatch.setattr(uris, 'FETCH', uris._FetchLimits(seconds=1, attempts=2, wait=0.01))


# ---------------------------------------------------------------- a server that fails


class Server:
    "A web server on this machine that fails on purpose; `asked` counts the requests."

    def __init__(self, folder):
        server = self
        self.asked = {}
        self.stopped = threading.Event()

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self):
                kind, _, name = self.path.strip('/').partition('/')
                server.asked[self.path] = tries = server.asked.get(self.path, 0) + 1
                data = (folder / name).read_bytes() if (folder / name).is_file() else b''
                status = {'gone': 404, 'secret': 403, 'broken': 500}.get(kind, 200)
                if kind == 'busy' and tries == 1:
                    status = 503
                if kind == 'hangs':
                    server.stopped.wait(20)
                self.send_response(status)
                self.send_header('Content-Length', str(len(data)))
                self.end_headers()
                with suppress(OSError):  # the client hung up
                    self.wfile.write(data[: len(data) // 2] if kind == 'cut' else data)
                self.close_connection = True

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Answers)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f'http://127.0.0.1:{self.http.server_port}'

    def close(self):
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(scope='module')
def server(images):
    found = Server(images[0])
    yield found
    found.close()


def test_each_failure_of_a_server_is_an_error_of_its_image(tmp_path, server, images, run, quick):
    _, names = images
    kinds = ['good', 'busy', 'gone', 'secret', 'broken', 'hangs', 'cut', 'good']
    rows = [f'{server.address}/{kind}/{name}' for kind, name in zip(kinds, names)]
    file = manifest(tmp_path / 'm.csv', [*rows, 's4://bucket/a.jpg', ''])
    result = good('predict', run, file, '--out', tmp_path / 'p.csv')
    assert '3 images predicted, 7 could not be used (column error)' in result.err
    t = table(tmp_path / 'p.csv')
    assert t.image.tolist() == [*rows, 's4://bucket/a.jpg', '']
    wanted = (
        '',
        '',
        'no such file',
        'no permission to read it',
        'the server answers with the HTTP status 500 (2 attempts)',
        'no complete answer within 1 seconds (2 attempts)',
        'it cannot be fetched (ClientPayloadError',
        '',
        "unknown scheme 's4'",
        'row 10 of the manifest has no image name',
    )
    for error, start in zip(t.error, wanted):
        assert error.startswith(start) and bool(error) == bool(start)
    asked = [server.asked[f'/{kind}/{name}'] for kind, name in zip(kinds, names)]
    assert asked == [1, 2, 1, 1, 2, 2, 2, 1]  # what cannot change is not tried again; good ones are fetched once


def test_a_web_page_is_not_an_image_and_an_empty_answer_is_empty(server, quick):
    with pytest.raises(ImageError, match='empty file'):
        read_rgb(f'{server.address}/good/nothing')
    with pytest.raises(ImageError, match='no such file'):
        read_rgb(f'{server.address}/gone/a')


def test_the_time_limit_of_the_environment(server, monkeypatch, quick):
    monkeypatch.setenv('DR_TRANSFER_FETCH_SECONDS', '0.2')
    start = time.monotonic()
    with pytest.raises(ImageError, match=r'within 0\.2 seconds'):
        read_rgb(f'{server.address}/hangs/b')
    assert time.monotonic() - start < 5
    for wrong in ('0', 'a', '-1', 'nan'):
        monkeypatch.setenv('DR_TRANSFER_FETCH_SECONDS', wrong)
        with pytest.raises(ImageError, match='give seconds, more than 0'):
            read_rgb(f'{server.address}/good/b')


def test_functions_that_read_images_take_uris(server, images):
    folder, names = images
    for uri in (
        f'{server.address}/good/{names[0]}',
        f'zip://{names[0]}::{folder}/all.zip',
        f'file:{"//"}{folder}/{names[0]}',
    ):
        assert np.array_equal(read_rgb(uri, 32), read_rgb(folder / names[0], 32))
        assert image_header(uri) == image_header(folder / names[0])
        assert content_key(uri) == content_key(folder / names[0])
        pd.testing.assert_frame_equal(image_statistics([uri]), image_statistics([folder / names[0]]))
    with pytest.raises(ImageError, match='no such file'):
        read_rgb(f'zip://ghost.jpg::{folder}/all.zip')


def test_labels_of_uris(tmp_path, server, images, fundus_data, run):
    from dr_transfer.data.table import label_table, skipped_images

    labels = pd.read_csv(fundus_data / 'labels.csv', dtype=str)
    column = next(c for c in labels if Path(labels[c][0]).suffix or (fundus_data / 'images' / labels[c][0]).exists())
    labels[column] = [f'{server.address}/good/images/{Path(name).name}' for name in labels[column]]
    labels.loc[0, column] += '.gone'
    labels.to_csv(tmp_path / 'labels.csv', index=False)
    found, local = label_table(tmp_path / 'labels.csv'), label_table(fundus_data)
    assert len(found) == len(local) - 1
    assert skipped_images(found).reason.tolist() == ['empty file']
    kept = local[local.image.map(lambda p: Path(p).name).isin(found.image.map(lambda u: u.rpartition('/')[2]))]
    assert found.label.tolist() == kept.label.tolist() and found.group.tolist() == kept.group.tolist()
    p = tmp_path / 'report'
    good('evaluate', run, tmp_path / 'labels.csv', '--allow-leaks', '--resamples', '100', '--out', f'{p}.html')
    assert table(f'{p}_predictions.csv').image.tolist() == found.image.tolist()


def test_a_scheme_without_its_package(tmp_path, run, monkeypatch):
    file = manifest(tmp_path / 'm.csv', ['gs://bucket/a.jpg'])
    monkeypatch.setattr('dr_transfer.data.manifest._CHECKED', set())
    monkeypatch.setitem(sys.modules, 'gcsfs', None)
    line = error_line('predict', run, file, '--out', tmp_path / 'p.csv')
    assert 'this needs gcsfs' in line and "pip install 'dr_transfer[gcs]'" in line
    assert not (tmp_path / 'p.csv').exists()


# ---------------------------------------------------------------- a real S3 server


@contextmanager
def environment(**values):
    with pytest.MonkeyPatch.context() as m:
        for name, value in values.items():
            m.setenv(name, value)
        yield


@pytest.fixture(scope='module')
def bucket(images):
    "A bucket of the server of moto with the images, and credentials in the environment."
    pytest.importorskip('s3fs', reason='needs the extra scale')
    motoserver = pytest.importorskip('moto.server', reason='needs moto[server], which the extra dev installs')
    import s3fs

    started = motoserver.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    address = f'http://{host}:{port}'
    names = {'AWS_ACCESS_KEY_ID': 'me', 'AWS_SECRET_ACCESS_KEY': 'secret', 'AWS_DEFAULT_REGION': 'us-east-1'}
    with environment(**names, AWS_ENDPOINT_URL=address, AWS_EC2_METADATA_DISABLED='true'):
        system = s3fs.S3FileSystem(skip_instance_cache=True)
        system.mkdir('clinic')
        folder, names = images
        for name in names:
            system.pipe_file(f'clinic/a/{name}', (folder / name).read_bytes())
        system.pipe_file('clinic/a/empty.jpg', b'')
        system.pipe_file('clinic/a/half.jpg', (folder / names[0]).read_bytes()[:700])
        yield system, address
        started.stop()


def test_predictions_from_s3_equal_those_from_a_folder(tmp_path, bucket, images, run):
    system, _ = bucket
    folder, names = images
    good('predict', run, folder / 'images', '--out', tmp_path / 'local.csv')
    rows = [*names, 'vanished.jpg', 'empty.jpg', 'half.jpg', names[0]]
    for suffix in ('.csv', '.parquet'):
        file = manifest(tmp_path / f'm{suffix}', rows, eye='left')
        system.put_file(str(file), f'clinic/a/m{suffix}')
        result = good('predict', run, f's3://clinic/a/m{suffix}', '--out', tmp_path / f'p{suffix}.csv')
        assert '40 images predicted, 3 could not be used (column error); 1 rows name an image again' in result.err
        t = table(tmp_path / f'p{suffix}.csv')
        assert t.image.tolist() == rows[:-1] and set(t.data_eye) == {'left'}
        assert t.error[40:42].tolist() == ['no such file', 'empty file'] and t.error[42]
        local = cells(tmp_path / 'local.csv')
        pd.testing.assert_frame_equal(cells(tmp_path / f'p{suffix}.csv')[:40][local.columns], local)


def test_no_permission_and_no_credentials(tmp_path, bucket, run, quick, monkeypatch):
    from urllib.request import Request, urlopen

    import s3fs

    _, address = bucket
    file = manifest(tmp_path / 'm.csv', ['s3://clinic/a/images/x.jpg'])
    plain = {'Content-Type': 'text/plain'}

    def allow(n):
        "Let the server answer so many requests before it checks who asks."
        urlopen(Request(f'{address}/moto-api/reset-auth', str(n).encode(), plain)).close()

    allow(0)
    try:
        line = cli('predict', run, file, '--out', tmp_path / 'p.csv')
        assert line.code == 1 and 'no permission to read it: check the credentials' in line.err
        line = error_line('predict', run, 's3://clinic/a/m.csv', '--out', tmp_path / 'q.csv')
        assert 's3://clinic/a/m.csv cannot be read: no permission' in line
    finally:
        allow(10**9)
    monkeypatch.delenv('AWS_ACCESS_KEY_ID')
    monkeypatch.delenv('AWS_SECRET_ACCESS_KEY')
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ImageError, match='no credentials: set AWS_ACCESS_KEY_ID'):
        read_rgb('s3://clinic/a/images/x.jpg')
    s3fs.S3FileSystem.clear_instance_cache()


def test_google_cloud_storage_by_an_emulator(images, monkeypatch):
    folder, names = images

    class Emulator(BaseHTTPRequestHandler):
        def do_GET(self):
            place, _, name = unquote(self.path.partition('?')[0]).partition('/o/')
            found = place.endswith('/b/clinic') and (folder / name).is_file()
            data = (folder / name).read_bytes() if found else b'{"error": {"code": 404, "message": "no such object"}}'
            self.send_response(200 if found else 404)
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Emulator) as emulator:
        threading.Thread(target=emulator.serve_forever, daemon=True).start()
        monkeypatch.setenv('STORAGE_EMULATOR_HOST', f'http://127.0.0.1:{emulator.server_port}')
        monkeypatch.setenv('FSSPEC_GS_TOKEN', 'anon')
        monkeypatch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')  # it asks by gRPC, which is not emulated
        pytest.importorskip('gcsfs', reason='needs the extra gcs')
        from fsspec.config import conf, set_conf_env

        monkeypatch.setitem(conf, 'gs', {})
        set_conf_env(conf)  # fsspec reads the environment when it is imported
        assert np.array_equal(read_rgb(f'gs://clinic/{names[0]}', 32), read_rgb(folder / names[0], 32))
        with pytest.raises(ImageError, match='no such file'):
            read_rgb('gs://clinic/none.jpg')
        emulator.shutdown()


# ---------------------------------------------------------------- manifests


def test_manifests_that_cannot_be_used(tmp_path, run):
    (tmp_path / 'empty.csv').write_text('')
    (tmp_path / 'header.csv').write_text('image,eye\n')
    (tmp_path / 'column.csv').write_text('eye,hand\nleft,right\n')
    (tmp_path / 'ragged.csv').write_text('image,eye\na.jpg\n')
    (tmp_path / 'text.parquet').write_text('image\na.jpg\n')
    manifest(tmp_path / 'column.parquet', ['a.jpg']).rename(tmp_path / 'good.parquet')
    pq.write_table(pa.table({'eye': ['left']}), tmp_path / 'column.parquet')
    pq.write_table(pa.table({'image': pa.array([], pa.string())}), tmp_path / 'rows.parquet')
    wanted = {
        'empty.csv': 'it is empty',
        'header.csv': 'has no rows: give a manifest with images',
        'column.csv': "has no column 'image' with paths or URIs of images: its columns are eye, hand",
        'ragged.csv': 'line 2 has 1 fields, and the header has 2',
        'text.parquet': 'cannot be read as a Parquet file',
        'column.parquet': "has no column 'image'",
        'rows.parquet': 'has no rows',
        'ghost.csv': 'No such file',
    }
    for name, why in wanted.items():
        assert why in error_line('predict', run, tmp_path / name, '--out', tmp_path / 'p.csv')
    both = error_line('predict', run, tmp_path / 'good.parquet', tmp_path / 'a.jpg', '--out', tmp_path / 'p.csv')
    assert 'is a manifest: give it alone' in both


def test_a_million_repeated_rows_are_one_image(tmp_path):
    (tmp_path / 'm.csv').write_text('image\n' + 'a.jpg\n' * 10**6)
    counts = Counts()
    start = time.monotonic()
    with open_manifest(tmp_path / 'm.csv') as m:
        rows = list(shard_rows(m, Shard(), counts))
    assert len(rows) == 1
    assert (counts.rows, counts.repeated) == (10**6, 10**6 - 1)
    assert time.monotonic() - start < 30


def test_rows_are_read_when_they_are_needed(tmp_path):
    (tmp_path / 'm.csv').write_text('image\n' + 'a.jpg\n' * 10**5 + 'too,many,cells\n')
    with open_manifest(tmp_path / 'm.csv') as m:
        rows = m.rows()
        assert next(rows).place == str(tmp_path / 'a.jpg')
        with pytest.raises(ValueError, match='line 100002 has 3 fields'):
            list(rows)


def test_other_columns_of_any_type_are_kept(tmp_path, images, run):
    folder, names = images
    t = pd.DataFrame({'image': names[:4], 'kind': pd.Categorical(['a', 'b', 'a', None]), 'n': [1, 2, 3, 4]})
    t['many'] = [[1, 2], [], None, [3]]
    t['day'] = pd.Timestamp('2026-01-02')
    t.to_parquet(folder / 'types.parquet')
    for k in (1, 2):
        good('predict', run, folder / 'types.parquet', '--out', tmp_path / 'parts', '--shard', f'{k}/2')
    good('merge', tmp_path / 'parts', '--out', tmp_path / 'm.parquet')
    found = pq.read_table(tmp_path / 'm.parquet').to_pydict()
    assert found['data_kind'] == ['a', 'b', 'a', None] and found['data_n'] == [1, 2, 3, 4]
    assert found['data_many'] == [[1, 2], [], None, [3]] and found['data_day'][0].day == 2


def test_a_full_disk_keeps_what_was_finished(tmp_path, monkeypatch):
    from dr_transfer.utils.places import OutputError

    def full(rows, files):
        if rows[-1].number >= 40:
            raise OSError(28, 'No space left on device')
        return {'error': [f.error for f in files]}

    monkeypatch.setattr('dr_transfer.inference.parts._PIECE', 10)
    work = Work('predict', {}, {'error': 'text'}, full)
    with pytest.raises(OutputError, match=r'No space left on device\). The finished images are kept in .*run the same'):
        write_part(parts_folder(tmp_path / 'parts'), listed(map(str, range(400))), Shard(), work)
    assert len(list((tmp_path / 'parts' / 'part-0001-of-0001.pieces').glob('*.parquet'))) == 3


def test_csv_needs_no_other_package(tmp_path, images, run, monkeypatch):
    folder, names = images
    file = manifest(folder / 'm.csv', names)
    for name in ('pyarrow', 'pyarrow.parquet', 'fsspec', 's3fs'):
        monkeypatch.setitem(sys.modules, name, None)
    good('predict', run, file, '--out', tmp_path / 'p.csv')
    line = error_line('predict', run, file, '--out', tmp_path / 'parts', '--shard', '1/2')
    assert "pip install 'dr_transfer[scale]'" in line


def test_files_are_held_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr('dr_transfer.data.manifest._HELD_BYTES', 4000)
    for i in range(60):
        (tmp_path / f'{i}.bin').write_bytes(bytes(500))
    rows = list(listed([tmp_path / f'{i}.bin' for i in range(60)]).rows())
    sizes = [len(files) for _, files in fetched_groups(rows)]
    assert sum(sizes) == 60 and max(sizes[1:]) == 3


# ---------------------------------------------------------------- shards and parts


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.text(max_size=4), max_size=40), n=st.integers(1, 6))
def test_shards_are_a_partition_whatever_the_order(names, n):
    def kept(names):
        return [{r.image for r in shard_rows(listed(names), Shard(k, n)) if r.image} for k in range(1, n + 1)]

    shards = kept(names)
    assert set().union(*shards) == {name for name in names if name}
    assert sum(map(len, shards)) == len({name for name in names if name})
    assert kept(names[::-1]) == shards


@pytest.mark.parametrize('shard', ['5/4', '0/4', '4', 'a/b', '1/0', '-1/3', '1/1000000', '1/4/2', '１/４'])
def test_shards_that_do_not_exist(tmp_path, images, run, shard):
    with pytest.raises(ValueError, match='give K/N, K from 1 to N'):
        find_shard(shard)
    line = error_line('predict', run, images[0] / 'images', '--out', tmp_path / 'p', f'--shard={shard}')
    assert 'give K/N, K from 1 to N, such as 3/10' in line
    assert not (tmp_path / 'p').exists()


def test_a_shard_needs_a_folder(tmp_path, images, run):
    folder = images[0] / 'images'
    assert 'give --out FOLDER' in error_line('predict', run, folder, '--shard', '1/2')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'a.txt').touch()
    assert 'is not a parts folder' in error_line('predict', run, folder, '--shard', '1/2', '--out', tmp_path / 'mine')
    assert 'give a folder' in error_line('predict', run, folder, '--shard', '1/2', '--out', 's3://bucket/parts')
    inside = error_line('predict', run, folder, '--shard', '1/2', '--out', folder / 'parts')
    assert 'lies in the data folder' in inside


def test_the_union_of_shards_equals_the_whole_run(tmp_path, images, run):
    folder, names = images
    file = manifest(folder / 'm.csv', [*names, 'ghost.jpg', names[5]], patient=[f'p{i // 2}' for i in range(42)])
    good('predict', run, file, '--out', tmp_path / 'whole.csv')
    good('predict', run, file, '--out', tmp_path / 'whole.parquet')
    for k in (3, 1, 2):
        good('predict', run, file, '--out', tmp_path / 'parts', '--shard', f'{k}/3')
    for suffix in ('.csv', '.parquet'):
        good('merge', tmp_path / 'parts', '--out', tmp_path / f'merged{suffix}')
        assert (tmp_path / f'merged{suffix}').read_bytes() == (tmp_path / f'whole{suffix}').read_bytes()
    printed = good('predict', run, file)
    assert printed.out == (tmp_path / 'whole.csv').read_text()
    t = table(tmp_path / 'whole.csv')
    assert t.columns[-2:].tolist() == ['error', 'data_patient'] and len(t) == 41


def test_the_shards_of_a_folder_equal_its_predictions(tmp_path, images, run):
    folder = images[0] / 'images'
    good('predict', run, folder, '--out', tmp_path / 'whole.csv')
    for k in (1, 2):
        good('predict', run, folder, '--out', tmp_path / 'parts', '--shard', f'{k}/2')
    good('merge', tmp_path / 'parts', '--out', tmp_path / 'merged.csv')
    assert (tmp_path / 'merged.csv').read_bytes() == (tmp_path / 'whole.csv').read_bytes()


def test_a_finished_shard_does_nothing_and_another_model_is_refused(tmp_path, images, run, monkeypatch):
    folder = images[0] / 'images'
    words = ('predict', run, folder, '--out', tmp_path / 'parts', '--shard', '1/2')
    good(*words)
    part = tmp_path / 'parts' / 'part-0001-of-0002.parquet'
    before = part.stat()
    with monkeypatch.context() as m:
        m.setattr('dr_transfer.inference.work.predict_table', None)
        assert 'images predicted' in good(*words).err
    assert part.stat().st_mtime_ns == before.st_mtime_ns
    assert read_about(part).counts == {'rows': 40, 'repeated': 0, 'images': len(pq.read_table(part))}
    other = tmp_path / 'other'
    model = load_model(run / 'model')
    save_model(ImageModel(model.model, replace(model.card, seed=4)), other)
    line = error_line('predict', other, *words[2:])
    assert 'is not of this command: they have different settings: model is' in line
    line = error_line('predict', run, images[0] / 'images' / Path(images[1][0]).name, *words[3:])
    assert 'different manifests' in line
    good('predict', other, *words[2:], '--overwrite')
    good('predict', run, *words[2:-1], '2/2')
    assert 'do not belong together: they have different settings: model is' in error_line(
        'merge', tmp_path / 'parts', '--out', tmp_path / 'm.csv'
    )


def test_parts_that_are_missing_or_there_twice(tmp_path, images, run):
    folder = images[0] / 'images'
    out = tmp_path / 'parts'
    for k in (1, 3):
        good('predict', run, folder, '--out', out, '--shard', f'{k}/4')
    line = error_line('merge', out, '--out', tmp_path / 'm.csv')
    assert '2 of 4 parts are missing: 2/4, 4/4' in line
    assert f'dr_transfer predict {run} {folder} --out {out} --shard 2/4' in line.replace("'", '')
    copy = shutil.copy(out / 'part-0001-of-0004.parquet', tmp_path / 'copy.parquet')
    assert 'are the same shard' in error_line('merge', out, copy, '--out', tmp_path / 'm.csv')
    good('predict', run, folder, '--out', tmp_path / 'five', '--shard', '1/5')
    line = error_line('merge', out, tmp_path / 'five', '--out', tmp_path / 'm.csv')
    assert 'one is of 4 shards, the other of 5' in line
    (tmp_path / 'bad.parquet').write_bytes(Path(copy).read_bytes()[:300])
    assert 'or is damaged' in error_line('merge', tmp_path / 'bad.parquet', '--out', tmp_path / 'm.csv')
    (tmp_path / 'nothing').mkdir()
    assert 'no parts in' in error_line('merge', tmp_path / 'nothing', '--out', tmp_path / 'm.csv')
    assert 'ends with .csv or .parquet' in error_line('merge', out, '--out', tmp_path / 'm.txt')
    assert not (tmp_path / 'm.csv').exists()


def slow(rows, files):
    "Write down which images are computed, slowly."
    for row in rows:
        with open(os.environ['COMPUTED'], 'a') as f:
            f.write(f'{row.number}\n')
    time.sleep(0.05)
    return {'length': [len(f) for f in files], 'error': [f.error for f in files]}


SLOW = Work('predict', {'model': 'abc'}, {'length': 'whole', 'error': 'text'}, slow, ('predict',))


def test_a_shard_that_was_killed_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv('COMPUTED', str(tmp_path / 'computed'))
    monkeypatch.setattr('dr_transfer.data.manifest._HELD_BYTES', 1000)  # groups of few images
    names = [str(tmp_path / f'{i}.bin') for i in range(900)]
    for i, name in enumerate(names):
        Path(name).write_bytes(bytes(i % 50))
    m = listed(names)
    folder = parts_folder(tmp_path / 'parts')
    process = get_context('fork').Process(target=write_part, args=(folder, m, Shard(1, 1), SLOW))
    process.start()
    pieces = folder / 'part-0001-of-0001.pieces'
    until = time.monotonic() + 60
    while not list(pieces.glob('*1.parquet')) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (folder / 'part-0001-of-0001.parquet').exists()
    kept = len(list(pieces.glob('[0-9]*.parquet')))
    before = (tmp_path / 'computed').read_text().split()
    (pieces / '00000000.parquet').write_bytes(b'PAR1')  # a damaged piece is computed again
    work = replace(SLOW, compute=lambda rows, files: slow(rows, files))
    with pytest.warns(UserWarning, match='computed again'):
        part, tally = write_part(folder, m, Shard(1, 1), work)
    again = (tmp_path / 'computed').read_text().split()[len(before) :]
    assert kept >= 2 and len(again) == 900 - 256 * (kept - 1)
    assert tally.images == 900 and not pieces.exists()
    assert pq.read_table(part)['length'].to_pylist() == [i % 50 for i in range(900)]
    out = io.BytesIO()
    assert write_rows(out, m, SLOW).images == 900
    merge_parts(find_parts([folder]), tmp_path / 'm.csv', as_csv=True)
    assert (tmp_path / 'm.csv').read_bytes() == out.getvalue()


def test_one_process_at_a_time_makes_a_part(tmp_path):
    from dr_transfer.utils.places import OutputError, locked, place_of

    folder = parts_folder(tmp_path / 'parts')
    lock = place_of(folder / 'part-0001-of-0001.pieces').lock
    with locked(lock, folder), pytest.raises(OutputError, match='another run is writing'):
        write_part(folder, listed(['a']), Shard(), SLOW)


def test_merging_sorts_in_windows(tmp_path, monkeypatch):
    monkeypatch.setattr('dr_transfer.inference.merged._window', lambda file: 7)

    def work(rows, files):
        return {'n': [float(r.number) for r in rows], 'error': [f.error for f in files]}

    made = Work('predict', {}, {'n': 'number', 'error': 'text'}, work)
    names = [f'{i % 90}.jpg' for i in range(100)]
    folder = parts_folder(tmp_path / 'parts')
    for k in range(1, 6):
        write_part(folder, listed(names), Shard(k, 5), made)
    merge_parts(find_parts([folder]), tmp_path / 'm.parquet', as_csv=False)
    assert pq.read_table(tmp_path / 'm.parquet')['n'].to_pylist() == list(range(90))


# ---------------------------------------------------------------- the same bits, the other commands


def test_values_do_not_depend_on_how_many_images_there_are(run):
    from dr_transfer.features.unlike import TrainingDistribution

    rng = np.random.default_rng(0)
    d, k = 1280, 64
    arrays = [rng.normal(size=s).astype(np.float32) for s in ((d,), (d,), (k, d), (k,))]
    known = TrainingDistribution(arrays[0], abs(arrays[1]) + 1, arrays[2] / 30, abs(arrays[3]) + 1, rest=1.0)
    x = rng.normal(size=(150, d)).astype(np.float32)
    p = rng.dirichlet(np.ones(12), 150)
    whole = known.distance(x), known.coordinates(x), apply_temperature(p, 1.7)
    for n in (1, 2, 3, 7, 64):
        parts = [
            (known.distance(x[i : i + n]), known.coordinates(x[i : i + n]), apply_temperature(p[i : i + n], 1.7))
            for i in range(0, 150, n)
        ]
        for together, cut in zip(whole, zip(*parts)):
            assert np.array_equal(together, np.concatenate(cut))


def test_features_equal_those_that_are_stored(tmp_path, images, run, weights):
    from dr_transfer.features.extraction import image_features

    folder, names = images
    file = manifest(folder / 'm.parquet', [*names, 'ghost.jpg'])
    network = (
        '--arch',
        'test_resnet',
        '--weights',
        weights,
        '--size',
        '48',
        '--runtime',
        'plain',
        '--views',
        'quarter_turns',
    )
    for k in (1, 2):
        good('features', file, *network, '--out', tmp_path / 'parts', '--shard', f'{k}/2')
    good('merge', tmp_path / 'parts', '--out', tmp_path / 'merged.parquet')
    good('features', file, *network, '--out', tmp_path / 'whole.parquet')
    assert (tmp_path / 'merged.parquet').read_bytes() == (tmp_path / 'whole.parquet').read_bytes()
    assert 'has vectors, which CSV cannot hold' in error_line('merge', tmp_path / 'parts', '--out', tmp_path / 'm.csv')
    t = pd.read_parquet(tmp_path / 'merged.parquet')
    paths = [folder / name for name in names]
    stored = image_features(paths, 'test_resnet', weights, 'plain', 48, views='quarter_turns')
    for stage in stored.stages:
        views = [np.stack(t[f'{stage}_view{v}' if v else stage][:40]) for v in range(stored.views)]
        assert np.array_equal(np.stack(views, 1), stored.numpy(stage))
    assert t.error[40] == 'no such file' and np.isnan(t.iloc[40][next(iter(stored.stages))]).all()
    good('features', file, '--model', run, '--out', tmp_path / 'model.parquet')
    for words, why in (
        (('--model', run, '--arch', 'test_resnet'), 'do not give --arch'),
        (('--stages', 'stage99'), "unknown stage 'stage99'"),
        (('--pool', 'most'), "unknown pool 'most'"),
    ):
        assert why in error_line('features', file, *words, '--out', tmp_path / 'a.parquet')
    assert 'give a name such as' in error_line('features', file, '--out', tmp_path / 'a.csv')


def test_features_of_a_transformer_have_the_nearest_size(tmp_path, images):
    "As in `build_learner`, which says so as well."
    file = images[0] / images[1][0]
    out = good(
        'features', file, '--arch', 'test_vit', '--weights', 'random', '--size', 60, '--out', tmp_path / 'f.parquet'
    ).out
    assert "size 64 instead of 60: 'test_vit' reads patches of 16 by 16 pixels" in out


def test_prepared_shards_equal_a_prepared_folder(tmp_path, images):
    folder, names = tmp_path / 'few', images[1][:10]
    (folder / 'images').mkdir(parents=True)
    for name in names:
        shutil.copy(images[0] / name, folder / name)
    good('preprocess', folder / 'images', tmp_path / 'whole', '--size', '48')
    for k in (1, 2):
        good('preprocess', folder / 'images', tmp_path / 'shards', '--size', '48', '--shard', f'{k}/2')
    whole = {p.name: p.read_bytes() for p in (tmp_path / 'whole').glob('*.png')}
    assert whole == {p.name: p.read_bytes() for p in (tmp_path / 'shards').glob('*.png')}
    file = manifest(folder / 'm.csv', names)
    good('preprocess', file, tmp_path / 'named', '--size', '48')
    t = pd.read_csv(tmp_path / 'named' / 'images.csv')
    for row in t.itertuples():
        result = (tmp_path / 'named' / row.file).read_bytes()
        assert result == whole[Path(row.image).with_suffix('.png').name]
    good('merge', tmp_path / 'shards' / 'parts', '--out', tmp_path / 'm.csv')
    merged, at_once = pd.read_csv(tmp_path / 'm.csv'), pd.read_csv(tmp_path / 'whole' / 'images.csv')
    pd.testing.assert_frame_equal(merged[['x', 'y', 'r']], at_once[['x', 'y', 'r']], check_exact=True)
    line = error_line('preprocess', file, tmp_path / 'shards', '--size', '64', '--shard', '1/2')
    assert 'is not of this command: they have different settings: size is 64 and 48' in line


def test_checked_shards_equal_a_check(tmp_path, images, run):
    folder, names = images
    file = manifest(folder / 'm.csv', names, patient=[f'p{i // 2}' for i in range(40)])
    code = cli('check', run, file, '--out', tmp_path / 'a.html', '--resamples', '100').code
    for k in (1, 2):
        good('check', run, file, '--out', tmp_path / 'parts', '--shard', f'{k}/2')
    good('merge', tmp_path / 'parts', '--out', tmp_path / 'm.parquet')
    result = cli('check', run, tmp_path / 'm.parquet', '--out', tmp_path / 'b.html', '--resamples', '100')
    assert result.code == code and "patients: column 'patient', 20 groups" in result.out
    assert (tmp_path / 'a_predictions.csv').read_bytes() == (tmp_path / 'b_predictions.csv').read_bytes()
    line = error_line('check', run, tmp_path / 'parts' / 'part-0001-of-0002.parquet', '--out', tmp_path / 'c.html')
    assert 'the table that dr_transfer merge made' in line
    Image.new('RGB', (48, 48)).save(tmp_path / 'x.png')
    good('predict', run, tmp_path / 'x.png', '--out', tmp_path / 'p.parquet')
    assert 'was made by dr_transfer predict' in error_line(
        'check', run, tmp_path / 'p.parquet', '--out', tmp_path / 'd.html'
    )


def stored_rows(cache):
    "Number of rows of each store of features."
    return {f.parent.name: len(f.read_bytes().splitlines()) for f in (cache / 'features').glob('*/images.jsonl')}


def test_training_and_advisor_find_stored_features(tmp_path, fundus_data, weights, monkeypatch):
    from dr_transfer.data.table import find_images

    network = ('--arch', 'test_resnet', '--weights', weights, '--size', '64', '--task', 'dr', '--runtime', 'plain')
    folder, caches = fundus_data / 'images', [tmp_path / 'at once', tmp_path / 'by shards']
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(caches[0]))
    good('features', folder, *network, '--views', 'task', '--store')
    for k in (1, 2):
        good('features', folder, *network, '--views', 'task', '--out', tmp_path / 'parts', '--shard', f'{k}/2')
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(caches[1]))
    assert '40 images in 2 parts, stored in the cache' in good('merge', tmp_path / 'parts', '--store').err
    known = stored_rows(caches[0])
    assert known == stored_rows(caches[1])
    table = tmp_path / 'table.parquet'
    good('features', folder, *network, '--views', 'task', '--out', table)
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path / 'of a table'))
    assert '40 images, stored in the cache' in good('merge', table, '--store').err
    assert known == stored_rows(tmp_path / 'of a table')
    assert 'give the parts' in error_line('merge', table, table, '--store')
    assert set(known.values()) == {len({content_key(f) for f in find_images(folder)})}
    train = ('train', fundus_data, *network, '--plan', 'head')
    for i, cache in enumerate(caches):
        monkeypatch.setenv('DR_TRANSFER_CACHE', str(cache))
        good(*train, '--out', tmp_path / f'run {i}')
        assert stored_rows(cache) == known  # nothing was computed
        good('advise', fundus_data, *network, '--out', tmp_path / f'{i}.png')  # it adds changed images
        added = set(stored_rows(cache)) - set(known)
        n_stages = sum('-none-' in name for name in known)  # the images as they are were known
        assert len(added) == 2 * n_stages  # corrected light without turns, and by the reader fundus_local
        keys = [json.loads(line)['key'] for f in (cache / 'features').glob('*/images.jsonl') for line in f.open()]
        assert max(Counter(keys).values()) <= len(known) + len(added)  # no image is in a store twice
    predicted = [(tmp_path / f'run {i}' / 'predictions.csv').read_bytes() for i in (0, 1)]
    assert predicted[0] == predicted[1]


def test_features_are_stored_or_written(tmp_path, images, run):
    folder = images[0] / 'images'
    line = error_line('features', folder, '--store', '--out', tmp_path / 'a.parquet')
    assert '--store writes into the cache: do not give --out or --shard' in line
    assert 'give a name such as features.parquet' in error_line('features', folder)
    good('predict', run, folder, '--out', tmp_path / 'parts', '--shard', '1/1')
    assert '--store is for parts of dr_transfer features' in error_line('merge', tmp_path / 'parts', '--store')
    assert 'ends with .csv or .parquet' in error_line('merge', tmp_path / 'parts')
