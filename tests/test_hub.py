"Networks described by a config.json: in a folder, or on a hub, for which a small server on this machine stands in."

import contextlib
import hashlib
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from dr_transfer.models import downloads
from dr_transfer.models.backbones import create_body
from dr_transfer.models.downloads import DownloadError, hub_file, url_file
from dr_transfer.models.registry import build_network, by_hand, find_backbone, saved_arch
from dr_transfer.models.weights import WeightsError

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
REPO = 'clinic/small'
ARCH = f'hf_hub:{REPO}'


def network(name='test_resnet', **kw):
    torch.manual_seed(3)
    return timm.create_model(name, **kw).eval()


@pytest.fixture
def folder(tmp_path):
    "A network as timm saves it for the hub"
    net = network(num_classes=5)
    timm.models.save_for_hf(net, tmp_path / 'net', safe_serialization=True)
    change(tmp_path / 'net', pretrained_cfg={'mean': [0.1, 0.2, 0.3], 'std': [0.4, 0.5, 0.6], 'license': 'mit'})
    return tmp_path / 'net'


def change(folder, **fields):
    "Change fields of the config.json of a folder; fields of dicts are merged"
    file = folder / 'config.json'
    config = json.loads(file.read_text())
    for k, v in fields.items():
        config[k] = {**config[k], **v} if isinstance(v, dict) and k in config else v
    file.write_text(json.dumps(config))


def equal(body, net):
    with torch.no_grad():
        return torch.equal(body(X), net.forward_features(X))


# ---------------------------------------------------------------- a folder


def test_a_folder_of_timm(folder):
    arch = f'local-dir:{folder}'
    spec = find_backbone(arch)
    assert (spec.library, spec.factory, spec.licence) == ('timm', 'test_resnet', 'mit')
    assert (spec.size, spec.mean, spec.std) == (160, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert spec.n_features == network().num_features
    body = create_body(arch)
    assert equal(body, network(num_classes=5))
    assert body.weights.sha256 == hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    assert body.spec == spec


def test_an_old_description(folder):
    "All fields in one object, as timm wrote it before 2023"
    old = {
        'architecture': 'test_resnet',
        'num_classes': 5,
        'input_size': [3, 96, 96],
        'mean': [0.5] * 3,
        'std': [1] * 3,
    }
    (folder / 'config.json').write_text(json.dumps(old))
    spec = find_backbone(f'local-dir:{folder}')
    assert (spec.size, spec.mean, spec.std, spec.licence) == (96, (0.5,) * 3, (1.0,) * 3, 'not stated')
    assert equal(create_body(f'local-dir:{folder}'), network(num_classes=5))


def test_arguments_of_the_network(tmp_path):
    net = network('test_vit', img_size=96, reg_tokens=2)
    timm.models.save_for_hf(net, tmp_path, safe_serialization=True)
    spec = find_backbone(f'local-dir:{tmp_path}')
    assert dict(spec.args)['reg_tokens'] == 2
    assert spec.size == 96
    body = create_body(f'local-dir:{tmp_path}')
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(body(x), net.forward_head(net.forward_features(x), pre_logits=True))
    name = saved_arch(f'local-dir:{tmp_path}', spec)
    assert str(tmp_path) not in name
    again = build_network(find_backbone(name)).state_dict()
    assert {k: v.shape for k, v in again.items() if 'head' not in k} == {
        k: v.shape for k, v in net.state_dict().items() if 'head' not in k
    }


def test_a_saved_model_does_not_need_the_folder(folder):
    spec = find_backbone(f'local-dir:{folder}')
    name = saved_arch(f'local-dir:{folder}', spec)
    assert name.startswith('timm.test_resnet')
    assert find_backbone(name).factory == 'test_resnet'
    assert saved_arch('test_resnet', find_backbone('test_resnet')) == 'test_resnet'


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'architecture': 'no_such_network'}, ['no_such_network', 'arch=NAME', 'weights=FILE']),
        ({'architecture': None}, ['does not describe a network of timm']),
        ({'pretrained_cfg': {'input_size': [1, 96, 96]}}, ['[1, 96, 96]', 'RGB']),
        ({'pretrained_cfg': {'input_size': [3, 96]}}, ['[3, 96]', 'RGB']),
        ({'pretrained_cfg': {'mean': [0.5]}}, ['mean', '[0.5]', 'three numbers']),
        ({'pretrained_cfg': {'std': [0.5, 'x', 1]}}, ['std', 'three numbers']),
        ({'pretrained_cfg': {'std': [0.5, 0, 1]}}, ['std', 'greater than 0']),
        ({'model_args': {'in_chans': 1}}, ['1 channels', 'RGB']),
        ({'model_args': {'checkpoint_path': '/etc/passwd'}}, ['checkpoint_path', 'cannot be used']),
        ({'model_args': {'pretrained': True}}, ['pretrained', 'cannot be used']),
        ({'model_args': {'x': {'a': 1}}}, ['argument x', 'cannot be used']),
        ({'model_args': {'img_size': [96, 64]}}, ['img_size', 'cannot be used']),
    ],
)
def test_descriptions_that_are_refused(folder, fields, words):
    change(folder, **fields)
    with pytest.raises(ValueError) as e:
        find_backbone(f'local-dir:{folder}')
    for w in ['config.json', *words]:
        assert w in str(e.value)


