"Test the tools that build the site and the README, and the site itself if it has been built."

import json
import re
from pathlib import Path

import pytest
from helpers import tool

ROOT = Path(__file__).resolve().parent.parent


def site(folder, **pages):
    for name, body in pages.items():
        p = folder / (name.replace('__', '/') + '.html')
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(f'<html><body>{body}</body></html>', encoding='utf-8')
    return folder


def broken(*args, **kwargs):
    return [(page, link) for page, link, _ in tool('check_links').broken_links(site(*args, **kwargs))]


def test_good_links_pass(tmp_path):
    (tmp_path / 'a b.css').write_text('')
    assert not broken(
        tmp_path,
        index='<p id="x"></p><a href="#x"></a><a href="sub/page.html#caf%C3%A9"></a><link href="a%20b.css">',
        sub__page='<p id="café"></p><a href="../index.html#x"></a><a href=".."></a><a href=""></a>'
        '<a href="https://example.org/none"></a>',
    )


@pytest.mark.parametrize('link', ['gone.html', '#gone', 'sub/page.html#gone', '../index.html', '/index.html', 'sub/'])
def test_broken_link_is_found(tmp_path, link):
    result = broken(tmp_path, index=f'<p id="x"></p><a href="{link}"></a>', sub__page='')
    assert result == [('index.html', link)]


def test_missing_image_is_found(tmp_path):
    assert broken(tmp_path, index='<img src="gone.png"><img src="data:image/png;base64,AAAA">') == [
        ('index.html', 'gone.png')
    ]


def test_checker_exits_with_an_error(tmp_path, capsys):
    main = tool('check_links').main
    with pytest.raises(SystemExit, match='no pages'):
        main(tmp_path)
    with pytest.raises(SystemExit, match='1 broken'):
        main(site(tmp_path, index='<a href="gone.html"></a>'))
    assert 'index.html: gone.html: no such file' in capsys.readouterr().err


def test_links_to_notebooks_become_links_to_pages():
    docs = tool('build_docs')

    def page(s):
        return docs.LINK.sub(r'\1', s)

    assert (
        page('[a](05_backbones.ipynb#cut) [b](../05a_heads.ipynb) <a href=\\"tutorials/01_flowers.ipynb\\">')
        == '[a](backbones.ipynb#cut) [b](../heads.ipynb) <a href=\\"tutorials/flowers.ipynb\\">'
    )
    for same in ('`05_backbones.ipynb` is a notebook', '[a](backbones.ipynb)', '[a](05_backbones.png)'):
        assert page(same) == same
    assert (
        docs.NUMBERED.sub('', '- 05_backbones.ipynb\n- tutorials/01_flowers.ipynb')
        == '- backbones.ipynb\n- tutorials/flowers.ipynb'
    )


HOME = 'https://example.org/'
PUBLIC = {'advise': 'training/advisor.html#advise'}


def corrected(text, page='core.html'):
    return tool('build_docs').correct_links(text, HOME, {'data/table.html#some'}, PUBLIC, page)


def test_names_that_no_page_describes_are_not_linked():
    link = '[`label_table`](https://example.org/data/table.html#label_table)'
    text = f'`x` [`some`](https://example.org/data/table.html#some) {link}'
    assert corrected(text) == f'`x` `some` {link}'


def test_a_name_in_a_link_is_not_linked_again():
    link = '[`fit`](https://example.org/core.html#fit)'
    assert corrected(f'[{link}](core.ipynb), {link}') == f'[`fit`](core.ipynb), {link}'
    both = f'[see {link} and {link} here](core.ipynb) [x](y)'
    assert corrected(both) == '[see `fit` and `fit` here](core.ipynb) [x](y)'


def test_a_name_leads_to_the_public_function_and_not_to_the_command():
    command = '[`advise`](https://example.org/commands/subcommands.html#advise)'
    function = '[`advise`](https://example.org/training/advisor.html#advise)'
    assert corrected(command) == function
    assert corrected(function) == function
    assert corrected(command, 'commands/subcommands.html') == command  # the page of the command means the command
    assert corrected('[`advise`](../training/04_advisor.ipynb)') == '[`advise`](../training/04_advisor.ipynb)'


def test_each_public_name_has_an_address():
    pytest.importorskip('nbdev')
    addresses = tool('build_docs').public_addresses()
    assert addresses['advise'] == 'training/advisor.html#advise'
    assert {'build_learner', 'Task', 'cross_validate'} <= set(addresses)


def test_a_link_that_was_not_rendered_is_found(tmp_path):
    raw = '[<a href="index.html"><code>fit</code></a>](core.ipynb) and <code>[a](b)</code>'
    assert broken(tmp_path, index=raw) == [('index.html', '](core.ipynb)')]


