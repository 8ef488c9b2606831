"""How `show_doc` renders a function on the site: as nbdev does, and below it the sections of its docstring that the
signature does not hold.

nbdev reads the summary of a numpydoc docstring and leaves out its sections; its parser keeps no list of what is
raised, so they are read here. The parameters stay in the signature, with their comments, so nothing is shown twice.
`settings.ini` names this class, and `tools/build_docs.py` is what uses it.
"""

import inspect
import re
from textwrap import dedent

from nbdev.showdoc import BasicMarkdownRenderer

TITLE = re.compile(r'^(Returns|Raises|Notes|Examples)\n-+\n', re.M)


def entries(text):  # Markdown
    "What comes back, or what is raised: a line each, the type first."
    found = re.findall(r'^(\S.*)\n((?:[ ]+.*\n?)+)', text, re.M)
    return '\n'.join(f'- `{kind}`: {" ".join(dedent(what).split())}' for kind, what in found)


def sections(sym):  # list of paragraphs of Markdown
    "The sections of a docstring by their titles, in bold and not as headings, which would fill the table of contents."
    _, *parts = TITLE.split(inspect.getdoc(sym) or '')
    out = []
    for title, text in zip(parts[::2], parts[1::2]):
        body = text.strip('\n')
        if title in ('Returns', 'Raises'):
            body = entries(body)
        elif title == 'Examples':
            body = f'```python\n{body}\n```'
        out += [f'**{title}**', body]
    return out


class SectionsRenderer(BasicMarkdownRenderer):
    "nbdev's own, and the sections of the docstring."

    def _repr_markdown_(self):
        return '\n\n'.join([super()._repr_markdown_(), *sections(self.sym)])