@pytest.mark.parametrize('content', ['<html>', '[1]', '"x"', '', '{"architecture": "test_resnet"', '[' * 10**5])
def test_a_config_that_is_not_json(folder, content):
    (folder / 'config.json').write_text(content)
    with pytest.raises(ValueError, match=r'config\.json'):
        find_backbone(f'local-dir:{folder}')


def test_folders_without_files(folder, tmp_path):
    with pytest.raises(WeightsError, match='says 7 features, but test_resnet has'):
        change(folder, num_features=7)
        create_body(f'local-dir:{folder}')
    change(folder, num_features=network().num_features)
    (folder / 'model.safetensors').unlink()
    with pytest.raises(WeightsError, match=r'has no model\.safetensors: put it there'):
        create_body(f'local-dir:{folder}')
    with pytest.raises(ValueError, match=r'there is no file .*config\.json'):
        find_backbone(f'local-dir:{tmp_path / "none"}')


@pytest.mark.parametrize(
    'args, words',
    [
        ('foo=3', 'cannot be made with foo=3'),
        ('img_size=97', 'img_size=97'),
        ('img_size=x', "img_size='x'"),
        ('depth=-1', 'depth'),
    ],
)
def test_arguments_that_do_not_fit(args, words):
    "Some odd numbers make a network, such as one without blocks; no other error than ValueError is raised"
    try:
        build_network(find_backbone(f'timm.test_vit?{args}'))
    except ValueError as e:
        assert words in str(e)
    else:
        assert args in ('depth=-1', 'img_size=97')


# ---------------------------------------------------------------- a hub


