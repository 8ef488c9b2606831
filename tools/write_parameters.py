"""Write the section Parameters of docstrings from the comments of the signature: `make prepare` calls it.

Parameters are described once, by a comment each, which nbdev shows beside the signature. `help` of Python shows no
comments. So a function whose docstring has sections also gets a section Parameters, for `help`, made from the comments.

    python tools/write_parameters.py    # prints the notebooks that changed
"""

import ast
import json
import re
from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = re.compile(r'^ +Returns\n +-+\n', re.M)  # a docstring with this section is one with all of them
OWN = re.compile(r'^ +Parameters\n +-+\n.*?(?=^ +Returns\n +-+\n)', re.M | re.S)


def comment_of(line) -> str:
    "The comment at the end of a line"
    return line.partition('  # ')[2].strip()


def all_parameters(arguments) -> list:
    "Prefix, argument and default of each parameter, in the order of the signature"
    positional = [*arguments.posonlyargs, *arguments.args]
    missing = [None] * (len(positional) - len(arguments.defaults))
    found = [('', a, default) for a, default in zip(positional, [*missing, *arguments.defaults])]
    if arguments.vararg:
        found.append(('*', arguments.vararg, None))
    found += [('', a, default) for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg:
        found.append(('**', arguments.kwarg, None))
    return found


def usual(default) -> str:
    "A default in words; 'optional' if it is not a literal, because `help` shows its value in the signature"
    try:
        ast.literal_eval(default)
    except ValueError:
        return 'optional'
    return f'default {ast.unparse(default)}'


def parameters_of(function, lines) -> str:
    "The section Parameters of a function, '' if it has none"
    entries = []
    for prefix, argument, default in all_parameters(function.args):
        about = [ast.unparse(argument.annotation)] if argument.annotation else []
        if default:
            about.append(usual(default))
        kind = f' : {", ".join(about)}' if about else ''
        entries.append(f'{prefix}{argument.arg}{kind}\n    {comment_of(lines[argument.lineno - 1])}')
    return '\n'.join(['Parameters', '----------', *entries]) + '\n\n' if entries else ''


def with_parameters(source) -> str:
    "Code whose docstrings with sections have the section Parameters"
    lines = source.splitlines()
    for function in ast.parse(source).body:
        text = ast.get_docstring(function, clean=False) if isinstance(function, ast.FunctionDef) else None
        if text and SECTIONS.search(text):
            section = indent(parameters_of(function, lines), '    ')
            without = OWN.sub('', text)
            at = SECTIONS.search(without).start()
            source = source.replace(text, without[:at] + section + without[at:])
    return source


def is_exported(source) -> bool:
    "Is the code of a cell exported?"
    return source.startswith('#| export')


def updated(path) -> str:
    "The text of a notebook with the sections"
    nb = json.loads(path.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and is_exported(source):
            cell['source'] = with_parameters(source).splitlines(keepends=True)
    return json.dumps(nb, indent=1, ensure_ascii=False) + '\n'


def would_change(path) -> bool:
    "Is a section missing, or different from the comments?"
    return updated(path) != path.read_text(encoding='utf-8')


def main():
    for path in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        hidden = any(part.startswith(('.', '_')) for part in path.relative_to(ROOT).parts)
        if not hidden and would_change(path):
            path.write_text(updated(path), encoding='utf-8')
            print(path.relative_to(ROOT))


if __name__ == '__main__':
    main()
