"""Check all internal links of a built site: each address must be a file, and each fragment the id of an element.

The script shares no code with the tool that built the site, and needs only the standard library:
    python tools/check_links.py _docs
"""

import posixpath
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "The links of a page and the ids of its elements."

    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], {'', 'top'}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        # The button of a menu is a link with an empty href.
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]


def broken_links(
    site,  # Folder with the built site
):  # list of (page, link, reason)
    "Find the broken internal links of a site."
    site = Path(site)
    pages = {p.relative_to(site).as_posix(): Page(p.read_text(encoding='utf-8')) for p in sorted(site.rglob('*.html'))}
    broken = []
    for name, page in pages.items():
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