class Hub:
    "What the server answers, and what it was asked"

    def __init__(self, folder):
        self.folder, self.asked, self.cut, self.mode = folder, [], 0, ''
        self.html = b'<html>please log in</html>'

    def content(self, name):
        if self.mode == 'html' or (self.mode == 'html weights' and name != 'config.json'):
            return self.html
        file = self.folder / name
        return file.read_bytes() if file.is_file() else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *a):
        pass

    def refuse(self, code, error=''):
        self.send_response(code)
        if error:
            self.send_header('X-Error-Code', error)
        self.send_header('Content-Length', '0')
        self.end_headers()

    def answer(self, body):
        hub, (*_, name) = self.server.hub, self.path.split('/')
        hub.asked.append((self.command, name, self.headers.get('Range')))
        refusals = {'401': '', '403': '', '404': 'RepoNotFound', '500': ''}
        gated = {'gated 401': 'GatedRepo', 'gated 403': 'GatedRepo'}
        if hub.mode in {**refusals, **gated}:
            return self.refuse(int(hub.mode[-3:]), {**refusals, **gated}[hub.mode])
        if hub.mode == 'slow':
            threading.Event().wait(2)
        content = hub.content(name)
        if content is None:
            return self.refuse(404, 'EntryNotFound')
        first = int((self.headers.get('Range') or 'bytes=0-').split('=')[1].split('-')[0])
        self.send_response(206 if first else 200)
        if hub.mode != 'login page':
            self.send_header('X-Repo-Commit', 'a' * 40)
            digest = hashlib.sha256(content if hub.mode != 'damaged' else b'other').hexdigest()
            self.send_header('ETag', f'"{digest}"')
        self.send_header('Content-Length', str(len(content) - first))
        if first:
            self.send_header('Content-Range', f'bytes {first}-{len(content) - 1}/{len(content)}')
        self.end_headers()
        if body:
            self.write(hub, content[first:], name)

    def write(self, hub, content, name):
        if hub.cut and name != 'config.json':
            hub.cut -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content)

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    "A hub on this machine with one repository"
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.hub, server.daemon_threads = Hub(folder), True
    server.handle_error = lambda *a: None
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.delenv('DR_TRANSFER_WEIGHTS', raising=False)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 1)
    monkeypatch.setattr(huggingface_hub.constants, 'DOWNLOAD_CHUNK_SIZE', 10_000)
    monkeypatch.setattr('huggingface_hub.file_download.time.sleep', lambda seconds: None)
    huggingface_hub.close_session()
    yield server.hub
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def test_a_network_of_a_hub(hub, folder):
    body = create_body(ARCH)
    assert equal(body, network(num_classes=5))
    assert body.weights.kind == 'hub'
    assert body.weights.name.endswith(f'/{REPO}')
    assert body.weights.sha256 == hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    assert (body.spec.size, body.spec.mean, body.spec.licence) == (160, (0.1, 0.2, 0.3), 'mit')
    asked = len(hub.asked)
    hub.mode = '500'
    assert equal(create_body('hf-hub:' + REPO), network(num_classes=5))  # from the cache, the hub is not asked
    assert len(hub.asked) == asked
    assert saved_arch(ARCH, body.spec).startswith('timm.test_resnet')


def test_older_names_of_files(hub, folder):
    net = network(num_classes=5)
    (folder / 'model.safetensors').unlink()
    torch.save(net.state_dict(), folder / 'pytorch_model.bin')
    assert equal(create_body(ARCH), net)
    (folder / 'pytorch_model.bin').unlink()


def test_a_connection_that_is_cut_is_continued(hub):
    hub.cut = 1
    assert equal(create_body(ARCH), network(num_classes=5))
    ranges = [r for command, name, r in hub.asked if command == 'GET' and name == 'model.safetensors']
    assert ranges[0] is None
    assert int(ranges[1].removeprefix('bytes=').rstrip('-')) > 0


def error_of(arch=ARCH, kind=WeightsError):
    with pytest.raises(kind) as e:
        create_body(arch)
    return str(e.value)


@pytest.mark.parametrize(
    'mode, words',
    [
        ('gated 401', ['gated (HTTP 401)', 'accept its terms', 'hf auth login', 'HF_TOKEN']),
        ('gated 403', ['gated (HTTP 403)', 'accept its terms', 'HF_TOKEN']),
        ('403', ['HTTP 403', 'accept its terms']),
        ('401', ['HTTP 401', 'check the name', 'HF_TOKEN']),
        ('404', ['HTTP 404', 'check the name']),
        ('500', ['500']),
        ('login page', ['not that of a hub']),
    ],
)
def test_answers_that_are_errors(hub, mode, words, tmp_path):
    hub.mode = mode
    start = time.monotonic()
    text = error_of()
    assert time.monotonic() - start < 10
    by_hand = tmp_path / 'cache' / 'weights' / 'clinic--small'
    for w in [ARCH, f'/{REPO}/resolve/main/config.json', 'model.safetensors', 'by hand', str(by_hand), *words]:
        assert w in text, text


def test_a_gated_file_beside_an_open_description(hub, tmp_path):
    find_backbone(ARCH)
    hub.mode = 'gated 403'
    text = error_of()
    assert 'accept its terms' in text
    assert str(by_hand(find_backbone(ARCH))) in text


def test_files_that_were_fetched_by_hand(hub, folder, tmp_path):
    "The folder that the error names"
    hub.mode = '404'
    where = tmp_path / 'cache' / 'weights' / 'clinic--small'
    assert str(where) in error_of()
    where.mkdir(parents=True)
    for name in ('config.json', 'model.safetensors'):
        (where / name).write_bytes((folder / name).read_bytes())
    assert equal(create_body(ARCH), network(num_classes=5))


