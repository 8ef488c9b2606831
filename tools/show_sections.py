"""How `show_doc` renders a function on the site: as nbdev does, and below it the sections of its docstring that the
signature does not hold.

nbdev reads the summary of a numpydoc docstring and leaves out its sections. The parameters stay in the signature, with
their comments, so nothing is shown twice. `settings.ini` names this class, and `tools/build_docs.py` is what uses it.
"""

from fastcore.docments import parse_docstring
from nbdev.showdoc import BasicMarkdownRenderer


def entries(section):  # list of lines of Markdown
    "What comes back, or what is raised: a line each, the type first."
    return [f'- `{e.type or e.name}`: {" ".join(line.strip() for line in e.desc)}' for e in section]


def sections(sym):  # list of paragraphs of Markdown
    "Returns, Raises, Notes and Examples of a docstring; in bold and not as headings, which would fill the contents."
    doc = parse_docstring(sym)
    parts = []
    for title in ('Returns', 'Raises'):
        if doc[title]:
            parts += [f'**{title}**', '\n'.join(entries(doc[title]))]
    if doc['Notes']:
        parts += ['**Notes**', '\n'.join(doc['Notes']).strip()]
    if doc['Examples']:
        parts += ['**Examples**', '```python\n' + '\n'.join(doc['Examples']).strip() + '\n```']
    return parts


class SectionsRenderer(BasicMarkdownRenderer):
    "nbdev's own, and the sections of the docstring."

    def _repr_markdown_(self):
        return '\n\n'.join([super()._repr_markdown_(), *sections(self.sym)])
