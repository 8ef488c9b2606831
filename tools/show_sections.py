"""Render the documentation of a function for the site: as nbdev does, followed by the sections of its docstring.

nbdev shows the summary of a numpydoc docstring without its sections, and its parser does not keep the list of errors
that are raised. So this script reads the sections. The parameters are shown in the signature only, with the comments
from which their section was made (`tools/write_parameters.py`). `settings.ini` names the class `SectionsRenderer`, and
`tools/build_docs.py` uses it.
"""

import inspect
import re
from textwrap import dedent

from nbdev.showdoc import BasicMarkdownRenderer

TITLE = re.compile(r'^(Parameters|Returns|Raises|Notes|Examples)\n-+\n', re.M)
ENTRY = re.compile(r'^(\S.*)\n((?:[ ]+.*(?:\n|\Z))+)', re.M)


def entries(text):  # Markdown
    "Return a list item for each entry of a Returns or Raises section: the type, then its description."
    rest = ENTRY.sub('', text).strip()
    if not ENTRY.search(text) or rest:
        line = (rest or text).partition('\n')[0]
        raise ValueError(
            f'the section has an entry without a description: {line!r}. '
            'Write the type in a line, and below it the description, indented'
        )
    return '\n'.join(f'- `{kind}`: {" ".join(dedent(what).split())}' for kind, what in ENTRY.findall(text))


def sections(sym):  # list of paragraphs of Markdown
    "Return the sections of a docstring, with titles in bold: headings would fill the table of contents."
    _, *parts = TITLE.split(inspect.getdoc(sym) or '')
    out = []
    for title, text in zip(parts[::2], parts[1::2]):
        body = text.strip('\n')
        if title == 'Parameters':
            continue
        if title in ('Returns', 'Raises'):
            try:
                body = entries(body)
            except ValueError as e:
                raise ValueError(f'{sym.__qualname__}, {title}: {e}') from None
        elif title == 'Examples':
            body = f'```python\n{body}\n```'
        out += [f'**{title}**', body]
    return out


class SectionsRenderer(BasicMarkdownRenderer):
    "nbdev's renderer, followed by the sections of the docstring."

    def _repr_markdown_(self):
        return '\n\n'.join([super()._repr_markdown_(), *sections(self.sym)])
