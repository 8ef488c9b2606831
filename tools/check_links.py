"""Check all internal links of a built site: each address must be a file, and each fragment the id of an element.

A link in Markdown that is part of the text was not rendered, because it is inside another link.

The script shares no code with the tool that built the site, and needs only the standard library:
    python tools/check_links.py _docs
"""

import posixpath
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

NOT_RENDERED = re.compile(r'\]\([^()\s]+\)')
VERBATIM = ('code', 'pre', 'script', 'style')


class Page(HTMLParser):
    "The links of a page, those that were not rendered, and the ids of its elements."

    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], {'', 'top'}
        self.not_rendered = []
        self.verbatim = 0  # number of open elements whose text is not Markdown
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.verbatim += tag in VERBATIM
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        # The button of a menu is a link with an empty href.
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]

    def handle_endtag(self, tag):
        self.verbatim -= tag in VERBATIM

    def handle_data(self, data):
        if not self.verbatim:
            self.not_rendered += NOT_RENDERED.findall(data)


def broken_links(
    site,  # Folder with the built site
):  # list of (page, link, reason)
    "Find the broken internal links of a site."
    site = Path(site)
    pages = {p.relative_to(site).as_posix(): Page(p.read_text(encoding='utf-8')) for p in sorted(site.rglob('*.html'))}
    broken = []
    for name, page in pages.items():
        broken += [(name, link, 'not rendered, because it is inside another link') for link in page.not_rendered]
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            # An address that starts at the root breaks if the site is not at the root of its host.
            if url.path.startswith('/'):
                broken.append((name, link, 'starts at the root'))
                continue
            path = unquote(url.path)
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            if (site / target).is_dir():
                target = posixpath.normpath(posixpath.join(target, 'index.html'))
            if target.startswith('..') or not (site / target).is_file():
                broken.append((name, link, 'no such file'))
            elif target in pages and unquote(url.fragment) not in pages[target].ids:
                broken.append((name, link, 'no such id'))
    return broken


def main(site):
    "Print the broken links; exit with an error if there are any, or if the site has no pages."
    pages = len(list(Path(site).rglob('*.html')))
    broken = broken_links(site)
    for name, link, reason in broken:
        print(f'{name}: {link}: {reason}', file=sys.stderr)
    if not pages:
        sys.exit(f'{site} has no pages: run make docs')
    if broken:
        sys.exit(f'{len(broken)} broken links')
    print(f'{site}: all links of {pages} pages are good')


if __name__ == '__main__':
    main(sys.argv[1] if len(sys.argv) > 1 else '_docs')