def test_a_hub_that_answers_slowly(hub, monkeypatch):
    hub.mode = 'slow'
    start = time.monotonic()
    with pytest.raises(DownloadError, match='no answer within 1 seconds'):
        hub_file(REPO, ('config.json',), seconds=1)
    assert time.monotonic() - start < 8


def test_html_instead_of_json(hub):
    hub.mode = 'html'
    text = error_of(kind=ValueError)
    assert 'config.json is not a JSON file' in text
    hub.mode = ''
    assert equal(create_body(ARCH), network(num_classes=5))  # the page is not kept


def test_html_instead_of_weights(hub):
    hub.mode = 'html weights'
    assert 'model.safetensors cannot be read' in error_of()
    hub.mode = ''
    assert equal(create_body(ARCH), network(num_classes=5))


def test_a_file_with_another_hash(hub):
    find_backbone(ARCH)
    hub.mode = 'damaged'
    assert 'the file is damaged' in error_of()
    hub.mode = ''
    assert equal(create_body(ARCH), network(num_classes=5))


def test_weights_of_another_network(hub, folder):
    save_file(network('test_efficientnet').state_dict(), folder / 'model.safetensors')
    assert 'weights of another network' in error_of()


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    monkeypatch.setattr(downloads, 'reachable', lambda *a: False)
    assert 'the host cannot be reached' in error_of()
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert 'HF_HUB_OFFLINE=1 forbids downloads' in error_of()
    assert not hub.asked


@pytest.mark.parametrize('arch', ['hf_hub:', 'hf_hub:small', 'hf_hub:a/b/c', 'hf_hub:../x', 'hf_hub:a/b c'])
def test_names_that_are_not_repositories(hub, arch):
    with pytest.raises(ValueError, match='hf_hub:'):
        find_backbone(arch)
    assert not hub.asked


def test_timm_names_are_downloaded_from_its_repository(hub, folder, monkeypatch):
    spec = find_backbone('test_resnet')
    assert spec.hub == timm.get_pretrained_cfg('test_resnet').hf_hub_id
    save_file(network().state_dict(), folder / 'model.safetensors')
    body = create_body('test_resnet')
    assert equal(body, network())
    assert len(body.weights.sha256) == 64


def test_files_of_other_addresses(hub, folder, monkeypatch):
    content = b'weights' * 1000
    digest = hashlib.sha256(content).hexdigest()
    address = f'{downloads.hub_address()}/x/resolve/main/'
    for name in (f'net-{digest[:8]}.pth', 'net-0123abcd.pth', 'plain.pth'):
        (folder / name).write_bytes(content)
    hub.cut = 1
    assert url_file(f'{address}net-{digest[:8]}.pth').read_bytes() == content
    assert url_file(f'{address}plain.pth').read_bytes() == content
    with pytest.raises(DownloadError, match='damaged'):
        url_file(f'{address}net-0123abcd.pth')
    with pytest.raises(DownloadError, match='HTTP 404'):
        url_file(f'{address}none.pth')
    with contextlib.suppress(DownloadError):
        url_file(f'{address}net-0123abcd.pth')
    assert not list(folder.parent.glob('torch/**/net-0123abcd.pth*.part'))


def test_a_model_is_loaded_where_its_folder_is_not(folder, flowers, tmp_path):
    "And where no hub can be reached: the card has the name of the network in timm, and its arguments"
    from dr_transfer.core import build_learner, predict_probs
    from dr_transfer.inference.saved_model import load_model, save_model

    arch = f'local-dir:{folder}'
    learn = build_learner(flowers, 'flowers', arch=arch, size=64, bs=8, runtime='plain')
    assert learn.record.arch == arch
    images = sorted(flowers.rglob('*.jpg'))[:3] or sorted(flowers.rglob('*.png'))[:3]
    probs = predict_probs(learn, images)
    save_model(learn, tmp_path / 'model')
    shutil.rmtree(folder)
    model = load_model(tmp_path / 'model', 'plain')
    assert model.card.arch == 'timm.test_resnet?global_pool=avg'
    assert abs(model.probs(images) - probs).max() < 1e-5
