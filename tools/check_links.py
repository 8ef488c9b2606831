"""Check every link of a built site: each internal address must be a file, and each fragment the id of an element there.

It shares no code with the tool that built the site, and only the standard library is needed:
    python tools/check_links.py _docs
"""

import posixpath
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "What a page links to, and the ids that can be linked to in it."

    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], {'', 'top'}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        # A button that folds a menu is written as a link whose href is empty.
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]


def broken_links(
    site,  # Folder with the built site
):  # list of (page, link, what is wrong with it)
    "Find the internal links of a site that lead nowhere."
    site = Path(site)
    pages = {p.relative_to(site).as_posix(): Page(p.read_text(encoding='utf-8')) for p in sorted(site.rglob('*.html'))}
    found = []
    for name, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            # An address from the root breaks as soon as the site is served below another one.
            if url.path.startswith('/'):
                found.append((name, link, 'starts at the root'))
                continue
            path = unquote(url.path)
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            if (site / target).is_dir():
                target = posixpath.normpath(posixpath.join(target, 'index.html'))
            if target.startswith('..') or not (site / target).is_file():
                found.append((name, link, 'no such file'))
            elif target in pages and unquote(url.fragment) not in pages[target].ids:
                found.append((name, link, 'no such id'))
    return found


def main(site):
    "Print what is broken; a site without pages is broken too."
    pages = len(list(Path(site).rglob('*.html')))
    found = broken_links(site)
    for name, link, why in found:
        print(f'{name}: {link}: {why}', file=sys.stderr)
    if not pages:
        sys.exit(f'{site} has no pages: run make docs')
    if found:
        sys.exit(f'{len(found)} broken links')
    print(f'{site}: every link of {pages} pages is good')


if __name__ == '__main__':
    main(sys.argv[1] if len(sys.argv) > 1 else '_docs')