def test_names_exported_for_other_modules_only_have_no_address():
    pytest.importorskip('nbdev')
    hidden = tool('build_docs').hidden_names()
    assert 'data/columns.html#find_column' in hidden
    assert 'data/table.html#label_table' not in hidden
    assert 'data/ct.html#volume.plane' not in hidden


def test_readme_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tool('build_readme').output_md
    result = out(dict(output_type='stream', text=['a\n', 'b\n']), 'x')
    assert result == '```\na\nb\n```'
    assert (
        out(dict(data={'text/plain': ['1'], 'text/html': ['<style scoped>\n.d {}\n</style>\n', '<table>']}), 'x')
        == '<table>'
    )
    assert out(dict(data={'text/plain': ['<Figure>'], 'image/png': 'aGVsbG8='}), 'x') == '![](README_files/x.png)'
    assert (tmp_path / 'README_files' / 'x.png').read_bytes() == b'hello'


def notebooks():
    return [
        p.relative_to(ROOT / 'nbs')
        for p in sorted((ROOT / 'nbs').rglob('*.ipynb'))
        if not any(o.startswith(('.', '_')) for o in p.parts[len(ROOT.parts) :])
    ]


def test_sidebar_lists_every_notebook():
    yaml = pytest.importorskip('yaml')

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        parts = [c.get('contents', []) if isinstance(c, dict) else c for c in entry]
        return [leaf for part in parts for leaf in leaves(part)]

    sidebar = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']
    listed = leaves(sidebar['contents'])
    assert len(listed) == len(set(listed)), 'a notebook is listed twice in _quarto.yml'
    have = {p.as_posix() for p in notebooks()}
    assert set(listed) - have == set(), 'in the sidebar of _quarto.yml, but not in nbs/'
    assert have - set(listed) == set(), 'in nbs/, but not in the sidebar of _quarto.yml'


def test_notebooks_are_numbered_in_the_order_of_the_sidebar():
    yaml = pytest.importorskip('yaml')
    text = (ROOT / '_quarto.yml').read_text(encoding='utf-8')
    listed = re.findall(r'(\w+)/(\d\d)_\w+\.ipynb', yaml.safe_dump(yaml.safe_load(text), sort_keys=False))
    numbers = {}
    for package, number in listed:
        numbers.setdefault(package, []).append(int(number))
    assert len(numbers) > 10
    for package, found in numbers.items():
        assert found == list(range(1, len(found) + 1)), package


def test_site_has_a_page_for_every_notebook_and_name():
    "Check the site that was built last; `make docs` builds it and checks its links."
    pytest.importorskip('nbdev')
    built = ROOT / '_docs' / 'index.html'
    sources = [p for p in (ROOT / 'nbs').rglob('*.ipynb') if not p.name.startswith('.')] + [ROOT / '_quarto.yml']
    if not built.exists() or any(p.stat().st_mtime > built.stat().st_mtime for p in sources):
        pytest.skip('no site of these notebooks: run make docs')
    from dr_transfer._modidx import d

    pages = tool('check_links')
    assert not pages.broken_links(ROOT / '_docs')
    from nbdev.doclinks import _nbpath2html

    for p in notebooks():
        assert (ROOT / '_docs' / _nbpath2html(p)).exists(), p
    hidden = tool('build_docs').hidden_names()
    ids = {}
    for names in d['syms'].values():
        for name, (where, _) in names.items():
            page, anchor = where.split('#')
            if page not in ids:
                ids[page] = pages.Page((ROOT / '_docs' / page).read_text(encoding='utf-8')).ids
            # A page describes public names; methods are shown only on request
            if where not in hidden and '.' not in anchor:
                assert anchor in ids[page], f'{name} is not on {page}'


def test_search_index_leads_to_pages():
    index = ROOT / '_docs' / 'search.json'
    if not index.exists():
        pytest.skip('no site: run make docs')
    for entry in json.loads(index.read_text(encoding='utf-8')):
        assert (ROOT / '_docs' / entry['href'].split('#')[0]).is_file(), entry['href']


def test_the_glossary_has_each_term_once():
    cells = json.loads((ROOT / 'nbs' / 'glossary.ipynb').read_text(encoding='utf-8'))['cells']
    lines = [line for c in cells for line in ''.join(c['source']).splitlines() if line.startswith('| ')]
    terms = [line.split('|')[1].strip() for line in lines if not line.startswith('| term')]
    assert len(terms) > 60
    assert len(terms) == len(set(terms))
    for text in ('operating point', 'split', 'subset', 'bootstrap resample', 'safetensors'):
        assert text in terms
